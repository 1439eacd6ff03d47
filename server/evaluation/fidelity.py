"""Distances between two sets of image features: pure functions on tensors, in float64.

Patients have several images and prompts several draws, so "group" below is what is independent:
the patient of a real image, the prompt of a synthetic one. Formulas and their checks are in
facts/evaluation.md; tests compare them with torchmetrics and with plain loops.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from scipy import stats
from torch import Tensor

from polyclinic.common.data.holdout import position

# Rows of a kernel matrix held at once: bounds memory at 2048 x n x 8 bytes.
ROWS_AT_ONCE = 2048
# Blocks of groups on each side in the jackknife of the Frechet distance.
FRECHET_BLOCKS = 10


class Distance(NamedTuple):
    """A distance with its sampling error.

    Attributes:
        value: The estimate.
        standard_error: Jackknife standard error over the groups of both samples.
        degrees: Degrees of freedom of the t quantile (Welch-Satterthwaite).
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
    """

    value: float
    standard_error: float
    degrees: float
    low: float
    high: float


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


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two samples.

    ``|mx - my|^2 + tr(Sx) + tr(Sy) - 2 tr((Sx Sy)^(1/2))`` with unbiased covariances. The value is
    biased upwards in small samples: compare it only at equal n, with a floor beside it.

    Args:
        x: Features of the first sample, [n, d], n >= 2.
        y: Features of the second sample, [m, d], m >= 2.
    """
    x, y = x.double(), y.double()
    return _frechet(x, y, precise=True)


def _frechet(x: Tensor, y: Tensor, precise: bool) -> float:
    """Frechet distance; `precise=False` trades the last digits for speed (jackknife replicates)."""
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x_root, y_root = _covariance_root(x - x_mean), _covariance_root(y - y_mean)
    # Sx = A^T A and Sy = B^T B, so Sx Sy has the same non-zero eigenvalues as (A B^T)(A B^T)^T, and
    # the trace of its root is the sum of the singular values of A B^T. No matrix root is taken.
    cross = x_root @ y_root.T
    if precise and min(cross.shape) < x.shape[1]:
        root_trace = torch.linalg.svdvals(cross).sum()
    else:
        gram = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
        root_trace = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
    traces = x_root.square().sum() + y_root.square().sum()
    return float((x_mean - y_mean).square().sum() + traces - 2 * root_trace)


def _covariance_root(centred: Tensor) -> Tensor:
    """Return R with R^T R = covariance, with at most d rows; [min(n, d), d]."""
    scaled = centred / math.sqrt(len(centred) - 1)
    if len(scaled) < scaled.shape[1]:
        return scaled
    root: Tensor = torch.linalg.qr(scaled, mode="r").R
    return root


def grouped_frechet(
    x: Tensor, y: Tensor, x_groups: Sequence[str], y_groups: Sequence[str], blocks: int = FRECHET_BLOCKS
) -> Distance:
    """Frechet distance with a sampling interval at this n, by a delete-a-block jackknife.

    Groups are dealt into blocks of about equal numbers of images and each block is left out in
    turn. The interval speaks of the sampling spread at this n and leaves the bias in. Not a
    bootstrap: repeated images act like a smaller n and push every resample upwards.

    Args:
        x: Features of the first sample, [n, d].
        y: Features of the second sample, [m, d].
        x_groups: Group of each row of x.
        y_groups: Group of each row of y.
        blocks: Blocks a side; fewer where there are fewer groups.

    Raises:
        ValueError: A side has fewer than three groups.
    """
    x, y = x.double(), y.double()
    value = _frechet(x, y, precise=True)
    x_blocks = _deal_into_blocks(_group_ids(x_groups, len(x)), blocks)
    y_blocks = _deal_into_blocks(_group_ids(y_groups, len(y)), blocks)
    x_left = [_frechet(x[x_blocks != b], y, precise=False) for b in range(int(x_blocks.max()) + 1)]
    y_left = [_frechet(x, y[y_blocks != b], precise=False) for b in range(int(y_blocks.max()) + 1)]
    sizes = [torch.bincount(dealt).double() for dealt in (x_blocks, y_blocks)]
    x_values, y_values = (torch.tensor(left, dtype=torch.float64) for left in (x_left, y_left))
    return _with_interval(value, x_values, y_values, *sizes)


