"""Near copies: distances to the nearest of many images, and the distance below which one is too near.

Two distances in [0, sqrt(2)], 0 for a copy. By features, sqrt(1 - cosine): it sees what an image shows.
By aligned pixels, sqrt(1 - r), r being the correlation of two thumbnails at the best of small shifts: it
does not see brightness or contrast, hardly noise, blur and JPEG, but a zoom of a tenth.

A near copy is nearer than images of *other patients* are to each other. How near that is comes from
public images alone (`threshold`). Such a distance finds gross copying; it does not measure the risk that a
patient's membership can be told (facts: near-copy distances do not predict it).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.refusals import BadInput

# Pixels a side of a thumbnail, and the largest shift in each direction: 6 % of the side.
SIDE = 48
REACH = 3
# Thumbnails are smoothed by this much, in their pixels: what shifts by parts of a pixel, noise, blur and JPEG
# change is mostly finer, and what tells two people apart is coarser.
SMOOTHING = 1.0
_AT_ONCE = 1024
# A pair this much nearer than a near copy is one by itself, however few there are. Distances to the nearest
# fall as r^D, D being the data's local dimension (Levina & Bickel 2005): at 5 or more (chest X-rays 7 to 24,
# phantoms 6 to 25), chance finds one image so near at most once in 1,000 that it finds near.
EXACT = 0.25

FEATURE_MEASURE = "features: sqrt(1 - cosine)"
PIXEL_MEASURE = (
    f"aligned pixels: sqrt(1 - correlation) of {SIDE} px luminance thumbnails, "
    f"smoothed by {SMOOTHING:g} px, best of shifts up to {REACH} px ({100 * REACH / SIDE:.0f} % of the side)"
)


class Nearest(NamedTuple):
    """The nearest target of each query.

    Attributes:
        distances: In [0, sqrt(2)], [n], float64.
        rows: Row number of that target, [n], int64.
    """

    distances: Tensor
    rows: Tensor


def thumbnails(images: Tensor) -> Tensor:
    """Shrink (or enlarge) images to what `nearest_by_pixels` compares.

    Args:
        images: RGB in [0, 1], [n, 3, H, W].

    Returns:
        Luminance (Rec. 601), smoothed, [n, SIDE, SIDE], float32.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images [n, 3, H, W], got {tuple(images.shape)}")
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    grey = (images.float() * weights[:, None, None]).sum(dim=1, keepdim=True)
    small = F.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    reach = round(3 * SMOOTHING)
    line = torch.exp(-((torch.arange(-reach, reach + 1, device=images.device) / SMOOTHING) ** 2) / 2)
    line = line / line.sum()
    padded = F.pad(small, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, line[None, None, None]), line[None, None, :, None])[:, 0]


def nearest_by_pixels(
    queries: Tensor, targets: Tensor, on_progress: Callable[[int, int], None] | None = None
) -> Nearest:
    """Find, for each query, the target that fits best after a shift and a change of brightness.

    The query's inner window is correlated with every window of the target as large as it, so that
    offset, gain and shifts up to `REACH` do not count. A constant image is like no other (distance 1).

    Args:
        queries: Thumbnails, [n, SIDE, SIDE].
        targets: Thumbnails, [m, SIDE, SIDE], m >= 1.
        on_progress: Called after each chunk with (queries done, queries in all).
    """
    for images in (queries, targets):
        if images.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"expected thumbnails [n, {SIDE}, {SIDE}], got {tuple(images.shape)}")
    inner = slice(REACH, SIDE - REACH)
    shifts = [(y, x) for y in range(2 * REACH + 1) for x in range(2 * REACH + 1)]
    wide = SIDE - 2 * REACH

    def correlations(some: Tensor, others: Tensor) -> Tensor:
        windows = _standard(some[:, inner, inner])
        best = torch.full((len(some), len(others)), -1.0, device=some.device)
        for y, x in shifts:
            best = torch.maximum(best, windows @ _standard(others[:, y : y + wide, x : x + wide]).T)
        return best

    return _nearest(queries, targets, correlations, on_progress)


