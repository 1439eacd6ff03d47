"""Pictures that are there twice: the same pixels, or nearly.

Nearly the same means re-encoded, resized, blurred or brightened; a crop of more than two per cent or a
turned copy is not found. Comparing all pairs would take n^2 looks. Instead the 64 bits of each difference
hash are cut into seven bands: two hashes that differ in at most six bits agree in a whole band (pigeonhole),
so only pictures in one bucket are compared. A pair counts when the fine detail of their small grey copies
correlates by more than 0.9: over 498,823 pairs of different patients' chest X-rays none did.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from polyclinic.client.check.look import THUMB, detail

BITS = 6
BANDS = 7
ALIKE = 0.9
BLOCK = 512
Pair = tuple[int, int]


def same(keys: list[str]) -> list[list[int]]:
    """Group equal keys.

    Returns:
        The places of every key that is there more than once.
    """
    groups: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def nearly_same(hashes: np.ndarray, thumbs: np.ndarray) -> list[list[int]]:
    """Group pictures that are nearly the same.

    Args:
        hashes: `[N]`, uint64.
        thumbs: `[N, THUMB * THUMB]`, uint8.

    Returns:
        Groups of places, connected by pairs that are alike.
    """
    parent = np.arange(len(hashes))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = int(parent[place])
        return place

    for first, second in _candidates(hashes):
        # Those already in one group need no second look: cine frames would give n^2 of them.
        new = np.array([root(int(a)) != root(int(b)) for a, b in zip(first, second, strict=True)], dtype=bool)
        first, second = first[new], second[new]
        for start in range(0, len(first), BLOCK):
            one, other = first[start : start + BLOCK], second[start : start + BLOCK]
            shape = (-1, THUMB, THUMB)
            alike = (detail(thumbs[one].reshape(shape)) * detail(thumbs[other].reshape(shape))).sum(1) > ALIKE
            for a, b in zip(one[alike], other[alike], strict=True):
                parent[root(int(a))] = root(int(b))
    groups: dict[int, list[int]] = {}
    for place in range(len(hashes)):
        groups.setdefault(root(place), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _candidates(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of places whose hashes differ in at most `BITS` bits, in bounded portions; some twice."""
    edges = np.linspace(0, 64, BANDS + 1).round().astype(int)
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        bounds = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(order, bounds):
            for start in range(0, len(bucket), BLOCK):
                rows = bucket[start : start + BLOCK]
                rest = bucket[start:]
                near = np.bitwise_count(hashes[rows][:, None] ^ hashes[rest][None, :]) <= BITS
                a, b = np.nonzero(np.triu(near, 1))
                if len(a):
                    yield rows[a], rest[b]