def grouped_kid(x: Tensor, y: Tensor, x_groups: Sequence[str], y_groups: Sequence[str]) -> Distance:
    """Kernel distance (KID) that leaves out pairs from the same group, with a jackknife interval.

    The U-statistic ``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`` with ``k(a, b) = (a.b/d + 1)^3``.
    Means within a sample run over pairs from different groups only: two images of one patient are
    alike for a reason that has nothing to do with the generator. Unbiased at every n, so it may be
    slightly negative. The interval leaves out one group at a time on each side.

    Args:
        x: Features of the first sample, [n, d].
        y: Features of the second sample, [m, d].
        x_groups: Group (patient or prompt) of each row of x.
        y_groups: Group of each row of y.

    Raises:
        ValueError: A side has fewer than three groups.
    """
    x, y = x.double(), y.double()
    x_ids, y_ids = _group_ids(x_groups, len(x)).to(x.device), _group_ids(y_groups, len(y)).to(y.device)
    x_sizes, y_sizes = torch.bincount(x_ids).double(), torch.bincount(y_ids).double()
    n, m = float(len(x)), float(len(y))

    x_sums, _ = _kernel_sums(x, x, x_ids)
    y_sums, _ = _kernel_sums(y, y, y_ids)
    x_within, x_within_left = _within(_sum_by_group(x_sums, x_ids), x_sizes)
    y_within, y_within_left = _within(_sum_by_group(y_sums, y_ids), y_sizes)
    x_across, y_across = _kernel_sums(x, y, None)
    across = x_across.sum()
    x_across_left = (across - _sum_by_group(x_across, x_ids)) / ((n - x_sizes) * m)
    y_across_left = (across - _sum_by_group(y_across, y_ids)) / (n * (m - y_sizes))

    value = x_within + y_within - 2 * across / (n * m)
    return _with_interval(
        float(value),
        (x_within_left + y_within - 2 * x_across_left).cpu(),
        (y_within_left + x_within - 2 * y_across_left).cpu(),
        x_sizes.cpu(),
        y_sizes.cpu(),
    )


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


def _group_ids(groups: Sequence[str], rows: int) -> Tensor:
    """Number the groups 0, 1, ... in sorted order; [n], int64. Needs at least three groups."""
    if len(groups) != rows:
        raise ValueError(f"{len(groups)} groups for {rows} rows")
    names = {name: i for i, name in enumerate(sorted(set(groups)))}
    if len(names) < 3:
        raise ValueError(f"a jackknife needs at least three groups, got {len(names)}")
    return torch.tensor([names[group] for group in groups])


def _deal_into_blocks(ids: Tensor, blocks: int) -> Tensor:
    """Deal groups, largest first, to the block with the fewest images; block of each row, [n]."""
    sizes = torch.bincount(ids).tolist()
    load = [0] * min(blocks, len(sizes))
    block_of = [0] * len(sizes)
    for group in sorted(range(len(sizes)), key=lambda g: (-sizes[g], g)):
        lightest = load.index(min(load))
        block_of[group] = lightest
        load[lightest] += sizes[group]
    return torch.tensor(block_of)[ids]


def _kernel_sums(a: Tensor, b: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row sums [n] and column sums [m] of the cubic kernel matrix, in slabs of rows.

    With ids (a and b are then the same sample), pairs of the same group count zero.
    """
    rows, columns = [], torch.zeros(len(b), dtype=torch.float64, device=b.device)
    for start in range(0, len(a), ROWS_AT_ONCE):
        slab = slice(start, start + ROWS_AT_ONCE)
        kernel = (a[slab] @ b.T / a.shape[1] + 1) ** 3
        if ids is not None:
            kernel.masked_fill_(ids[slab, None] == ids[None, :], 0.0)
        rows.append(kernel.sum(dim=1))
        columns += kernel.sum(dim=0)
    return torch.cat(rows), columns


def _sum_by_group(values: Tensor, ids: Tensor) -> Tensor:
    """Add up the values of each group; [groups]."""
    return torch.zeros(int(ids.max()) + 1, dtype=values.dtype, device=values.device).index_add(0, ids, values)


def _within(sums: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean kernel over pairs from different groups, and the same without each group in turn.

    Args:
        sums: For each group, the kernel summed over its images and all images of other groups.
        sizes: Images in each group.
    """
    n = sizes.sum()
    total, pairs = sums.sum(), n.square() - sizes.square().sum()
    # A group is in its pairs twice, as the first image and as the second.
    return total / pairs, (total - 2 * sums) / (pairs - 2 * sizes * (n - sizes))


def _with_interval(
    value: float, x_left: Tensor, y_left: Tensor, x_sizes: Tensor, y_sizes: Tensor
) -> Distance:
    """Two-sample jackknife: variances of both sides add up; t quantile by Welch-Satterthwaite.

    Args:
        value: The estimate from everything.
        x_left: The estimate without each group of x in turn, [groups of x].
        y_left: The same for y.
        x_sizes: Images in each group of x; unequal groups carry fewer degrees of freedom.
        y_sizes: The same for y.
    """
    variances, degrees = [], []
    for left, sizes in ((x_left, x_sizes), (y_left, y_sizes)):
        count = len(left)
        variances.append(float((left - left.mean()).square().sum() * (count - 1) / count))
        degrees.append(max(1.0, float(sizes.sum().square() / sizes.square().sum()) - 1))
    variance = sum(variances)
    if variance == 0:
        return Distance(value, 0.0, min(degrees), value, value)
    freedom = variance**2 / sum(v**2 / d for v, d in zip(variances, degrees, strict=True))
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Distance(value, math.sqrt(variance), freedom, value - reach, value + reach)
