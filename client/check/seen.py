"""What a check knows of each image, packed: some 150 bytes an image in memory, the rest in a scratch file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.client.check.look import FINE

Example = tuple[str, str]


class Seen:
    """What is known of the images of a table, by their places in it. Use `opened`.

    Attributes:
        contents: Content hashes, `[N]` bytes; empty where a file could not be read at all.
        pixels: Hashes of decoded pixels, `[N]` bytes; empty where it could not be decoded.
        compared: Places that near-duplicates are looked for among, `[M]`.
        hashes: Of those, `[M]` uint64.
        quarantined: Place to (code, detail).
        remembered: Images that an earlier check had looked at.
    """

    def __init__(self, images: int, scratch: Any) -> None:
        self.contents = np.zeros(images, "S96")
        self.pixels = np.zeros(images, "S32")
        self.compared = np.zeros(images, np.int64)
        self.hashes = np.zeros(images, np.uint64)
        self.quarantined: dict[int, Example] = {}
        self.remembered = 0
        self._at = self._many = 0
        self._scratch = scratch

    def add(self, content: str, look: dict[str, Any], *, known: bool) -> int:
        """Keep what was seen of the next image; returns its place."""
        place = self._at
        self.contents[place], self.pixels[place] = content.encode(), look.get("pixels", "").encode()
        self.remembered += known
        if "fine" in look:
            self.compared[self._many], self.hashes[self._many] = place, int(look["hash"], 16)
            self._scratch.write(bytes.fromhex(look["fine"]))
            self._many += 1
        self._at += 1
        return place

    def comparable(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places, hashes and fine details (`[M, FINE]` int8, on disk) of what can be compared."""
        self._scratch.flush()
        many = self._many
        fine = np.memmap(self._scratch, np.int8, "r", shape=(many, FINE)) if many else np.empty((0, FINE))
        return self.compared[:many], self.hashes[:many], fine


@contextmanager
def opened(images: int, folder: Path) -> Iterator[Seen]:
    """Seen of so many images; its scratch file has no name, so that nothing is left of it after a kill."""
    with tempfile.TemporaryFile(dir=folder) as scratch:
        yield Seen(images, scratch)
