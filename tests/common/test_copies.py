"""Whether near copies are more than chance: against exact distributions, and by drawing what chance does."""

from functools import cache

import pytest
import torch
from scipy import stats

from polyclinic.common.features.copies import ALARM, Tally, chance_of, fewest_alarming
from polyclinic.common.study import NearScale

NOBODY = Tally(0, 0, 0, 0)


def scale(patients: int, chance: float = 0.0, more: float = 1.0) -> NearScale:
    chance = chance or 1 / (patients + 1)
    return NearScale(features=0.2, pixels=0.2, chance=chance, patients=patients, more=more)


def found(n: int, near: int) -> Tally:
    return Tally(n, near, near, near)


@pytest.mark.parametrize(("near", "k"), [(2, 1), (7, 1), (9, 3)])
def test_with_one_image_a_patient_the_count_is_beta_binomial(near: int, k: int) -> None:
    told = chance_of(found(50, near), NOBODY, [1] * 50, scale(99, k / 100))
    assert told == pytest.approx(min(1.0, 3 * stats.betabinom.sf(near - 1, 50, k, 100 - k)), rel=0.01)
    # One distance alone is as much evidence as both.
    assert chance_of(Tally(50, 0, near, near), NOBODY, [1] * 50, scale(99, k / 100)) == told


def test_with_several_images_a_patient_the_tail_bounds_what_chance_does() -> None:
    generator, trials, sizes = torch.Generator().manual_seed(1), 40_000, [1] * 20 + [5] * 20
    rates = torch.rand(trials, 59, generator=generator).min(dim=1).values * 2  # searched: twice the images
    each = 1 - (1 - rates[:, None]).clamp_min(0) ** torch.tensor(sizes)
    count = (torch.rand(trials, 40, generator=generator) < each).sum(dim=1)
    for near in (8, 14):
        drawn = float((count >= near).float().mean())
        assert drawn <= chance_of(found(40, near), NOBODY, sizes, scale(59, 2 / 60, more=2)) / 3 <= 3 * drawn


def test_false_alarms_stay_below_what_is_stated_where_a_rate_taken_as_known_does_not() -> None:
    generator, trials, public, n = torch.Generator().manual_seed(2), 4000, 39, 400
    level, measure = 0.1, scale(public)

    @cache
    def chance(near: int) -> float:
        return chance_of(found(n, near), NOBODY, [1] * n, measure)

    limits = torch.rand(trials, public, generator=generator).min(dim=1).values
    near = (torch.rand(trials, n, generator=generator) < limits[:, None]).sum(dim=1).tolist()
    false = sum(chance(count) < level for count in near) / trials
    naive = sum(stats.poisson.sf(count - 1, n * measure.chance) < level / 3 for count in near) / trials
    assert false < level / 3 + 0.01
    assert naive > level


def test_few_held_out_cannot_excuse_many_copies_and_many_can() -> None:
    ones, small = [1] * 18, scale(52)
    for held_out, near in ((2, 1), (2, 2), (5, 5), (20, 2)):
        assert chance_of(found(18, 18), found(held_out, near), ones, small) < ALARM
    # A site of people who are near to everything: trained on or not, a third is found.
    many, large = [1] * 90, scale(199)
    assert chance_of(found(90, 30), found(100, 33), many, large) > 0.05
    assert chance_of(found(90, 30), found(100, 1), many, large) < ALARM
    assert chance_of(found(90, 0), found(10, 10), many, large) == 1


def test_where_the_scale_is_worth_nothing_those_held_out_are_asked() -> None:
    sizes, flat = [40] * 900, scale(39)
    told = chance_of(found(900, 90), found(100, 0), sizes, flat)
    assert told == pytest.approx(3 * stats.hypergeom.sf(89, 1000, 90, 900))
    assert told < ALARM < chance_of(found(900, 90), found(100, 7), sizes, flat)


@pytest.mark.parametrize(("sizes", "held_out"), [([1] * 18, 2), ([1, 3] * 45, 10), ([20] * 900, 100)])
def test_fewest_alarming_is_where_the_alarm_begins(sizes: list[int], held_out: int) -> None:
    fewest, n = fewest_alarming(sizes, held_out, scale(99)), len(sizes)
    assert fewest is not None
    none_held_out_near = Tally(held_out, 0, 0, 0)
    assert chance_of(found(n, fewest), none_held_out_near, sizes, scale(99)) < ALARM
    assert chance_of(found(n, fewest - 1), none_held_out_near, sizes, scale(99)) >= ALARM


def test_a_site_where_no_number_of_copies_can_raise_the_alarm_is_told() -> None:
    assert fewest_alarming([20] * 18, 2, scale(39)) is None
    assert fewest_alarming([1] * 2, 0, scale(39)) is None
