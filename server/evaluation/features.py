"""Features of images, computed once: kept in a folder by the hash of the images and of the extractor.

An extractor without weights is its code, and what one with weights gives follows from code as well, so the
hash of that code is part of the name under which features are kept.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from polyclinic.common.data import pixels, preprocess
from polyclinic.common.data.pixels import digests, load_pixels
from polyclinic.common.data.table import Record
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.files import canonical_json, sha256_file, write_atomic
from polyclinic.common.generators.base import in_batches
from polyclinic.common.progress import track
from polyclinic.common.refusals import BadInput

AT_ONCE = 64
# What happens to an image from its file to its features.
CODE = (
    *sorted(Path(inspect.getfile(Extractor)).parent.glob("*.py")),
    *(Path(inspect.getfile(module)) for module in (pixels, preprocess)),
)


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
        """Features [N, d] of images [N, 3, H, W] in [0, 1].

        Raises:
            BadInput: An image or the extractor is broken, so that features are not finite.
        """
        content = hashlib.sha256(images.float().contiguous().numpy().tobytes()).hexdigest()

        def compute() -> Tensor:
            parts = []
            with track(f"features, {extractor.name}", len(images)) as advance:
                for batch in images.split(AT_ONCE):
                    parts.append(extractor.extract(batch))
                    advance(len(batch))
            found = torch.cat(parts)
            names = [f"drawn image {number}" for number in range(1, len(images) + 1)]
            check_finite(extractor.name, found, names, "the generator diverged: lower its learning rate")
            return found

        return self._features(extractor, ["pixels", list(images.shape), content], compute)

    def of_records(self, extractor: Extractor, records: list[Record]) -> Tensor:
        """Features [N, d] of reference images, preprocessed as the training images were.

        Raises:
            BadInput: An image or the extractor is broken, so that features are not finite.
        """

        def compute() -> Tensor:
            parts = []
            with track(f"reference features, {extractor.name}", len(records)) as advance:
                for batch in in_batches(records, AT_ONCE):
                    parts.append(extractor.extract(self.pixels(batch)))
                    advance(len(batch))
            found = torch.cat(parts)
            names = [str(record.image) for record in records]
            check_finite(extractor.name, found, names, "take the image out of the reference or replace it")
            return found

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
        recipe = [extractor.name, extractor.preprocessing, extractor.weights, code_hashes(CODE), what]
        return self.once(recipe, compute)


@functools.cache
def code_hashes(files: tuple[Path, ...]) -> list[str]:
    """Hash each of these files, once a process."""
    return [sha256_file(path) for path in files]


def check_finite(extractor: str, found: Tensor, names: list[str], fix: str) -> None:
    """Refuse features [N, d] that no metric can use.

    Args:
        extractor: Name of what gave them.
        found: The features.
        names: What each row is of.
        fix: What to do about an image that is broken.

    Raises:
        BadInput: Some are NaN or infinite; names the first image, or, where none is finite, the extractor.
    """
    whole = found.isfinite().all(dim=1).tolist()
    broken = [name for name, fine in zip(names, whole, strict=True) if not fine]
    if broken:
        weights = "check the extractor's weights, or " if len(broken) == len(names) else ""
        raise BadInput(
            f"{extractor}: {len(broken)} of {len(names)} images have features that are not finite, "
            f"{broken[0]} first; {weights}{fix}"
        )