def nearest_by_features(queries: Tensor, targets: Tensor) -> Nearest:
    """Find, for each query, the target whose features point in the most similar direction.

    Args:
        queries: Features, [n, d].
        targets: Features from the same extractor, [m, d], m >= 1.
    """
    if queries.ndim != 2 or targets.ndim != 2 or queries.shape[1] != targets.shape[1]:
        raise ValueError(f"features {tuple(queries.shape)} and {tuple(targets.shape)} do not fit together")

    def cosines(some: Tensor, others: Tensor) -> Tensor:
        # In float32 the cosine of a copy would miss 1 by more than near copies differ.
        return F.normalize(some.double(), dim=1) @ F.normalize(others.double(), dim=1).T

    return _nearest(queries, targets, cosines, None)


def threshold(distances: Tensor, patients: Sequence[str], alpha: float) -> float:
    """Distance below which an image of a patient who is not among the targets falls with chance <= alpha.

    The largest calibration distance t for which (1 + sum over the K patients of the share of a patient's
    images nearer than t) / (K + 1) <= alpha. If a further image comes from a further patient,
    exchangeable with these, P(distance < t) <= alpha, however many images each patient has: hierarchical
    conformal prediction (Lee, Barber & Willett 2023, arXiv 2306.06342).

    It holds for searches of as many targets as in the calibration. Among m' > m targets, the chance grows
    at most to alpha m' / m: ask for alpha m / m' there.

    Args:
        distances: To the nearest target, of images whose patients are not among the targets, [n].
        patients: Patient of each of them.
        alpha: Chance of a false find, per image.

    Raises:
        BadInput: Too few patients for so small an alpha (`smallest_alpha`).
    """
    if len(distances) != len(patients) or not bool(distances.isfinite().all()):
        raise ValueError(f"{len(patients)} patients for {tuple(distances.shape)} distances, all finite")
    sizes = Counter(patients)
    if alpha < smallest_alpha(patients):
        raise BadInput(
            f"a false-find chance of {alpha:g} needs {math.ceil(1 / alpha) - 1} public patients to calibrate "
            f"on, and there are {len(sizes)}; enlarge the reference or raise the chance"
        )
    order = distances.argsort(stable=True).tolist()
    spent, found, i = 1.0, 0.0, 0
    while i < len(order) and spent <= alpha * (len(sizes) + 1) + 1e-9:
        found = float(distances[order[i]])
        # Equal distances fall on the same side of any threshold.
        while i < len(order) and float(distances[order[i]]) == found:
            spent += 1 / sizes[patients[order[i]]]
            i += 1
    return found


def smallest_alpha(patients: Sequence[str]) -> float:
    """Smallest alpha that `threshold` can calibrate on these patients."""
    return 1 / (len(set(patients)) + 1)


def _nearest(
    queries: Tensor,
    targets: Tensor,
    likeness: Callable[[Tensor, Tensor], Tensor],
    on_progress: Callable[[int, int], None] | None,
) -> Nearest:
    """Search slab by slab, so that memory is bounded; `likeness` gives cosines or correlations."""
    if not len(targets):
        raise ValueError("there is nothing to search: no targets")
    if not bool(queries.isfinite().all()) or not bool(targets.isfinite().all()):
        raise ValueError("queries and targets must be finite")
    best = torch.full((len(queries),), -math.inf, dtype=torch.float64, device=queries.device)
    rows = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), _AT_ONCE):
        slab = slice(start, start + _AT_ONCE)
        for first in range(0, len(targets), _AT_ONCE):
            value, row = likeness(queries[slab], targets[first : first + _AT_ONCE]).double().max(dim=1)
            better = value > best[slab]
            best[slab] = torch.where(better, value, best[slab])
            rows[slab] = torch.where(better, row + first, rows[slab])
        if on_progress is not None:
            on_progress(min(start + _AT_ONCE, len(queries)), len(queries))
    return Nearest((1 - best).clamp_min(0).sqrt(), rows)


def _standard(windows: Tensor) -> Tensor:
    """Flatten windows [n, h, w] to rows of mean 0 and length 1, [n, h w]; constant ones become 0."""
    flat = windows.flatten(1)
    centred = flat - flat.mean(dim=1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    # What rounding leaves of a constant image is no content.
    return torch.where(length > 1e-4, centred / length.clamp_min(1e-12), torch.zeros_like(centred))
