"""The reader study's statistics against published examples, brute force and simulation."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from polyclinic.common.reader_study.alpha import Scale, krippendorff
from polyclinic.common.reader_study.detection import (
    Estimate,
    Group,
    bias,
    crossed,
    d_prime,
    mean_d_prime,
    mean_of_wilson,
    proportion_of,
    wilson,
)

Array = NDArray[np.float64]
_ = np.nan
# Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), examples A, B and C.
FOUR_OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
)
BINARY = 1.0 + np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]])
FIVE_NAMES = np.array([[1, 1, 2, 2, 4, 3, 3, 3, 5, 4, 4, 1], [2, 1, 2, 2, 2, 3, 3, 3, 5, 4, 4, 4.0]])


@pytest.mark.parametrize(
    ("answers", "scale", "published"),
    [
        (FOUR_OBSERVERS, "nominal", 0.743),
        (FOUR_OBSERVERS, "ordinal", 0.815),
        (FOUR_OBSERVERS, "interval", 0.849),
        (BINARY, "nominal", 0.095),
        (FIVE_NAMES, "nominal", 0.692),
    ],
)
def test_alpha_is_the_published_one(answers: Array, scale: Scale, published: float) -> None:
    found = krippendorff(answers, scale, 5)
    assert found is not None
    assert round(found.value, 3) == published
    assert found.low < found.value < found.high


@pytest.mark.parametrize("scale", ["nominal", "ordinal", "interval"])
def test_alpha_is_what_pairs_of_answers_say(scale: Scale) -> None:
    rng = np.random.default_rng(3)
    for _round in range(20):
        answers = rng.integers(1, 5, size=(3, 9)).astype(float)
        answers[rng.random(answers.shape) < 0.25] = np.nan
        found = krippendorff(answers, scale, 4)
        assert found is not None
        assert found.value == pytest.approx(alpha_by_pairs(answers, scale), abs=1e-12)


def alpha_by_pairs(answers: Array, scale: Scale) -> float:
    """The definition: differences within units against differences between any two pairable answers."""
    units = [[int(x) for x in unit if not math.isnan(x)] for unit in answers.T]
    units = [unit for unit in units if len(unit) > 1]
    pool = [x for unit in units for x in unit]

    def apart(a: int, b: int) -> float:
        if scale == "nominal":
            return float(a != b)
        if scale == "interval":
            return float((a - b) ** 2)
        low, high = min(a, b), max(a, b)
        between = sum(pool.count(level) for level in range(low, high + 1))
        return (between - (pool.count(a) + pool.count(b)) / 2) ** 2

    observed = sum(
        apart(a, b) / (len(unit) - 1) for unit in units for a, b in itertools.permutations(unit, 2)
    ) / len(pool)
    pairs = list(itertools.permutations(pool, 2))
    return 1 - observed / (sum(apart(a, b) for a, b in pairs) / len(pairs))


def test_alpha_at_its_ends() -> None:
    same = krippendorff(np.array([[1, 2, 3, 1.0], [1, 2, 3, 1]]), "ordinal", 3)
    assert same is not None
    assert (same.value, same.units) == (1.0, 4)
    assert krippendorff(np.array([[1, 1, 1.0], [1, 1, 1]]), "nominal", 2) is None  # nothing varies
    assert krippendorff(np.array([[1, 2.0], [np.nan, np.nan]]), "nominal", 2) is None  # no pair
    swapped = krippendorff(np.array([[1, 2] * 10, [2, 1] * 10], dtype=float), "nominal", 2)
    assert swapped is not None
    assert swapped.value < -0.9


def test_alphas_interval_covers() -> None:
    rng = np.random.default_rng(5)

    def draw(images: int) -> Array:
        latent = rng.normal(size=images) + rng.normal(size=(3, images))
        return np.where(latent > 0, 2.0, 1.0)

    # Latent correlation 1/2: two readers differ with probability arccos(1/2) / pi = 1/3, any two with 1/2.
    truth = 1 - (1 / 3) / (1 / 2)
    found = [krippendorff(draw(60), "nominal", 2) for _round in range(150)]
    covered = np.mean([one is not None and one.low <= truth <= one.high for one in found])
    assert 0.90 <= covered <= 0.995


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_and_scipys(right: int, n: int, low: float, high: float) -> None:
    # Newcombe 1998, table I, method 3.
    found = wilson(right, n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    scipys = binomtest(right, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((scipys.low, scipys.high))


def test_d_prime_by_hand() -> None:
    # (8 + 1/2) / 10 = 0.85 and (1 + 1/2) / 10 = 0.15, whose z are +-1.0364334.
    found = d_prime(8, 9, 1, 9)
    assert found.value == pytest.approx(2 * 1.0364334, abs=1e-6)
    # Variance of each: 0.85 x 0.15 / (9 phi(z)^2) with phi(1.0364334) = 0.2331588.
    assert found.se == pytest.approx(math.sqrt(2 * 0.1275 / 9) / 0.2331588, rel=1e-5)
    assert bias(8, 9, 1, 9) == pytest.approx(0)
    assert bias(9, 9, 9, 9) < -1  # says "synthetic" always
    perfect = d_prime(20, 20, 0, 20)
    assert perfect.value == pytest.approx(2 * norm.ppf(20.5 / 21))
    assert perfect.low < perfect.value < perfect.high < math.inf


Draw = Callable[[np.random.Generator, float, int, int], Array]


def answers(rng: np.random.Generator, mean: float, offsets: Array, images: int, spread: float) -> Array:
    """Probit answers: some images are easier for everybody, some readers better."""
    ease = spread * rng.normal(size=images)
    latent = mean + offsets[:, None] + ease + rng.normal(size=(len(offsets), images))
    return np.asarray(latent > 0, dtype=np.float64)


def rate(mean: float, offsets: Array, spread: float) -> float:
    """What these readers would say over all images there could be."""
    return float(norm.cdf((mean + offsets) / math.sqrt(1 + spread**2)).mean())


def coverage(rounds: int, one: Callable[[np.random.Generator], tuple[Estimate, float]]) -> float:
    rng = np.random.default_rng(7)
    found = [one(rng) for _round in range(rounds)]
    return float(np.mean([e.low <= truth <= e.high for e, truth in found]))


@pytest.mark.parametrize(
    ("readers", "images", "mean", "spread"),
    [(2, 25, 0.3, 0.8), (3, 50, 0.0, 0.0), (3, 50, 2.0, 1.0), (5, 25, 1.5, 0.5), (1, 50, 2.0, 0.5)],
)
def test_interval_for_these_readers_covers(readers: int, images: int, mean: float, spread: float) -> None:
    def one(rng: np.random.Generator) -> tuple[Estimate, float]:
        offsets = 0.3 * rng.normal(size=readers)
        groups = [proportion_of(0.5, answers(rng, mean, offsets, images, spread)) for _group in range(2)]
        return crossed([g.averaged() for g in groups]).proportion(), rate(mean, offsets, spread)

    assert 0.935 <= coverage(600, one) <= 0.995


@pytest.mark.parametrize(("readers", "images"), [(3, 50), (6, 30)])
def test_interval_for_readers_in_general_covers(readers: int, images: int) -> None:
    mean, spread, between = 0.5, 0.7, 0.5
    truth = float(norm.cdf(mean / math.sqrt(1 + spread**2 + between**2)))

    def one(rng: np.random.Generator) -> tuple[Estimate, float]:
        offsets = between * rng.normal(size=readers)
        groups = [proportion_of(0.5, answers(rng, mean, offsets, images, spread)) for _group in range(2)]
        return crossed(groups).proportion(), truth

    assert 0.93 <= coverage(600, one) <= 0.99


@pytest.mark.parametrize(("readers", "a", "b"), [(1, 0.5, 0.5), (3, 1.5, 0.3), (3, 2.2, 2.2)])
def test_interval_of_a_difference_covers(readers: int, a: float, b: float) -> None:
    def one(rng: np.random.Generator) -> tuple[Estimate, float]:
        offsets = 0.4 * rng.normal(size=readers)
        groups = [proportion_of(w, answers(rng, m, offsets, 40, 0.7)) for w, m in ((1.0, a), (-1.0, b))]
        truth = rate(a, offsets, 0.7) - rate(b, offsets, 0.7)
        return crossed([g.averaged() for g in groups]).interval(-1, 1), truth

    assert coverage(600, one) >= 0.935  # more than 95 % where nearly all are right


def test_interval_of_the_mean_d_prime_covers() -> None:
    def one(rng: np.random.Generator) -> tuple[Estimate, float]:
        offsets = 0.3 * rng.normal(size=3)
        said = [answers(rng, mean, offsets, 50, 0.7) for mean in (0.8, -0.5)]
        return mean_d_prime(said[0], said[1]), 1.3 / math.sqrt(1 + 0.7**2)

    assert 0.935 <= coverage(600, one) <= 0.995


def test_interval_of_a_mean_of_two_proportions_covers() -> None:
    def one(rng: np.random.Generator) -> tuple[Estimate, float]:
        parts = [wilson(int(rng.binomial(n, p)), n) for n, p in ((60, 0.9), (20, 0.4))]
        return mean_of_wilson(parts), 0.65

    assert 0.93 <= coverage(2000, one) <= 0.97


def test_all_right_is_not_certain() -> None:
    rights = proportion_of(0.5, np.ones((3, 30)))
    found = crossed([rights.averaged(), rights.averaged()]).proportion()
    # Sixty images without an error: the rule of three says 5 %.
    assert 0.90 < found.low < 0.97
    assert found.high == pytest.approx(1.0)
    difference = crossed([rights.averaged(), proportion_of(-0.5, np.ones((3, 30))).averaged()]).interval(
        -1, 1
    )
    assert difference.low < -0.01 < 0.01 < difference.high


def test_crossed_is_the_anova_written_out() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 7)) + rng.normal(size=(4, 1))
    ends = np.empty((4, 0))
    found = crossed([Group(1.0, x, ends)])
    rows, columns = x.mean(axis=1), x.mean(axis=0)
    ms_readers = 7 * sum((rows - x.mean()) ** 2) / 3
    ms_images = 4 * sum((columns - x.mean()) ** 2) / 6
    ms_rest = (
        sum(
            (x[r, i] - rows[r] - columns[i] + x.mean()) ** 2 for r, i in itertools.product(range(4), range(7))
        )
        / 18
    )
    assert found.value == pytest.approx(x.mean())
    assert found.variance == pytest.approx((ms_readers + max(0, ms_images - ms_rest)) / 28)
    alike = proportion_of(1.0, np.tile(rng.integers(0, 2, size=(1, 9)).astype(float), (3, 1)))
    assert crossed([alike]).variance >= crossed([alike.averaged()]).variance
