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

BITS = 6
BANDS = 7
ALIKE = 0.9
BLOCK, WIDE = 512, 8192
Pairs = tuple[np.ndarray, np.ndarray]


def same(keys: np.ndarray) -> list[list[int]]:
    """Group equal keys.

    Args:
        keys: `[N]`; an empty one is like no other.

    Returns:
        The places of every key that is there more than once.
    """
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] != keys.dtype.type()]
    return _groups(order, keys[order])


def nearly_same(hashes: np.ndarray, fine: np.ndarray) -> list[list[int]]:
    """Group pictures that are nearly the same; memory is bounded beside the arguments.

    Args:
        hashes: `[N]`, uint64.
        fine: `[N, FINE]`, int8; may lie on disk.

    Returns:
        Groups of places, connected by pairs that are alike.
    """
    group = np.arange(len(hashes))
    for first, second in _candidates(hashes):
        # Those already in one group need no second look: cine frames would give n^2 of them.
        new = group[first] != group[second]
        first, second = first[new], second[new]
        for start in range(0, len(first), BLOCK):
            some = slice(start, start + BLOCK)
            alike = _correlation(fine[first[some]], fine[second[some]]) > ALIKE
            for one, other in zip(first[some][alike], second[some][alike], strict=True):
                low, high = sorted((group[one], group[other]))
                if low != high:
                    group[group == high] = low
    order = np.argsort(group, kind="stable")
    return _groups(order, group[order])


def _groups(order: np.ndarray, keys: np.ndarray) -> list[list[int]]:
    """Cut places that are sorted by their keys into groups of more than one, the first places first."""
    bounds = np.concatenate(([0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [len(order)]))
    return sorted(order[a:b].tolist() for a, b in pairwise(bounds) if b - a > 1)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlate rows of mean 0 pairwise."""
    a, b = one.astype(np.float32), other.astype(np.float32)
    lengths = np.sqrt(np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b))
    return np.einsum("ij,ij->i", a, b) / np.maximum(lengths, 1)


def _candidates(hashes: np.ndarray) -> Iterator[Pairs]:
    """Yield pairs of places whose hashes differ in at most `BITS` bits, once each, in bounded portions."""
    edges = np.linspace(0, 64, BANDS + 1).round().astype(int)
    masks = [np.uint64(((1 << int(high - low)) - 1) << int(low)) for low, high in pairwise(edges)]
    for number, mask in enumerate(masks):
        order = np.argsort(hashes & mask, kind="stable")
        bounds = np.flatnonzero(np.diff(hashes[order] & mask)) + 1
        for bucket in np.split(order, bounds):
            for start in range(0, len(bucket), BLOCK):
                rows = bucket[start : start + BLOCK]
                for beside in range(start, len(bucket), WIDE):
                    rest = bucket[beside : beside + WIDE]
                    differ = hashes[rows][:, None] ^ hashes[rest][None, :]
                    near = np.bitwise_count(differ) <= BITS
                    a, b = np.nonzero(np.triu(near, 1) if beside == start else near)
                    # Those that agree in an earlier band were taken there.
                    new = np.ones(len(a), dtype=bool)
                    for earlier in masks[:number]:
                        new &= (differ[a, b] & earlier) != 0
                    if new.any():
                        yield rows[a[new]], rest[b[new]]
