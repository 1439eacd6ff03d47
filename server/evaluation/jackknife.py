"""Sampling errors of any two-sample number, by leaving out patients and prompts.

Patients have several images and prompts several draws, so a "group" is what is independent: the
patient of a real image, the prompt of a synthetic one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

# Blocks of groups on each side, where a number is too dear to be taken again without each single group.
BLOCKS = 10


class Jackknifed(NamedTuple):
    """A number with its sampling error.

    Attributes:
        value: The estimate.
        standard_error: Jackknife standard error over the groups of all samples.
        degrees: Degrees of freedom of the t quantile (Welch-Satterthwaite).
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
    """

    value: float
    standard_error: float
    degrees: float
    low: float
    high: float


def group_ids(groups: Sequence[str], rows: int) -> Tensor:
    """Number the groups 0, 1, ... in sorted order; [n], int64. Needs at least three groups."""
    if len(groups) != rows:
        raise ValueError(f"{len(groups)} groups for {rows} rows")
    names = {name: i for i, name in enumerate(sorted(set(groups)))}
    if len(names) < 3:
        raise ValueError(f"a jackknife needs at least three groups, got {len(names)}")
    return torch.tensor([names[group] for group in groups])


def deal_into_blocks(ids: Tensor, blocks: int) -> Tensor:
    """Deal groups, largest first, to the block with the fewest images; block of each row, [n]."""
    sizes = torch.bincount(ids).tolist()
    load = [0] * min(blocks, len(sizes))
    block_of = [0] * len(sizes)
    for group in sorted(range(len(sizes)), key=lambda g: (-sizes[g], g)):
        lightest = load.index(min(load))
        block_of[group] = lightest
        load[lightest] += sizes[group]
    return torch.tensor(block_of)[ids]


def sum_by_group(values: Tensor, ids: Tensor) -> Tensor:
    """Add up the values of each group; [groups]."""
    return torch.zeros(int(ids.max()) + 1, dtype=values.dtype, device=values.device).index_add(0, ids, values)


def with_interval(value: float, *sides: tuple[Tensor, Tensor]) -> Jackknifed:
    """Jackknife of one or more independent samples: variances add up; t quantile by Welch-Satterthwaite.

    Args:
        value: The estimate from everything.
        sides: For each sample, the estimate without each of its groups (or blocks) in turn, [groups],
            and the images in each, [groups]; unequal groups carry fewer degrees of freedom.
    """
    variances, degrees = [], []
    for left, sizes in sides:
        count = len(left)
        variances.append(float((left - left.mean()).square().sum() * (count - 1) / count))
        degrees.append(max(1.0, float(sizes.sum().square() / sizes.square().sum()) - 1))
    variance = sum(variances)
    if variance == 0:
        return Jackknifed(value, 0.0, min(degrees), value, value)
    freedom = variance**2 / sum(v**2 / d for v, d in zip(variances, degrees, strict=True))
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Jackknifed(value, math.sqrt(variance), freedom, value - reach, value + reach)


def block_jackknife(
    statistic: Callable[..., Tensor], *groups: Sequence[str], blocks: int = BLOCKS
) -> list[Jackknifed]:
    """Sampling intervals at this n by a delete-a-block jackknife.

    Groups are dealt into blocks of about equal numbers of images and each block is left out in turn. The
    interval speaks of the sampling spread at this n and leaves the bias of this n in. Not a bootstrap:
    repeated images act like a smaller n and push every resample one way.

    Args:
        statistic: Called with a boolean mask of the rows to keep for each sample; returns [k] numbers.
        groups: For each sample, the group of each row.
        blocks: Blocks a sample; fewer where there are fewer groups.

    Returns:
        One entry for each of the k numbers.

    Raises:
        ValueError: A sample has fewer than three groups.
    """
    dealt = [deal_into_blocks(group_ids(each, len(each)), blocks) for each in groups]
    whole = [torch.ones(len(each), dtype=torch.bool) for each in groups]
    values = statistic(*whole)
    left, sizes = [], []
    for side, block_of in enumerate(dealt):
        kept = [
            statistic(*whole[:side], block_of != block, *whole[side + 1 :])
            for block in range(int(block_of.max()) + 1)
        ]
        left.append(torch.stack(kept).double())
        sizes.append(torch.bincount(block_of).double())
    return [
        with_interval(float(value), *((each[:, i], size) for each, size in zip(left, sizes, strict=True)))
        for i, value in enumerate(values)
    ]


def score_interval(found: Jackknifed, rows: int, groups: int, *, share: bool = True) -> Jackknifed:
    """Interval of a share, or of a mean that cannot be negative, which stays where such a number can be.

    Wilson's score interval (1927) at the effective sample size that the jackknife's error implies (Korn &
    Graubard 1998), with its t quantile: it is never without width, for none of n is not never.

    Args:
        found: The number with its jackknife error.
        rows: Images behind it: it cannot know more than these would.
        groups: Independent groups, which count where no replicate differs.
        share: In [0, 1], with a binomial's variance; otherwise in [0, inf), with a Poisson's.
    """
    value = found.value
    spread = value * (1 - value) if share else value
    variance = found.standard_error**2
    n = min(spread / variance, float(rows)) if variance > 0 and spread > 0 else float(groups)
    t = float(stats.t.ppf(0.975, found.degrees))
    shrink = 1 + t * t / n if share else 1.0
    middle = (value + t * t / (2 * n)) / shrink
    reach = t / shrink * math.sqrt(spread / n + (t / (2 * n)) ** 2)
    low, high = max(0.0, middle - reach), middle + reach
    return found._replace(low=min(low, value), high=max(min(high, 1.0) if share else high, value))
