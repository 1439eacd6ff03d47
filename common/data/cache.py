"""The latent cache: each image's VAE moments and each distinct prompt's embedding, computed once.

The cache is private at a site: its folder has mode 0700. Shards are keyed by what they hold and by
the base that encoded it, written whole, and found again after a crash; finished shards are not
redone. A changed image, caption, preprocessing or base is another key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from polyclinic.common.data.pixels import digests, load_pixels
from polyclinic.common.data.table import Record, patients_of
from polyclinic.common.files import canonical_json, write_atomic, write_json_atomic
from polyclinic.common.generators.base import Family, Tensors
from polyclinic.common.progress import track
from polyclinic.common.refusals import Refusal

if TYPE_CHECKING:
    from polyclinic.common.settings import DataSettings

IMAGES_A_SHARD, PROMPTS_A_SHARD = 64, 256


@dataclass(frozen=True)
class Cached:
    """A site's training data: everything a view is drawn from.

    Attributes:
        patients: Patient ids, sorted; a patient's position here is not used for randomness.
        images: Per patient, the rows of `image` that are theirs.
        captions: Per row of `image`, the rows of `prompt` that describe it.
        image: Cached tensors of all images, `[N, ...]`.
        prompt: Cached tensors of all distinct captions, `[M, ...]`.
        empty: Row of `prompt` that holds the empty caption.
    """

    patients: list[str]
    images: list[list[int]]
    captions: list[list[int]]
    image: Tensors
    prompt: Tensors
    empty: int


def snapshot_hash(records: list[Record], contents: list[str] | None = None) -> str:
    """Hash a table by content, not by path: patient, image bytes, captions. It never leaves a site."""
    pairs = zip(records, contents or digests(records), strict=True)
    rows = sorted([r.patient, content, list(r.captions)] for r, content in pairs)
    return hashlib.sha256(canonical_json(rows)).hexdigest()


def build_cache(records: list[Record], family: Family, data: DataSettings, folder: Path) -> str:
    """Encode what is not encoded yet.

    Args:
        records: The accepted table.
        family: Loaded with its encoders.
        data: Preprocessing.
        folder: Cache folder; created with mode 0700.

    Returns:
        Name of the cache's index, to be given to `load_cache`.

    Raises:
        BadInput: An image cannot be read, or the disk is full; finished shards stay, nothing is half-written.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    ordered = [record for group in patients_of(records).values() for record in group]
    captions = sorted({caption for record in ordered for caption in record.captions} | {""})
    how = f"{family.base_hash}|{data.image_size}|{data.fit}"
    hashes = digests(ordered)
    image_shards = [
        (_key("image", how, hashes[i : i + IMAGES_A_SHARD]), ordered[i : i + IMAGES_A_SHARD])
        for i in range(0, len(ordered), IMAGES_A_SHARD)
    ]
    prompt_shards = [
        (_key("prompt", how, captions[i : i + PROMPTS_A_SHARD]), captions[i : i + PROMPTS_A_SHARD])
        for i in range(0, len(captions), PROMPTS_A_SHARD)
    ]
    with track(f"cache {folder.parent.name}", len(ordered) + len(captions)) as advance:
        for key, part in image_shards:
            path = folder / f"{key}.safetensors"
            if not path.exists():
                _write(path, family.encode_image(load_pixels(part, data.image_size, data.fit)))
            advance(len(part))
        for key, texts in prompt_shards:
            path = folder / f"{key}.safetensors"
            if not path.exists():
                _write(path, family.encode_prompt(texts))
            advance(len(texts))
    row_of = {caption: row for row, caption in enumerate(captions)}
    index = {
        "patients": [record.patient for record in ordered],
        "captions": [[row_of[caption] for caption in record.captions] for record in ordered],
        "empty": row_of[""],
        "image_shards": [key for key, _ in image_shards],
        "prompt_shards": [key for key, _ in prompt_shards],
    }
    name = hashlib.sha256(canonical_json(index)).hexdigest()[:32]
    write_json_atomic(folder / f"{name}.json", index, mode=0o600)
    return name


def load_cache(folder: Path, name: str) -> Cached:
    """Read a cache into memory.

    Raises:
        Refusal: `site-not-ready` where the index or a shard is missing.
    """
    import json

    path = folder / f"{name}.json"
    if not path.exists():
        raise Refusal("site-not-ready", f"no cache index {path}")
    index = json.loads(path.read_text(encoding="utf-8"))
    patients = sorted(set(index["patients"]))
    rows: dict[str, list[int]] = {patient: [] for patient in patients}
    for row, patient in enumerate(index["patients"]):
        rows[patient].append(row)
    return Cached(
        patients,
        [rows[patient] for patient in patients],
        index["captions"],
        _read(folder, index["image_shards"]),
        _read(folder, index["prompt_shards"]),
        index["empty"],
    )


def _key(kind: str, how: str, what: list[str]) -> str:
    return hashlib.sha256(canonical_json([kind, how, what])).hexdigest()[:32]


def _write(path: Path, tensors: Tensors) -> None:
    whole = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(whole), mode=0o600)


def _read(folder: Path, keys: list[str]) -> Tensors:
    parts: list[dict[str, Tensor]] = []
    for key in keys:
        path = folder / f"{key}.safetensors"
        if not path.exists():
            raise Refusal("site-not-ready", f"cache shard {path} is missing")
        parts.append(load_file(str(path)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
