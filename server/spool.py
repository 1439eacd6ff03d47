"""Tensors on disk that are written and read piece by piece, so that memory does not grow with the sites.

The format is safetensors'; its own writer wants every tensor in memory at once, and once more as bytes.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from polyclinic.common.files import naming_full_disk
from polyclinic.common.generators.base import Tensors

PIECE = 1 << 20  # coordinates handled at once


@dataclass(frozen=True)
class Spooled:
    """A site's difference on disk.

    Attributes:
        path: A safetensors file.
        places: Name to the byte where the tensor begins.
        norm: Euclidean length of the whole difference.
    """

    path: Path
    places: Mapping[str, int]
    norm: float

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read coordinates [start, stop) of a tensor, flat."""
        place = self.places[name] + 4 * start
        return torch.from_numpy(np.fromfile(self.path, dtype="<f4", count=stop - start, offset=place))


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, Tensor]], like: Tensors, *, sync: bool = False
) -> Spooled:
    """Write fp32 tensors as they come; half a file has another name.

    Args:
        path: Where the file will stand.
        tensors: In the order of their names.
        like: Names and shapes of all of them.
        sync: Force it to disk, for what must outlive a power cut.

    Raises:
        BadInput: The disk is full; nothing is left behind.
    """
    header: dict[str, object] = {}
    places, end = {}, 0
    for name in sorted(like):
        size = 4 * like[name].numel()
        header[name] = {"dtype": "F32", "shape": list(like[name].shape), "data_offsets": [end, end + size]}
        places[name] = end
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    squares = 0.0
    temporary = path.with_name(f".writing-{secrets.token_hex(8)}")
    try:
        with naming_full_disk(path), temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, tensor), expected in zip(tensors, sorted(like), strict=True):
                if name != expected or tensor.shape != like[name].shape or tensor.dtype != torch.float32:
                    raise ValueError(f"{name} where {expected} should be")
                for piece in tensor.reshape(-1).split(PIECE):
                    squares += float(piece.double().square().sum())
                    file.write(piece.numpy().astype("<f4", copy=False).data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    start = 8 + len(text)
    return Spooled(path, {name: start + place for name, place in places.items()}, math.sqrt(squares))


def open_tensors(path: Path) -> Spooled:
    """Open a file that `write_tensors` wrote, to be read piece by piece; its norm is not known (NaN)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in header.items()}
    return Spooled(path, places, math.nan)


def spool_folder(run_dir: Path, number: int) -> Path:
    """Where a round's spool lies."""
    folder = run_dir / "spool" / f"round-{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def spool_path(run_dir: Path, number: int, site: str) -> Path:
    """Where a site's reply to a round is spooled; a site's name may hold what a file's name may not."""
    return spool_folder(run_dir, number) / f"{quote(site, safe='')}.safetensors"


def clear_spool(run_dir: Path) -> None:
    """Remove what is spooled: after the round's checkpoint, or what a killed server left."""
    shutil.rmtree(run_dir / "spool", ignore_errors=True)
