"""Do the images differ from each other? The Vendi score, and MS-SSIM between draws of one prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.server.evaluation.jackknife import (
    Jackknifed,
    block_jackknife,
    group_ids,
    sum_by_group,
    with_interval,
)

# Gaussian window and constants of Wang, Simoncelli & Bovik 2003, for pixels in [0, 1].
WINDOW, WINDOW_SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
LARGEST_SIDE = 256
PAIRS_AT_ONCE = 64


def vendi_score(x: Tensor, groups: Sequence[str]) -> Jackknifed:
    """Effective number of different images (Friedman & Dieng 2023, 2210.02410), 1 to n.

    ``exp(-sum l log l)`` over the eigenvalues l of K / n, K being the matrix of cosines. The interval is a
    sampling interval at this n.

    Args:
        x: Features, [n, d].
        groups: Group of each row.

    Raises:
        ValueError: Fewer than three groups.
    """
    unit = F.normalize(x.double(), dim=1)

    def statistic(keep: Tensor) -> Tensor:
        rows = unit[keep]
        # K and its other side have the same non-zero eigenvalues.
        matrix = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
        values = (torch.linalg.eigvalsh(matrix) / len(rows)).clamp_min(1e-300)
        return (-(values * values.log()).sum()).exp()[None]

    return block_jackknife(statistic, groups)[0]


def luminance(images: Tensor) -> Tensor:
    """RGB [N, 3, H, W] in [0, 1] to grey [N, 1, h, w], shrunk to a short side of at most 256 px."""
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    grey = (images.float() * weights).sum(dim=1, keepdim=True)
    short = min(grey.shape[-2:])
    if short <= LARGEST_SIDE:
        return grey
    size = [round(side * LARGEST_SIDE / short) for side in grey.shape[-2:]]
    return F.interpolate(grey, size=size, mode="bilinear", antialias=True)


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale structural similarity of pairs of grey images; [N, 1, H, W] in [0, 1] to [N].

    Five scales at 176 px and above; below, as many as leave the window room, with the first weights scaled
    to sum 1. Negative contrast terms count zero.

    Raises:
        ValueError: The images are smaller than the window.
    """
    scales = scales_of(min(a.shape[-2:]))
    weights = torch.tensor(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    product = torch.ones(len(a))
    for scale, weight in enumerate(weights.tolist()):
        similarity, contrast = _ssim(a, b)
        term = similarity if scale == scales - 1 else contrast
        product = product * term.clamp_min(0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product


def scales_of(side: int) -> int:
    """Scales at which the window still fits an image of this short side."""
    if side < WINDOW:
        raise ValueError(f"MS-SSIM needs images of at least {WINDOW} px, got {side}")
    return min(len(SCALE_WEIGHTS), int(math.log2(side / WINDOW)) + 1)


def _ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean structural similarity and mean contrast-structure term of each pair, [N] each."""
    stacked = torch.cat([a, b, a * a, b * b, a * b])
    place = torch.arange(WINDOW) - WINDOW // 2
    line = torch.exp(-(place**2) / (2 * WINDOW_SIGMA**2))
    line = line / line.sum()
    blurred = F.conv2d(F.conv2d(stacked, line[None, None, :, None]), line[None, None, None, :])
    a_mean, b_mean, a_square, b_square, ab = blurred.chunk(5)
    covariance = ab - a_mean * b_mean
    variances = a_square - a_mean**2 + b_square - b_mean**2
    contrast = (2 * covariance + C2) / (variances + C2)
    light = (2 * a_mean * b_mean + C1) / (a_mean**2 + b_mean**2 + C1)
    return (light * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def mean_similarity(grey: Tensor, pairs: Sequence[tuple[int, int]], groups: Sequence[str]) -> Jackknifed:
    """Mean MS-SSIM over pairs of images, each pair counted in its group, by a delete-one-group jackknife.

    Args:
        grey: [N, 1, H, W] in [0, 1].
        pairs: Row numbers.
        groups: Group of each pair.

    Raises:
        ValueError: Fewer than three groups.
    """
    parts = []
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        first, second = (list(rows) for rows in zip(*pairs[start : start + PAIRS_AT_ONCE], strict=True))
        parts.append(ms_ssim(grey[first], grey[second]))
    values = torch.cat(parts).double()
    ids = group_ids(groups, len(values))
    sizes = torch.bincount(ids).double()
    left = (values.sum() - sum_by_group(values, ids)) / (len(values) - sizes)
    return with_interval(float(values.mean()), (left, sizes))


def pairs_within(groups: Sequence[str]) -> list[tuple[int, int]]:
    """Pair each image with the next one of its group, in a ring: as many pairs as images (one for two)."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return [pair for members in rows.values() for pair in _ring(members)]


def _ring(members: list[int]) -> Iterable[tuple[int, int]]:
    following = members[1:] + members[:1] if len(members) > 2 else members[1:]
    return zip(members, following, strict=False)


def pairs_between(groups: Sequence[str]) -> list[tuple[int, int]]:
    """Pair each image with one of another group: half the list further on, in the order of groups."""
    order = sorted(range(len(groups)), key=lambda row: groups[row])
    half = len(order) // 2
    pairs = [(row, order[(place + half) % len(order)]) for place, row in enumerate(order)]
    return [(a, b) for a, b in pairs if groups[a] != groups[b]]
