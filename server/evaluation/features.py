"""Features of images, computed once: kept in a folder by the hash of the images and of the extractor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from polyclinic.common.data.pixels import digests, load_pixels
from polyclinic.common.data.table import Record
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.files import canonical_json, write_atomic
from polyclinic.common.generators.base import in_batches
from polyclinic.common.progress import track

AT_ONCE = 64


class FeatureStore:
    """Extracts features and finds them again.

    Args:
        folder: Where they are kept; public images only.
        size: Pixels a side of an image.
        fit: How reference images are made square, as the training images were.
    """

    def __init__(self, folder: Path, size: int, fit: str) -> None:
        self.folder, self.size, self.fit = folder, size, fit
        self._kept: dict[str, Tensor] = {}

    def of_images(self, extractor: Extractor, images: Tensor) -> Tensor:
        """Features [N, d] of images [N, 3, H, W] in [0, 1]."""
        pixels = hashlib.sha256(images.float().contiguous().numpy().tobytes()).hexdigest()

        def compute() -> Tensor:
            parts = []
            with track(f"features, {extractor.name}", len(images)) as advance:
                for batch in images.split(AT_ONCE):
                    parts.append(extractor.extract(batch))
                    advance(len(batch))
            return torch.cat(parts)

        return self._features(extractor, ["pixels", list(images.shape), pixels], compute)

    def of_records(self, extractor: Extractor, records: list[Record]) -> Tensor:
        """Features [N, d] of reference images, preprocessed as the training images were."""

        def compute() -> Tensor:
            parts = []
            with track(f"reference features, {extractor.name}", len(records)) as advance:
                for batch in in_batches(records, AT_ONCE):
                    parts.append(extractor.extract(self.pixels(batch)))
                    advance(len(batch))
            return torch.cat(parts)

        return self._features(extractor, self.names(records), compute)

    def pixels(self, records: list[Record]) -> Tensor:
        """Reference images, preprocessed, [N, 3, size, size] in [0, 1]."""
        return load_pixels(records, self.size, self.fit) / 2 + 0.5

    def names(self, records: list[Record]) -> list[object]:
        """What reference images are, preprocessing included: equal for equal pixels."""
        return ["files", self.size, self.fit, digests(records)]

    def once(self, recipe: object, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a tensor, or find what the same recipe gave before.

        Args:
            recipe: Everything the tensor follows from, as JSON can hold it.
            compute: Called where it is not there.
        """
        key = hashlib.sha256(canonical_json(recipe)).hexdigest()[:32]
        if key not in self._kept:
            path = self.folder / f"{key}.safetensors"
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(path, save({"features": compute()}))
            self._kept[key] = load_file(str(path))["features"]
        return self._kept[key]

    def _features(self, extractor: Extractor, what: list[object], compute: Callable[[], Tensor]) -> Tensor:
        return self.once([extractor.name, extractor.preprocessing, extractor.weights, what], compute)
