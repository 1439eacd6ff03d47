"""Many records at once: their pixels as one tensor, their contents' hashes; several threads, in order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from typing import TypeVar

from torch import Tensor

from polyclinic.common.data.images import image_digest, open_image
from polyclinic.common.data.preprocess import make_square, to_pixels
from polyclinic.common.data.table import Record
from polyclinic.common.files import canonical_json
from polyclinic.common.progress import track

MANY = 5000  # what takes seconds shows its progress
T = TypeVar("T")
U = TypeVar("U")


def workers() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def spread(
    act: Callable[[T], U], items: Iterable[T], threads: int | None = None, ahead: int | None = None
) -> Iterator[U]:
    """Map in threads, in order, with `ahead` results waiting at most: memory does not grow."""
    rest, threads = iter(items), threads or workers()
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(act, item) for item in islice(rest, ahead or 2 * threads)]
        while waiting:
            done = waiting.pop(0).result()
            waiting.extend(pool.submit(act, item) for item in islice(rest, 1))
            yield done


def load_pixels(records: list[Record], size: int, fit: str) -> Tensor:
    """Decode and preprocess.

    Args:
        records: A batch.
        size: Pixels a side.
        fit: As in `preprocess`.

    Returns:
        `[B, 3, size, size]` in [-1, 1], float32.

    Raises:
        UnusableImage: One cannot be read; named.
    """
    return to_pixels(list(spread(lambda r: make_square(open_image(r.image, r.part), size, fit), records)))


def digests(records: list[Record]) -> list[str]:
    """Hash the contents of the records' images, in their order."""
    found = []
    with track("hash images", len(records)) if len(records) > MANY else nullcontext(_nothing) as advance:
        for digest in spread(lambda r: image_digest(r.image, r.part), records):
            found.append(digest)
            advance()
    return found


def snapshot_hash(records: list[Record], contents: list[str] | None = None) -> str:
    """Hash a table by content, not by path: patient, image bytes, captions. It never leaves a site."""
    pairs = zip(records, contents or digests(records), strict=True)
    rows = sorted([r.patient, content, list(r.captions)] for r, content in pairs)
    return hashlib.sha256(canonical_json(rows)).hexdigest()


def _nothing(n: int = 1, note: str = "") -> None:
    pass
