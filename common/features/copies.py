"""More near copies than chance explains? Exact tests on counts of patients; no image is looked at here.

Three questions, each at a third of the alarm's chance (Bonferroni):

* By features, and by pixels: more patients than the public scale explains? How often chance finds a patient
  is not known exactly but calibrated on K public patients: below their k-th smallest distance an image of
  a further patient falls with a chance that is itself Beta(k, K + 1 - k), so the count is beta-binomial
  (Wilks 1941; the conditional coverage of conformal prediction, Vovk 2012, arXiv 1209.2673); with several
  images a public patient, shares of them vary less than that. Patients who
  were held out can excuse copies where people here are nearer to the draws than the public is, but only as
  far as they prove it: by the lower Clopper-Pearson bound of their rate. One of two held out proves 2.5 %.
* A larger share of those trained on than of those held out? Fisher's exact test: who is held out is a hash's
  choice, so whatever the scale is worth, without memory the finds fall on both as if dealt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from polyclinic.common.study import NearScale

ALARM = 1e-3  # chance of a false alarm
DOUBT = 0.05  # that the rate of those held out is below what excuses
_GRID = np.linspace(0, 1, 5001) ** 2  # finer where rates are small


class Tally(NamedTuple):
    """Patients of a group, and of how many a near copy was drawn.

    Attributes:
        patients: In all.
        features: Found near by features.
        pixels: Found near by pixels.
        either: Found near by either.
    """

    patients: int
    features: int
    pixels: int
    either: int


def chance_of(trained: Tally, held_out: Tally, sizes: Sequence[int], scale: NearScale) -> float:
    """Bound the chance of so many near copies of patients who were trained on, had nothing been memorised.

    Args:
        trained: Patients trained on.
        held_out: Patients kept out.
        sizes: Images of each patient trained on.
        scale: Public.
    """
    by_scale = [
        _by_scale(found, sizes, scale, _proven(excuse, held_out.patients))
        for found, excuse in ((trained.features, held_out.features), (trained.pixels, held_out.pixels))
    ]
    both = trained.patients + held_out.patients
    by_held_out = stats.hypergeom.sf(
        trained.either - 1, both, trained.either + held_out.either, trained.patients
    )
    return min(1.0, 3 * min(*by_scale, float(by_held_out)))


def fewest_alarming(sizes: Sequence[int], held_out: int, scale: NearScale) -> int | None:
    """Fewest near copies of patients trained on that raise the alarm where nobody held out is found near.

    Args:
        sizes: Images of each patient trained on.
        held_out: Patients kept out.
        scale: Public.

    Returns:
        None where not even copies of all of them do.
    """

    def alarming(found: int) -> bool:
        trained = Tally(len(sizes), found, found, found)
        return chance_of(trained, Tally(held_out, 0, 0, 0), sizes, scale) < ALARM

    fewest = 1 + bisect_left(range(1, len(sizes) + 1), True, key=alarming)
    return fewest if fewest <= len(sizes) else None


def _by_scale(found: int, sizes: Sequence[int], scale: NearScale, excused: float) -> float:
    """Chance that one distance finds so many patients or more, none of whom was memorised.

    Given the rate per image, a patient's chance is at most images times as much, and the count's tail is at
    most that of equal chances (Hoeffding 1956). Summed over rates from above.
    """
    if not found:
        return 1.0
    known, rate = scale.patients + 1, scale.chance / scale.more
    weights = np.diff(stats.beta.cdf(_GRID, rate * known, (1 - rate) * known))
    rates = np.zeros_like(weights)
    for size, count in Counter(sizes).items():
        rates += count / len(sizes) * np.minimum(1, size * scale.more * _GRID[1:])
    return float(weights @ stats.binom.sf(found - 1, len(sizes), np.maximum(rates, excused)))


def _proven(found: int, patients: int) -> float:
    """Lower Clopper-Pearson bound of a rate."""
    return float(stats.beta.ppf(DOUBT, found, patients - found + 1)) if found else 0.0
