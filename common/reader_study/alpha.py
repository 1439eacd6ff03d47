"""Krippendorff's alpha: agreement of any number of raters, with missing answers, corrected for chance.

K. Krippendorff, "Content Analysis", 4th edition, chapter 12. alpha = 1 - D_o / D_e with D_o the mean
difference between two raters of one unit, and D_e between any two answers of all pairable ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Scale = Literal["nominal", "ordinal", "interval"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Alpha:
    """Alpha with its bootstrap interval.

    Attributes:
        value: 1 is perfect agreement, 0 what chance gives, below 0 systematic disagreement.
        low: End of the 95 % interval, by resampling units.
        high: Its other end.
        units: Units with at least two answers.
    """

    value: float
    low: float
    high: float
    units: int


def krippendorff(answers: Array, scale: Scale, levels: int) -> Alpha | None:
    """Compute alpha over raters and units.

    Args:
        answers: Levels 1 to `levels`, [raters, units]; NaN where one is missing.
        scale: How far two levels are apart.
        levels: How many there are.

    Returns:
        None where alpha is not defined: nobody answered a unit twice, or all answers are the same.
    """
    counts = np.stack([(answers == level).sum(axis=0) for level in range(1, levels + 1)], axis=1).astype(
        float
    )
    counts = counts[counts.sum(axis=1) >= 2]
    if not len(counts):
        return None
    value = _alpha(_coincidences(counts).sum(axis=0)[None], scale)[0]
    if np.isnan(value):
        return None
    rng = np.random.default_rng(len(counts))
    weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES).astype(float)
    drawn = np.tensordot(weights, _coincidences(counts), axes=1)
    # Where a resample has one answer only, raters agree in it.
    low, high = np.quantile(np.nan_to_num(_alpha(drawn, scale), nan=1.0), (0.025, 0.975))
    return Alpha(float(value), float(low), float(high), len(counts))


def _coincidences(counts: Array) -> Array:
    """Pairs of levels within each unit, [units, levels, levels], each unit's weighted by 1/(answers - 1)."""
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(counts.shape[1])
    return np.asarray(pairs / (counts.sum(axis=1) - 1)[:, None, None])


def _alpha(coincidences: Array, scale: Scale) -> Array:
    """Alpha of each coincidence matrix, [n] of [n, levels, levels]; NaN where it is not defined."""
    totals = coincidences.sum(axis=2)
    n = totals.sum(axis=1)
    apart = _differences(totals, scale)
    observed = (coincidences * apart).sum(axis=(1, 2))
    expected = (totals[:, :, None] * totals[:, None, :] * apart).sum(axis=(1, 2)) / (n - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(expected > 0, 1 - observed / expected, np.nan))


def _differences(totals: Array, scale: Scale) -> Array:
    """Squared difference of every two levels, [n or 1, levels, levels]."""
    levels = np.arange(totals.shape[1], dtype=float)
    if scale == "nominal":
        return np.asarray(1 - np.eye(len(levels)))[None]
    # An ordinal level stands where the middle of its answers ranks.
    places = levels[None] if scale == "interval" else totals.cumsum(axis=1) - totals / 2
    return np.asarray((places[:, :, None] - places[:, None, :]) ** 2)
