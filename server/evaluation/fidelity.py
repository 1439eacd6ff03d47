"""Distances between two sets of image features: pure functions on tensors, in float64.

"Group" is what is independent: the patient of a real image, the prompt of a synthetic one. Formulas are
in docs/evaluation.md; tests compare them with torchmetrics and with plain loops.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.server.evaluation.jackknife import (
    BLOCKS,
    Jackknifed,
    deal_into_blocks,
    group_ids,
    sum_by_group,
    with_interval,
)

# Rows of a kernel matrix held at once: bounds memory at 2048 x n x 8 bytes.
ROWS_AT_ONCE = 2048
# Bandwidth and scale of the CMMD paper's reference implementation, for features of norm 1.
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0

Kernel = Callable[[Tensor], Tensor]  # from dot products, elementwise


class Moments(NamedTuple):
    """What a Frechet distance needs to know of a sample; samples of any size merge.

    Attributes:
        n: Rows.
        mean: [d], float64.
        scatter: Sum of outer products of deviations from the mean, [d, d].
    """

    n: int
    mean: Tensor
    scatter: Tensor


def moments(x: Tensor) -> Moments:
    """Moments of features [n, d]."""
    x = x.double()
    mean = x.mean(dim=0)
    centred = x - mean
    return Moments(len(x), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two samples together (Chan, Golub & LeVeque 1979): no cancellation, in any order."""
    n, shift = a.n + b.n, b.mean - a.mean
    scatter = a.scatter + b.scatter + torch.outer(shift, shift) * (a.n * b.n / n)
    return Moments(n, a.mean + shift * (b.n / n), scatter)


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """Frechet distance between Gaussians with these moments; see `frechet_distance`."""
    first, second = a.scatter / (a.n - 1), b.scatter / (b.n - 1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt()  # root root^T = first
    root_trace = torch.linalg.eigvalsh(root.T @ second @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * root_trace
    return float(distance)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two samples.

    ``|mx - my|^2 + tr(Sx) + tr(Sy) - 2 tr((Sx Sy)^(1/2))`` with unbiased covariances. The value is
    biased upwards in small samples: compare it only at equal n, with a floor beside it.

    Args:
        x: Features of the first sample, [n, d], n >= 2.
        y: Features of the second sample, [m, d], m >= 2.
    """
    return _frechet(x.double(), y.double(), precise=True)


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
    x: Tensor, y: Tensor, x_groups: Sequence[str], y_groups: Sequence[str], blocks: int = BLOCKS
) -> Jackknifed:
    """Frechet distance with a sampling interval at this n, by a delete-a-block jackknife.

    As `block_jackknife` does it; where both samples outnumber the features, each block's moments are
    taken once and merged without each block in turn.

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
    x_blocks, y_blocks = (
        deal_into_blocks(group_ids(groups, len(rows)), blocks)
        for rows, groups in ((x, x_groups), (y, y_groups))
    )
    if min(len(x), len(y)) > x.shape[1]:
        x_whole, y_whole = moments(x), moments(y)
        x_left = [frechet_of_moments(rest, y_whole) for rest in _without_each(x, x_blocks)]
        y_left = [frechet_of_moments(x_whole, rest) for rest in _without_each(y, y_blocks)]
    else:
        x_left = [_frechet(x[x_blocks != b], y, precise=False) for b in range(int(x_blocks.max()) + 1)]
        y_left = [_frechet(x, y[y_blocks != b], precise=False) for b in range(int(y_blocks.max()) + 1)]
    return with_interval(
        _frechet(x, y, precise=True),
        (torch.tensor(x_left, dtype=torch.float64), torch.bincount(x_blocks).double()),
        (torch.tensor(y_left, dtype=torch.float64), torch.bincount(y_blocks).double()),
    )


def _without_each(x: Tensor, blocks: Tensor) -> list[Moments]:
    """Moments of everything but each block in turn."""
    parts = [moments(x[blocks == block]) for block in range(int(blocks.max()) + 1)]
    return [functools.reduce(merge, parts[:i] + parts[i + 1 :]) for i in range(len(parts))]


def grouped_kid(x: Tensor, y: Tensor, x_groups: Sequence[str], y_groups: Sequence[str]) -> Jackknifed:
    """Kernel distance (KID, 1801.01401): `grouped_mmd` with the kernel ``(a.b / d + 1)^3``.

    Args:
        x: Features of the first sample, [n, d].
        y: Features of the second sample, [m, d].
        x_groups: Group (patient or prompt) of each row of x.
        y_groups: Group of each row of y.

    Raises:
        ValueError: A side has fewer than three groups.
    """
    width = x.shape[1]
    return grouped_mmd(x, y, x_groups, y_groups, lambda dots: (dots / width + 1) ** 3)


def grouped_cmmd(
    x: Tensor, y: Tensor, x_groups: Sequence[str], y_groups: Sequence[str], sigma: float = CMMD_SIGMA
) -> Jackknifed:
    """CMMD (2401.09603) in its unbiased form, on any features: `grouped_mmd` with a Gaussian kernel.

    Rows are scaled to norm 1; ``k(a, b) = exp(-|a - b|^2 / (2 sigma^2))``; the result is multiplied by
    1000, as the paper's is. The paper takes CLIP features and the biased form.

    Args:
        x: Features of the first sample, [n, d].
        y: Features of the second sample, [m, d].
        x_groups: Group (patient or prompt) of each row of x.
        y_groups: Group of each row of y.
        sigma: Bandwidth.

    Raises:
        ValueError: A side has fewer than three groups.
    """
    unit_x, unit_y = (F.normalize(rows.double(), dim=1) for rows in (x, y))
    # For unit vectors |a - b|^2 = 2 - 2 a.b.
    found = grouped_mmd(unit_x, unit_y, x_groups, y_groups, lambda dots: ((dots - 1) / sigma**2).exp())
    value, error, degrees, low, high = found
    scale = CMMD_SCALE
    return Jackknifed(scale * value, scale * error, degrees, scale * low, scale * high)


def grouped_mmd(
    x: Tensor, y: Tensor, x_groups: Sequence[str], y_groups: Sequence[str], kernel: Kernel
) -> Jackknifed:
    """Squared maximum mean discrepancy that leaves out pairs from the same group.

    The U-statistic ``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)``. Means within a sample run over
    pairs from different groups only: two images of one patient are alike for a reason that has nothing to
    do with the generator. Unbiased at every n, so it may be slightly negative. The interval leaves out one
    group at a time on each side (exact refits, from sums by group).

    Args:
        x: Features of the first sample, [n, d].
        y: Features of the second sample, [m, d].
        x_groups: Group (patient or prompt) of each row of x.
        y_groups: Group of each row of y.
        kernel: From dot products to kernel values.

    Raises:
        ValueError: A side has fewer than three groups.
    """
    x, y = x.double(), y.double()
    x_ids, y_ids = group_ids(x_groups, len(x)), group_ids(y_groups, len(y))
    x_sizes, y_sizes = torch.bincount(x_ids).double(), torch.bincount(y_ids).double()
    n, m = float(len(x)), float(len(y))

    x_sums, _ = _kernel_sums(x, x, x_ids, kernel)
    y_sums, _ = _kernel_sums(y, y, y_ids, kernel)
    x_within, x_within_left = _within(sum_by_group(x_sums, x_ids), x_sizes)
    y_within, y_within_left = _within(sum_by_group(y_sums, y_ids), y_sizes)
    x_across, y_across = _kernel_sums(x, y, None, kernel)
    across = x_across.sum()
    x_across_left = (across - sum_by_group(x_across, x_ids)) / ((n - x_sizes) * m)
    y_across_left = (across - sum_by_group(y_across, y_ids)) / (n * (m - y_sizes))

    value = x_within + y_within - 2 * across / (n * m)
    return with_interval(
        float(value),
        (x_within_left + y_within - 2 * x_across_left, x_sizes),
        (y_within_left + x_within - 2 * y_across_left, y_sizes),
    )


def _kernel_sums(a: Tensor, b: Tensor, ids: Tensor | None, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Row sums [n] and column sums [m] of a kernel matrix, in slabs of rows.

    With ids (a and b are then the same sample), pairs of the same group count zero.
    """
    rows, columns = [], torch.zeros(len(b), dtype=torch.float64)
    for start in range(0, len(a), ROWS_AT_ONCE):
        slab = slice(start, start + ROWS_AT_ONCE)
        values = kernel(a[slab] @ b.T)
        if ids is not None:
            values.masked_fill_(ids[slab, None] == ids[None, :], 0.0)
        rows.append(values.sum(dim=1))
        columns += values.sum(dim=0)
    return torch.cat(rows), columns


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
