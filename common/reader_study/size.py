"""How many images and readers a reader study needs, against chance (an accuracy of one half).

With R readers who all read the same N images, the variance of the mean accuracy is
p (1 - p) [icc_readers / R + icc_images / N + (1 - icc_readers - icc_images) / (R N)]: the two intraclass
correlations are the shares of the variance of a single answer that belong to readers (some are better)
and to images (some are easier, for everybody). With one reader, who is then fixed, it is p (1 - p) / N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from scipy.optimize import brentq
from scipy.stats import binom, norm

from polyclinic.common.refusals import BadInput

LEVEL, POWER = 0.05, 0.8
MOST = 10**6


def design_variance(images: float, readers: int, icc_images: float, icc_readers: float) -> float:
    """Variance of the mean accuracy over that of a single answer."""
    own = 1 - icc_images - icc_readers
    return icc_readers / readers + icc_images / images + own / (readers * images)


def power_of(
    accuracy: float,
    images: float,
    readers: int = 1,
    icc_images: float = 0.0,
    icc_readers: float = 0.0,
    level: float = LEVEL,
) -> float:
    """Power of a two-sided test of an accuracy against one half, by the normal approximation.

    Args:
        accuracy: The true one, above one half.
        images: Real and synthetic ones together, the same for all readers.
        readers: How many.
        icc_images: Share of an answer's variance that belongs to the image.
        icc_readers: Share that belongs to the reader.
        level: Of the test.
    """
    spread = math.sqrt(design_variance(images, readers, icc_images, icc_readers))
    null = norm.isf(level / 2) * 0.5 * spread
    return float(norm.cdf((accuracy - 0.5 - null) / (math.sqrt(accuracy * (1 - accuracy)) * spread)))


def images_needed(
    accuracy: float,
    power: float = POWER,
    readers: int = 1,
    icc_images: float = 0.0,
    icc_readers: float = 0.0,
    level: float = LEVEL,
) -> int:
    """Fewest images by the normal approximation; one reader, 65 % against 50 %, power 80 %: 85.

    Raises:
        BadInput: No number of images is enough: readers differ too much for so few of them.
    """

    def enough(images: int) -> bool:
        return power_of(accuracy, images, readers, icc_images, icc_readers, level) >= power

    if not enough(MOST):
        raise BadInput(
            f"--readers {readers}: with --icc-readers {icc_readers} no number of images is enough to show an "
            f"accuracy of {accuracy:g}; add readers"
        )
    return _fewest(enough)


def images_needed_exactly(accuracy: float, power: float = POWER, level: float = LEVEL) -> int:
    """Fewest images for one reader by the exact two-sided binomial test.

    Its power goes up and down as images are added; from this number on it never falls below.
    """
    good = images_needed(accuracy, power, level=level)
    number = 2 * good + 100
    while binomial_power(accuracy, number - 1, level) >= power:
        number -= 1
    return number


def binomial_power(accuracy: float, images: int, level: float = LEVEL) -> float:
    """Power of the exact test that rejects when at most k or at least n - k answers are right.

    k is the largest number for which that happens with at most the level's probability by guessing.
    """
    k = int(binom.ppf(level / 2, images, 0.5))
    if binom.cdf(k, images, 0.5) > level / 2:
        k -= 1
    return float(binom.cdf(k, images, accuracy) + binom.sf(images - k - 1, images, accuracy))


def detectable(
    images: int,
    power: float = POWER,
    readers: int = 1,
    icc_images: float = 0.0,
    icc_readers: float = 0.0,
    level: float = LEVEL,
) -> float:
    """Smallest accuracy above one half that these images would show with this power; 1 if none would."""

    def short(accuracy: float) -> float:
        return power_of(accuracy, images, readers, icc_images, icc_readers, level) - power

    high = 1 - 1e-9
    return 1.0 if short(high) < 0 else float(brentq(short, 0.5 + 1e-9, high))


def advice(
    accuracy: float | None,
    images: int | None,
    power: float = POWER,
    readers: int = 1,
    icc_images: float = 0.0,
    icc_readers: float = 0.0,
) -> dict[str, Any]:
    """Tell how many images an accuracy needs, or which accuracy some images can show.

    Args:
        accuracy: Expected, above one half; None where `images` is given alone.
        images: Real and synthetic together; None where `accuracy` is given alone.
        power: Wanted.
        readers: Who all read the same images.
        icc_images: As in `power_of`.
        icc_readers: As in `power_of`.

    Raises:
        BadInput: A value that means nothing; names the option.
    """
    if (accuracy is None) == (images is None):
        raise BadInput("give either --accuracy, to learn how many images it needs, or --images")
    for option, value, good in (
        ("--accuracy", accuracy, accuracy is None or 0.5 < accuracy < 1),
        ("--images", images, images is None or 2 <= images <= MOST),
        ("--power", power, LEVEL < power < 1),
        ("--readers", readers, readers >= 1),
        ("--icc-images", icc_images, icc_images >= 0),
        ("--icc-readers", icc_readers, icc_readers >= 0 and icc_images + icc_readers < 1),
    ):
        if not good:
            raise BadInput(f"{option} {value}: {MEANING[option]}")
    if readers == 1:
        icc_images = icc_readers = 0.0  # one reader stands for nobody else
    shares = (readers, icc_images, icc_readers)
    facts: dict[str, Any] = {
        "power": power,
        "level": LEVEL,
        "readers": readers,
        "icc_images": icc_images,
        "icc_readers": icc_readers,
    }
    if accuracy is None:
        assert images is not None
        return {**facts, "images": images, "detectable": detectable(images, power, *shares)}
    needed = images_needed(accuracy, power, *shares)
    one = images_needed(accuracy, power)
    return {
        **facts,
        "accuracy": accuracy,
        "images": needed,
        "images_one_reader": one,
        "images_exact": images_needed_exactly(accuracy, power) if readers == 1 else None,
        "design_effect": readers * needed * design_variance(needed, *shares),
    }


MEANING = {
    "--accuracy": "write a share above 0.5, which is chance, and below 1",
    "--images": f"write a number from 2 to {MOST}",
    "--power": f"write a share above {LEVEL} and below 1, such as 0.8",
    "--readers": "at least one is needed",
    "--icc-images": "write a share from 0 to 1",
    "--icc-readers": "write a share from 0 to 1; with --icc-images it stays below 1",
}


def _fewest(enough: Callable[[int], bool]) -> int:
    """Find the smallest number from 2 to `MOST` that is enough, given that all above it are."""
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
