"""Pictures that are there twice: the same pixels, or nearly.

Nearly the same means re-encoded, resized, blurred or brightened; a crop of more than two per cent or a
turned copy is not found. Comparing all pairs would take n^2 looks. Instead the 64 bits of each difference
hash are cut into seven bands: two hashes that differ in at most six bits agree in a whole band (pigeonhole),
so only pictures in one bucket are compared. A pair counts when the fine detail of their small grey copies
correlates by more than 0.9: over 498,823 pairs of different patients' chest X-rays none did.

Thousands of pictures of one kind share a bucket, and n^2 would be back. In a bucket of more than `WIDE`, each
is compared with the `WIDE` after it in the order of its hash, turned so that the band comes first: a copy
whose hash differs in few bits stands near in at least one of the seven orders. In fine detail an image is
compared with `MOST` others that it is not like. So comparisons grow with n; whose were cut short is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

BITS = 6
BANDS = 7
ALIKE = 0.9
BLOCK, WIDE = 256, 16384
MOST = 1024
Pairs = tuple[np.ndarray, np.ndarray]


class Near(NamedTuple):
    """What `nearly_same` found.

    Attributes:
        groups: Places that are connected by pairs that are alike.
        cut: Places that were not compared with all that may be like them.
        hashes: Hashes that were compared, at most `BANDS * (WIDE + BLOCK)` an image.
        details: Pairs that were compared in fine detail, at most `MOST + 2 * BLOCK` an image.
    """

    groups: list[list[int]]
    cut: np.ndarray
    hashes: int
    details: int


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


def nearly_same(hashes: np.ndarray, fine: np.ndarray) -> Near:
    """Group pictures that are nearly the same; memory is bounded beside the arguments.

    Args:
        hashes: `[N]`, uint64.
        fine: `[N, FINE]`, int8; may lie on disk.
    """
    group, spent = np.arange(len(hashes)), np.zeros(len(hashes), dtype=np.int64)
    search, details = _Search(hashes, group, spent), 0
    for many in search.candidates():
        for start in range(0, len(many[0]), BLOCK):
            first, second = (side[start : start + BLOCK] for side in many)
            # Those already in one group need no second look: cine frames would give n^2 of them.
            new, over = group[first] != group[second], spent[first] >= MOST
            search.cut[first[new & over]] = True
            first, second = first[new & ~over], second[new & ~over]
            alike = _correlation(fine[first], fine[second]) > ALIKE
            details += len(first)
            np.add.at(spent, first[~alike], 1)
            for one, other in zip(first[alike], second[alike], strict=True):
                low, high = sorted((group[one], group[other]))
                if low != high:
                    group[group == high] = low
    order = np.argsort(group, kind="stable")
    return Near(_groups(order, group[order]), np.flatnonzero(search.cut), search.compared, details)


def _groups(order: np.ndarray, keys: np.ndarray) -> list[list[int]]:
    """Cut places that are sorted by their keys into groups of more than one, the first places first."""
    bounds = np.concatenate(([0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [len(order)]))
    return sorted(order[a:b].tolist() for a, b in pairwise(bounds) if b - a > 1)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlate rows of mean 0 pairwise."""
    a, b = one.astype(np.float32), other.astype(np.float32)
    lengths = np.sqrt(np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b))
    return np.einsum("ij,ij->i", a, b) / np.maximum(lengths, 1)


class _Search:
    """Pairs of places whose hashes differ in at most `BITS` bits.

    Who reads them joins groups and counts what is spent meanwhile: pairs in one group, or of those who have
    spent all, are left out.

    Attributes:
        cut: Places in a bucket that was too large to compare all with all.
        compared: Hashes that were compared.
    """

    def __init__(self, hashes: np.ndarray, group: np.ndarray, spent: np.ndarray) -> None:
        self.hashes, self.group, self.spent, self.compared = hashes, group, spent, 0
        self.cut = np.zeros(len(hashes), dtype=bool)
        # Of each band that is done: its bits, each place's rank, and the rank up to which it was compared.
        self.done: list[tuple[np.uint64, np.ndarray, np.ndarray]] = []

    def candidates(self) -> Iterator[Pairs]:
        """Yield them once each, in bounded portions, sorted by the first of a pair."""
        edges = np.linspace(0, 64, BANDS + 1).round().astype(int)
        for low, high in pairwise(int(edge) for edge in edges):
            turned = np.bitwise_or(self.hashes >> np.uint64(high % 64), self.hashes << np.uint64(-high % 64))
            order = np.argsort(turned, kind="stable")
            bounds = np.flatnonzero(np.diff(turned[order] >> np.uint64(64 - high + low))) + 1
            rank, upto = np.empty((2, len(order)), dtype=np.int32)
            rank[order] = np.arange(len(order))
            for start, end in pairwise([0, *bounds.tolist(), len(order)]):
                for place in range(start, end, BLOCK):
                    last = min(place + BLOCK + WIDE, end)
                    rows, rest = order[place : min(place + BLOCK, end)], order[place:last]
                    upto[rows] = last
                    if not self._one_group(rest):
                        yield self._pairs(rows, rest)
                if end - start > WIDE + BLOCK and not self._one_group(order[start:end]):
                    self.cut[order[start:end]] = True
            self.done.append((np.uint64(((1 << (high - low)) - 1) << low), rank, upto))

    def _one_group(self, places: np.ndarray) -> bool:
        return bool((self.group[places] == self.group[places[0]]).all())

    def _pairs(self, rows: np.ndarray, rest: np.ndarray) -> Pairs:
        """Compare a block with itself and what comes after it."""
        differ = self.hashes[rows][:, None] ^ self.hashes[rest][None, :]
        self.compared += differ.size
        near = np.bitwise_count(differ) <= BITS
        near &= self.group[rows][:, None] != self.group[rest][None, :]
        near = np.triu(near, 1)
        over = self.spent[rows] >= MOST
        self.cut[rows[over & near.any(1)]] = True
        near[over] = False
        at, beside = np.nonzero(near)
        first, second, bits = rows[at], rest[beside], differ[at, beside]
        new = np.ones(len(at), dtype=bool)
        for mask, rank, upto in self.done:
            one, other = rank[first], rank[second]
            earlier = np.where(one < other, upto[first], upto[second])
            # Those that shared an earlier bucket and stood near each other there were taken there.
            new &= ((bits & mask) != 0) | (np.maximum(one, other) >= earlier)
        return first[new], second[new]
