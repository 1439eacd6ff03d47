"""The latent cache: each image's VAE moments and each distinct prompt's embedding, computed once.

The cache is private at a site: its folder has mode 0700. Shards are keyed by what they hold and by
the base that encoded it, written whole, and found again after a crash; finished shards are not
redone. A changed image, caption, preprocessing or base is another key.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from polyclinic.common.data.pixels import digests, load_pixels, spread
from polyclinic.common.data.table import Record, patients_of
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.files import canonical_json, write_atomic, write_json_atomic
from polyclinic.common.generators.base import Family, Tensors
from polyclinic.common.progress import track
from polyclinic.common.refusals import Refusal

if TYPE_CHECKING:
    from polyclinic.common.settings import DataSettings

IMAGES_A_SHARD, PROMPTS_A_SHARD = 64, 256
FEATURES = "features"
Loader = Callable[[list[Any]], Any]
Encoder = Callable[[Any], Tensors]


@dataclass(frozen=True)
class Cached:
    """A site's training data: everything a view is drawn from.

    Attributes:
        patients: Patient ids, sorted; a patient's position here is not used for randomness.
        images: Per patient, the rows of `image` that are theirs.
        captions: Per row of `image`, the rows of `prompt` that describe it.
        image: Cached tensors of all images, `[N, ...]`; those that `load_cache` gives stay on disk.
        prompt: Cached tensors of all distinct captions, `[M, ...]`, likewise.
        empty: Row of `prompt` that holds the empty caption.
    """

    patients: list[str]
    images: list[list[int]]
    captions: list[list[int]]
    image: Mapping[str, Tensor | Pieces]
    prompt: Mapping[str, Tensor | Pieces]
    empty: int


class Pieces:
    """A tensor in the mapped files of its shards: a row is read when it is taken, and no sooner."""

    def __init__(self, pieces: list[Tensor]) -> None:
        self.pieces, self.ends = pieces, list(accumulate(len(piece) for piece in pieces))
        self.shape = (self.ends[-1], *pieces[0].shape[1:])

    def __getitem__(self, rows: list[int]) -> Tensor:
        at = [bisect_right(self.ends, row) for row in rows]
        found = [self.pieces[i][row - self.ends[i]] for i, row in zip(at, rows, strict=True)]
        return torch.stack(found) if found else torch.empty(0, *self.shape[1:])


def build_cache(
    records: list[Record],
    family: Family,
    data: DataSettings,
    folder: Path,
    extractor: Extractor | None = None,
) -> str:
    """Encode what is not encoded yet.

    Args:
        records: The accepted table.
        family: Loaded with its encoders.
        data: Preprocessing.
        folder: Cache folder; created with mode 0700.
        extractor: Public image features, where a study asks for them.

    Returns:
        Name of the cache's index, to be given to `load_cache` and `load_features`.

    Raises:
        BadInput: An image cannot be read, or the disk is full; finished shards stay, nothing is half-written.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    ordered = [record for group in patients_of(records).values() for record in group]
    captions = sorted({caption for record in ordered for caption in record.captions} | {""})
    hashes = digests(ordered)
    pixels = partial(load_pixels, size=data.image_size, fit=data.fit)
    looked = 1 if extractor is None else 2
    file = lambda key: folder / f"{key}.safetensors"  # noqa: E731
    with track(f"cache {folder.parent.name}", looked * len(ordered) + len(captions)) as advance:

        def shards(
            kind: str, by: str, names: list[str], items: list[Any], load: Loader, encode: Encoder
        ) -> list[str]:
            size = PROMPTS_A_SHARD if kind == "prompt" else IMAGES_A_SHARD
            parts = [slice(start, start + size) for start in range(0, len(items), size)]
            keys = [_key(kind, f"{by}|{data.image_size}|{data.fit}", names[part]) for part in parts]
            todo = {key: items[part] for key, part in zip(keys, parts, strict=True) if not file(key).exists()}
            advance(len(items) - sum(len(part) for part in todo.values()))
            # The next shard is decoded while this one is encoded.
            for key, loaded in zip(todo, spread(load, todo.values(), 1, ahead=1), strict=True):
                _write(file(key), encode(loaded))
                advance(len(todo[key]))
            return keys

        kinds: list[tuple[str, str, list[str], list[Any], Loader, Encoder]] = [
            ("image", family.base_hash, hashes, ordered, pixels, family.encode_image),
            ("prompt", family.base_hash, captions, captions, list, family.encode_prompt),
        ]
        if extractor is not None:
            look: Encoder = lambda shown: {FEATURES: extractor.extract(shown / 2 + 0.5)}  # noqa: E731
            kinds.append(("feature", extractor.weights, hashes, ordered, pixels, look))
        index: dict[str, Any] = {f"{kind[0]}_shards": shards(*kind) for kind in kinds}
    row_of = {caption: row for row, caption in enumerate(captions)}
    index["patients"] = [record.patient for record in ordered]
    index["captions"] = [[row_of[caption] for caption in record.captions] for record in ordered]
    index["empty"] = row_of[""]
    name = hashlib.sha256(canonical_json(index)).hexdigest()[:32]
    write_json_atomic(folder / f"{name}.json", index, mode=0o600)
    return name


def load_cache(folder: Path, name: str) -> Cached:
    """Open a cache; its shards are mapped into memory, not read.

    Raises:
        Refusal: `site-not-ready` where the index or a shard is missing.
    """
    index, rows = _index(folder, name)
    return Cached(
        list(rows),
        list(rows.values()),
        index["captions"],
        _read(folder, index["image_shards"]),
        _read(folder, index["prompt_shards"]),
        index["empty"],
    )


def load_features(folder: Path, name: str) -> dict[str, Tensor]:
    """Read each patient's image features, `[images, d]`; refuses as `load_cache`."""
    index, rows = _index(folder, name)
    features = _read(folder, index["feature_shards"])[FEATURES]
    return {patient: features[own] for patient, own in rows.items()}


def _index(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Read a cache's index, and each patient's rows, patients sorted."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise Refusal("site-not-ready", f"no cache index {path}")
    index = json.loads(path.read_text(encoding="utf-8"))
    rows: dict[str, list[int]] = {patient: [] for patient in sorted(set(index["patients"]))}
    for row, patient in enumerate(index["patients"]):
        rows[patient].append(row)
    return index, rows


def _key(kind: str, how: str, what: list[str]) -> str:
    return hashlib.sha256(canonical_json([kind, how, what])).hexdigest()[:32]


def _write(path: Path, tensors: Tensors) -> None:
    whole = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(whole), mode=0o600)


def _read(folder: Path, keys: list[str]) -> dict[str, Pieces]:
    parts: list[Tensors] = []
    for key in keys:
        path = folder / f"{key}.safetensors"
        if not path.exists():
            raise Refusal("site-not-ready", f"cache shard {path} is missing")
        parts.append(load_file(str(path)))
    return {name: Pieces([part[name] for part in parts]) for name in parts[0]}
