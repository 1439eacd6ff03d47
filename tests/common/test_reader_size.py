"""Sample sizes against the known figure, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from polyclinic.common.reader_study.size import (
    advice,
    binomial_power,
    detectable,
    images_needed,
    images_needed_exactly,
    power_of,
)
from polyclinic.common.refusals import BadInput


def test_one_reader_at_65_percent_needs_85_images() -> None:
    assert images_needed(0.65, 0.8) == 85
    # The textbook formula, by hand: ((1.959964 x 0.5 + 0.841621 x sqrt(0.65 x 0.35)) / 0.15)^2 = 84.8
    assert math.ceil(((1.959964 * 0.5 + 0.841621 * math.sqrt(0.65 * 0.35)) / 0.15) ** 2) == 85
    assert detectable(85) == pytest.approx(0.65, abs=0.0005)


@pytest.mark.parametrize(("accuracy", "power"), [(0.65, 0.8), (0.9, 0.9)])
def test_the_exact_number_is_that_of_brute_force(accuracy: float, power: float) -> None:
    def enough(n: int) -> bool:
        # The widest two-sided region whose every half has at most 2.5 % by guessing.
        by_guessing, chances = (np.cumsum(binom.pmf(range(n + 1), n, p)) for p in (0.5, accuracy))
        reject = [k for k in range(n + 1) if min(by_guessing[k], by_guessing[n - k]) <= 0.025]
        return bool(np.diff(chances, prepend=0)[reject].sum() >= power)

    found = images_needed_exactly(accuracy, power)
    assert not enough(found - 1)
    assert all(enough(n) for n in range(found, found + 60))
    assert found >= images_needed(accuracy, power)
    assert binomial_power(accuracy, 3) == 0.0  # three answers can show nothing


@pytest.mark.parametrize(("readers", "icc_images", "icc_readers"), [(3, 0.3, 0.0), (4, 0.2, 0.05), (2, 0, 0)])
def test_power_with_several_readers_is_that_of_a_simulation(
    readers: int, icc_images: float, icc_readers: float
) -> None:
    """Answers with these intraclass correlations: an answer is copied from its image, its reader, or own."""
    rng = np.random.default_rng(11)
    images, rounds = 60, 4000

    def accuracies(p: float) -> NDArray[np.float64]:
        shape = (rounds, readers, images)
        own, of_image, of_reader = (
            rng.random(s) < p for s in (shape, (rounds, 1, images), (rounds, readers, 1))
        )
        # Copied with probability r, two answers of one image are the same draw with probability r^2.
        source = rng.random(shape)
        a, b = math.sqrt(icc_images), math.sqrt(icc_readers)
        said = np.where(source < a, of_image, np.where(source < a + b, of_reader, own))
        return np.asarray(said.mean(axis=(1, 2)))

    guessed = accuracies(0.5)
    threshold = 1.96 * guessed.std()
    power = float(np.mean(accuracies(0.65) - 0.5 > threshold))
    assert power_of(0.65, images, readers, icc_images, icc_readers) == pytest.approx(power, abs=0.05)


def test_more_readers_need_fewer_images_down_to_a_limit() -> None:
    needed = [images_needed(0.65, readers=r, icc_images=0.2) for r in (1, 2, 3, 6)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] == 85
    # With 20 % of the variance in the images no number of readers does with fewer than a fifth.
    assert images_needed(0.65, readers=1000, icc_images=0.2) == pytest.approx(0.2 * 85, abs=1.5)
    facts = advice(0.65, None, readers=3, icc_images=0.2)
    assert facts["design_effect"] == pytest.approx(1 + 2 * 0.2)
    assert 3 * facts["images"] == pytest.approx(85 * 1.4, abs=3)


def test_detectable_and_needed_undo_each_other() -> None:
    for images, readers in itertools.product((30, 100, 400), (1, 3)):
        found = detectable(images, readers=readers, icc_images=0.1)
        assert images_needed(found + 1e-6, readers=readers, icc_images=0.1) == images
    assert detectable(2) == 1.0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"accuracy": 0.5}, "--accuracy 0.5: write a share above 0.5"),
        ({"accuracy": 65}, "--accuracy 65: write a share"),
        ({"accuracy": None}, "give either --accuracy"),
        ({"accuracy": 0.7, "images": 10}, "give either --accuracy"),
        ({"accuracy": 0.7, "power": 80}, "--power 80: write a share"),
        ({"accuracy": 0.7, "readers": 0}, "--readers 0"),
        ({"accuracy": 0.7, "readers": 3, "icc_images": 0.6, "icc_readers": 0.5}, "stays below 1"),
        ({"accuracy": 0.55, "readers": 2, "icc_readers": 0.2}, "add readers"),
    ],
)
def test_bad_values_end_in_a_sentence(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        advice(**{"images": None, **values})  # type: ignore[arg-type]
