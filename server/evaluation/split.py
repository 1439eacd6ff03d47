"""Score and floor on equal numbers of images: which rows of the synthetic and the reference set are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from polyclinic.common.data.holdout import position


class EqualN(NamedTuple):
    """Which rows a score uses, as many on both sides as the floor will use on each of its halves.

    Attributes:
        synthetic: n row numbers of the synthetic features.
        reference: n row numbers of the reference features; with a floor, from the floor's first half.
        has_floor: Whether the reference is large enough for a floor at this n.
    """

    synthetic: list[int]
    reference: list[int]
    has_floor: bool


T = TypeVar("T")
Metric = Callable[[Tensor, Tensor, Sequence[str], Sequence[str]], T]


def equal_n(
    synthetic_groups: Sequence[str], reference_groups: Sequence[str], key: str, minimum: int
) -> EqualN:
    """Choose the rows of score and floor so that all three sets hold the same number of images.

    Both samples are cut deterministically. The reference is cut by whole patients (only the last
    one is split), from the same half that the floor uses, so score and floor share their reference.
    Synthetic images are cut evenly over prompts: leaving whole prompts out would change what was
    asked for, and so what is compared.

    Args:
        synthetic_groups: Prompt of each synthetic image.
        reference_groups: Patient of each reference image.
        key: Name of the split, for the keyed hash.
        minimum: Fewest images (and three patients) a half must offer for a floor.
    """
    first, second = _halves(reference_groups, key)
    n = min(len(synthetic_groups), len(first), len(second))
    patients = min(len({reference_groups[row] for row in half}) for half in (first, second))
    if n >= minimum and patients >= 3:
        chosen, has_floor = _whole_groups(first, reference_groups, n, key), True
    else:
        n = min(len(synthetic_groups), len(reference_groups))
        everything = list(range(len(reference_groups)))
        chosen, has_floor = _whole_groups(everything, reference_groups, n, key), False
    return EqualN(_evenly(synthetic_groups, n, key), chosen, has_floor)


def floor(reference: Tensor, groups: Sequence[str], key: str, n: int, metric: Metric[T]) -> T:
    """Measure two patient-disjoint halves of the reference against each other at n images each.

    This is what the metric gives for a perfect generator at this n.

    Args:
        reference: Features of the reference, [m, d].
        groups: Patient of each row.
        key: Name of the split, for the keyed hash.
        n: Images a half; at most what the smaller half holds.
        metric: Called as metric(x, y, x_groups, y_groups).

    Raises:
        ValueError: A half holds fewer than n images.
    """
    first, second = _halves(groups, key)
    if min(len(first), len(second)) < n:
        raise ValueError(f"the halves hold {len(first)} and {len(second)} images, fewer than n = {n}")
    a, b = _whole_groups(first, groups, n, key), _whole_groups(second, groups, n, key)
    return metric(reference[b], reference[a], [groups[i] for i in b], [groups[i] for i in a])


def _halves(groups: Sequence[str], key: str) -> tuple[list[int], list[int]]:
    """Deal whole groups, in the order of their keyed hash, to the half with fewer rows so far.

    Dealing keeps the halves equal where a few patients hold many images. The reference is public, so
    a patient's half may depend on the others.
    """
    sizes = Counter(groups)
    load, side = [0, 0], {}
    for group in sorted(sizes, key=lambda g: (position(g, key), g)):
        side[group] = int(load[1] < load[0])
        load[side[group]] += sizes[group]
    rows = range(len(groups))
    return [i for i in rows if side[groups[i]] == 0], [i for i in rows if side[groups[i]] == 1]


def _whole_groups(rows: Sequence[int], groups: Sequence[str], n: int, key: str) -> list[int]:
    """Take n of the rows, group after group in hash order; only the last group may be split."""
    place = {group: position(group, f"{key}/order") for group in {groups[row] for row in rows}}
    return sorted(sorted(rows, key=lambda row: (place[groups[row]], groups[row], row))[:n])


def _evenly(groups: Sequence[str], n: int, key: str) -> list[int]:
    """Take n rows, as many from each group as possible: all first rows, then all second rows, ..."""
    place = {group: position(group, f"{key}/order") for group in set(groups)}
    seen: dict[str, int] = {}
    ranked = []
    for row, group in enumerate(groups):
        ranked.append((seen.setdefault(group, 0), place[group], group, row))
        seen[group] += 1
    return sorted(row for *_, row in sorted(ranked)[:n])
