"""How well readers tell two groups of images apart, with intervals.

A "signal" is a synthetic image; a hit is a synthetic image called synthetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Array = NDArray[np.float64]
TWO_SIDED = 0.975


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: The number.
        low: End of the interval.
        high: Its other end.
        se: Standard error; NaN for an interval that has none (Wilson).
        n: Answers behind it.
    """

    value: float
    low: float
    high: float
    se: float
    n: int


def wilson(right: int, n: int) -> Estimate:
    """Proportion with the Wilson score interval (Wilson 1927)."""
    return Estimate(right / n, *_wilson_ends(right / n, n, float(norm.ppf(TWO_SIDED))), math.nan, n)


def _wilson_ends(p: float, n: float, z: float) -> tuple[float, float]:
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def mean_of_wilson(parts: Sequence[Estimate]) -> Estimate:
    """Mean of independent proportions, with the interval recovered from theirs (MOVER).

    Newcombe 1998, method 10; Zou and Donner 2008: each end is the mean less or plus the root of the
    summed squares of the parts' own distances to that end.
    """
    k, value = len(parts), sum(p.value for p in parts) / len(parts)
    down = math.sqrt(sum((p.value - p.low) ** 2 for p in parts)) / k
    up = math.sqrt(sum((p.high - p.value) ** 2 for p in parts)) / k
    return Estimate(value, value - down, value + up, math.nan, sum(p.n for p in parts))


def loglinear(right: Array | int, n: int) -> Array:
    """Rates that are never 0 or 1: half a right answer and one answer more (Hautus 1995)."""
    return np.asarray((right + 0.5) / (n + 1))


def d_prime(caught: int, synthetic: int, mistaken: int, real: int) -> Estimate:
    """One reader's d' = z(hit rate) - z(false alarm rate), log-linear rates.

    The variance is Gourevitch and Galanter's (1967), at those rates.

    Args:
        caught: Synthetic images called synthetic.
        synthetic: Synthetic images.
        mistaken: Real images called synthetic.
        real: Real images.
    """
    hit, alarm = loglinear(caught, synthetic), loglinear(mistaken, real)
    value = float(norm.ppf(hit) - norm.ppf(alarm))
    variance = sum(
        rate * (1 - rate) / (n * norm.pdf(norm.ppf(rate)) ** 2)
        for rate, n in ((hit, synthetic), (alarm, real))
    )
    se = math.sqrt(variance)
    reach = float(norm.ppf(TWO_SIDED)) * se
    return Estimate(value, value - reach, value + reach, se, synthetic + real)


def mean_d_prime(synthetic: Array, real: Array) -> Estimate:
    """Mean d' of these readers; images vary.

    The readers' z are linearised answer by answer (delta method), so that `crossed` sees which images
    are easy for several readers.

    Args:
        synthetic: 1 where a synthetic image was called synthetic, [readers, images].
        real: 1 where a real image was called synthetic, [readers, images].
    """
    parts = []
    for weight, said in ((1.0, synthetic), (-1.0, real)):
        rate = loglinear(said.sum(axis=1), said.shape[1])[:, None]
        z = norm.ppf(rate)
        ends = (z + (end - said.mean(axis=1, keepdims=True)) / norm.pdf(z) for end in (0, 1))
        values = z + (said - said.mean(axis=1, keepdims=True)) / norm.pdf(z)
        parts.append(Group(weight, values, np.hstack(list(ends))))
    return crossed([part.averaged() for part in parts]).interval()


def bias(caught: int, synthetic: int, mistaken: int, real: int) -> float:
    """Criterion c: below 0 a reader says "synthetic" more readily than "real"."""
    return float(-(norm.ppf(loglinear(caught, synthetic)) + norm.ppf(loglinear(mistaken, real))) / 2)


@dataclass(frozen=True)
class Group:
    """A group of images in a weighted sum of means.

    Attributes:
        weight: Of its mean.
        answers: [readers, images].
        ends: Two more images, [readers, 2], counted in the variance alone: the least and the greatest
            answer. Where all are right the sample shows no variance at all (Agresti and Coull 1998).
    """

    weight: float
    answers: Array
    ends: Array

    def averaged(self) -> Group:
        """The same readers as one: a statement about them, not about readers in general."""
        return Group(
            self.weight, self.answers.mean(axis=0, keepdims=True), self.ends.mean(axis=0, keepdims=True)
        )


def proportion_of(weight: float, answers: Array) -> Group:
    """Make a group of answers that are 0 or 1."""
    return Group(weight, answers, np.tile([0.0, 1.0], (len(answers), 1)))


@dataclass(frozen=True)
class Crossed:
    """A contrast of means over readers x images with its variance and degrees of freedom."""

    value: float
    variance: float
    df: float
    n: int

    def interval(self, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """Interval by Student's t, cut to the range that the contrast can have."""
        se = math.sqrt(self.variance)
        reach = float(t.ppf(TWO_SIDED, self.df)) * se
        return Estimate(self.value, max(low, self.value - reach), min(high, self.value + reach), se, self.n)

    def proportion(self) -> Estimate:
        """Wilson's interval at the number of independent answers that would have this variance."""
        smooth = (self.value * self.n + 2) / (self.n + 4)
        n = smooth * (1 - smooth) / self.variance
        ends = _wilson_ends(self.value, n, float(t.ppf(TWO_SIDED, self.df)))
        return Estimate(self.value, *ends, math.sqrt(self.variance), self.n)


def crossed(groups: Sequence[Group]) -> Crossed:
    """Estimate a weighted sum of group means where all readers read all images, both drawn at random.

    Two-way random effects without replication, groups of images nested, readers crossed: the variance
    is that of the readers' own contrasts over the readers, plus each group's image component
    max(0, MS_images - MS_residual) / R over its images; Satterthwaite's degrees of freedom (Hillis 2007
    for the same estimator in reader studies). With one reader, or an averaged one, images alone vary.

    Args:
        groups: The same readers in all.
    """
    readers = groups[0].answers.shape[0]
    contrasts = np.sum([group.weight * group.answers.mean(axis=1) for group in groups], axis=0)
    terms: list[tuple[float, int]] = []
    if readers > 1:
        terms.append((float(contrasts.var(ddof=1)) / readers, readers - 1))
    for group in groups:
        answers = np.hstack([group.answers, group.ends])
        images = answers.shape[1]
        of_images = float(answers.mean(axis=0).var(ddof=1))
        if readers > 1:
            rest = answers - answers.mean(axis=0) - answers.mean(axis=1, keepdims=True) + answers.mean()
            of_images -= float((rest**2).sum()) / ((readers - 1) * (images - 1)) / readers
        terms.append((group.weight**2 * max(0.0, of_images) / images, images - 1))
    variance = sum(term for term, _ in terms)
    df = variance**2 / sum(term**2 / df for term, df in terms)
    found = Crossed(float(contrasts.mean()), variance, float(df), sum(g.answers.size for g in groups))
    if readers > 1:
        these = crossed([group.averaged() for group in groups])
        # Estimates err: a claim about all readers must not look surer than one about these.
        if these.variance > variance:
            return replace(found, variance=these.variance, df=these.df)
    return found
