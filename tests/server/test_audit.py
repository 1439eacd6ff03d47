"""PRIVACY.md, rule 17, at the coordinator: faults are flagged, correct sites are not, bounds hold.

Studies are simulated in the law that a tap follows, and `test_a_tap_follows_the_law` holds the real tap,
clipping and noise to that law.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from polyclinic.common.privacy.clipping import TAU
from polyclinic.common.privacy.random import KeyedRandom, StepNoise
from polyclinic.common.privacy.tap import COINS, SUM, Tap, canary_norms, toss_coins
from polyclinic.common.training import PatientDPOptimizer
from polyclinic.server.evaluation.audit import (
    Claim,
    SiteAudit,
    audit_site,
    blanks,
    end_level,
    guesses_to_make,
    lower_bound,
    measured_sigma,
    one_run_bound,
    p_value,
    round_level,
)

K, ROUNDS, SITES = 1000, 5, 3
CLAIM = Claim(sigma=1.0, clip=0.3, divisor=30.0, rate=0.1, steps=20, tau=TAU, epsilon=8.0, delta=1e-5)


def simulate(
    claim: Claim,
    generator: torch.Generator,
    *,
    studies: int = 1,
    coordinates: int = K,
    rounds: int = ROUNDS,
    noise: float = 1.0,
    divisor: float = 1.0,
    threshold: float = 1.0,
    rate: float = 1.0,
    repeated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Taps `[studies, rounds, K]` and coins `[studies, K]`; factors say how a site departs from its claim."""
    coins = torch.rand(studies, coordinates, generator=generator) < 0.5
    steps = torch.full((studies, rounds, coordinates), float(claim.steps))
    chance = torch.full_like(steps, claim.rate * rate)
    times = torch.binomial(steps, chance, generator=generator) * coins[:, None]
    size = canary_norms(coordinates).clamp(max=threshold) / (1 + claim.tau)
    draws = torch.randn(studies, 1 if repeated else rounds, coordinates, generator=generator)
    sums = times * size + noise * claim.sigma * math.sqrt(claim.steps) * draws
    return sums * claim.clip / (claim.divisor * divisor), coins


def audit(taps: Tensor, coins: Tensor | None, claim: Claim = CLAIM, *, sites: int = SITES) -> SiteAudit:
    """Audit one site of a study of `sites` that all answered."""
    by_round = {number: tap for number, tap in enumerate(taps, start=1)}
    heard = dict.fromkeys(by_round, sites)
    tosses = None if coins is None else coins.float()
    return audit_site("north", by_round, tosses, claim, rounds=len(taps), heard=heard)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_correct_sites_are_flagged_in_less_than_two_percent_of_studies() -> None:
    generator, flagged, studies = rng(), 0, 300
    for _ in range(studies):
        taps, coins = simulate(CLAIM, generator, studies=SITES, coordinates=200)
        flagged += any(audit(t, c).alarms for t, c in zip(taps, coins, strict=True))
    # At the stated level, 13 or more of 300 would happen once in a hundred suites.
    assert flagged <= 12


@pytest.mark.long
def test_false_alarms_over_many_studies_at_other_settings() -> None:
    generator = rng(1)
    for claim, rounds, sites in (
        (replace(CLAIM, sigma=6.0, rate=0.02), 3, 2),
        (replace(CLAIM, sigma=0.5, rate=0.5, steps=2), 10, 5),
        (replace(CLAIM, rate=1.0), 1, 1),
    ):
        flagged = 0
        for _ in range(400):
            taps, coins = simulate(claim, generator, studies=sites, coordinates=100, rounds=rounds)
            flagged += any(audit(t, c, claim, sites=sites).alarms for t, c in zip(taps, coins, strict=True))
        assert flagged <= 16, (claim, flagged)


def test_levels_add_up_to_two_percent() -> None:
    assert ROUNDS * SITES * round_level(ROUNDS, SITES) + SITES * 5 * end_level(SITES) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ({"noise": 0.5}, "noise measured 0.5"),
        ({"noise": 0.0}, "noise measured 0 "),
        ({"noise": 0.9}, "noise measured"),
        ({"divisor": 2.0}, "divisor"),
        ({"divisor": 0.8}, "noise measured"),
        ({"threshold": 2.0}, "norm 10 C measured"),
        ({"threshold": math.inf}, "norm 10 C measured"),
        ({"threshold": 0.25}, "C measured 0."),
        ({"rate": 2.0}, "norm 10 C measured"),
        ({"repeated": True}, "not independent"),
    ],
)
def test_faults_are_flagged_and_named(fault: dict[str, float], word: str) -> None:
    for seed in range(10):
        taps, coins = simulate(CLAIM, rng(seed), **fault)  # type: ignore[arg-type]
        alarms = audit(taps[0], coins[0]).alarms
        assert any(word in alarm for alarm in alarms), (seed, alarms)


@pytest.mark.parametrize("fault", [{"noise": 0.5}, {"noise": 0.0}, {"divisor": 2.0}])
def test_wrong_noise_is_flagged_in_its_own_round_before_coins_are_known(fault: dict[str, float]) -> None:
    for seed in range(10):
        good, _ = simulate(CLAIM, rng(100 + seed))
        bad, _ = simulate(CLAIM, rng(seed), **fault)  # type: ignore[arg-type]
        taps = good[0].clone()
        taps[2] = bad[0, 2]
        found = audit(taps, None)
        assert [alarm.split(":")[0] for alarm in found.alarms] == ["round 3"]
        assert not found.revealed
        assert (found.small, found.large, found.bound) == (None, None, None)


def test_small_budget_still_shows_a_clip_twice_too_large() -> None:
    """At epsilon 1 the canaries drown in noise one by one; K = 2000 of them do not."""
    claim = replace(CLAIM, sigma=6.1, rate=0.05, steps=100)
    found = 0
    for seed in range(20):
        taps, coins = simulate(claim, rng(seed), coordinates=2000, rounds=10, threshold=2.0)
        found += any("norm 10 C" in alarm for alarm in audit(taps[0], coins[0], claim).alarms)
    assert found >= 16


def test_intervals_cover_what_is_claimed_as_often_as_they_say() -> None:
    generator, hits, studies = rng(2), torch.zeros(3), 200
    for _ in range(studies):
        taps, coins = simulate(CLAIM, generator, coordinates=200)
        found = audit(taps[0], coins[0])
        measured = (found.sigma, found.small, found.large)
        hits += torch.tensor([m is not None and m.low <= m.claimed <= m.high for m in measured])
    assert bool((hits / studies > 0.90).all())
    assert bool((hits / studies < 0.99).all())


def test_a_tap_follows_the_law() -> None:
    """The real tap, clipping, noise and divisor, step by step."""
    claim = replace(CLAIM, steps=30, sigma=0.8)
    coins = toss_coins(4000)
    taps = []
    for number in range(2):
        random = KeyedRandom(bytes([number]) * 32)
        tap = Tap(coins, random, rate=claim.rate, clip=claim.clip, margin=TAU, device="cpu")
        weight = nn.Parameter(torch.zeros(3))
        optimizer = PatientDPOptimizer(
            torch.optim.AdamW([weight, tap.parameter], lr=0.1),
            noise_multiplier=claim.sigma,
            max_grad_norm=claim.clip,
            expected_batch_size=claim.divisor,
        )
        optimizer.after_noise = tap.collect
        shapes = {"w": weight.shape, SUM: tap.parameter.shape}
        for step in range(number * claim.steps, (number + 1) * claim.steps):
            optimizer.noise_source = StepNoise(random, step, shapes)
            optimizer.step_on(["w", SUM], {"w": torch.zeros(3), SUM: tap.clipped_sum(step)})
        assert bool(weight.any())
        taps.append(tap.released(last=True))
    found = audit(torch.stack([tap[SUM] for tap in taps]), taps[-1][COINS], claim)
    assert found.alarms == []
    assert found.small is not None
    assert found.large is not None
    assert found.sigma.value == pytest.approx(0.8, rel=0.04)
    assert found.small.value == pytest.approx(0.5, abs=4 * (found.small.high - found.small.value) / 2)
    assert found.large.value == pytest.approx(1.0, abs=4 * (found.large.high - found.large.value) / 2)
    assert found.sigma_by_round[1].value == measured_sigma(blanks(taps[0][SUM]), claim).value


def test_few_canaries_and_equal_coins_do_not_break_the_audit() -> None:
    taps, coins = simulate(CLAIM, rng(), coordinates=100)
    found = audit(taps[0], torch.zeros_like(coins[0]))
    assert found.small is None
    assert found.bound is not None
    assert found.bound.epsilon < 1


# -- the one-run bound --------------------------------------------------------------------------------


def binomial_tail(at_least: int, trials: int, share: float) -> float:
    """P[Binomial >= at_least] by adding up its terms."""
    terms = range(max(at_least, 0), trials + 1)
    return sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in terms)


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.05])
@pytest.mark.parametrize(("canaries", "guesses"), [(1, 1), (5, 5), (9, 4), (12, 12)])
def test_p_value_is_the_theorem_term_by_term(
    epsilon: float, delta: float, canaries: int, guesses: int
) -> None:
    share = math.exp(epsilon) / (1 + math.exp(epsilon))
    for right in range(guesses + 1):
        f = binomial_tail(right, guesses, share)
        gaps = ((binomial_tail(right - i, guesses, share) - f) / i for i in range(1, canaries + 1))
        want = min(1.0, f + 2 * canaries * delta * max(gaps))
        assert p_value(right, guesses, canaries, epsilon, delta) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.02])
def test_p_value_bounds_a_mechanism_that_is_exactly_dp(delta: float) -> None:
    """Randomised response on every coin, which with probability delta tells all: enumerated in full."""
    epsilon, coins = 1.2, 6
    share = math.exp(epsilon) / (1 + math.exp(epsilon))
    for right in range(coins + 1):
        exact = delta  # where all is told, every guess is right
        for flips in product((True, False), repeat=coins):  # which answers are true
            if sum(flips) >= right:
                exact += (1 - delta) * math.prod(share if true else 1 - share for true in flips)
        assert exact <= p_value(right, coins, coins, epsilon, delta) + 1e-12
        if not delta:
            assert exact == pytest.approx(p_value(right, coins, coins, epsilon, 0.0))


def test_lower_bound_is_where_the_p_value_reaches_five_percent() -> None:
    for right, guesses in ((500, 500), (90, 100), (60, 100)):
        bound = lower_bound(right, guesses, 500, 1e-5)
        assert p_value(right, guesses, 500, bound, 1e-5) < 0.05
        assert p_value(right, guesses, 500, bound + 2e-3, 1e-5) >= 0.05
    assert lower_bound(500, 500, 500, 0.0) == pytest.approx(5.11, abs=0.01)  # 0.05 ** (1 / 500)
    assert lower_bound(50, 100, 500, 0.0) == 0.0
    assert lower_bound(0, 0, 500, 0.0) == 0.0


def test_bound_stays_below_the_claim_and_above_nothing() -> None:
    # sigma 1, q .1, 100 steps: epsilon is about 6 at 1e-5.
    claim = replace(CLAIM, epsilon=6.0)
    bounds = []
    for seed in range(30):
        taps, coins = simulate(claim, rng(seed), coordinates=2000)
        found = one_run_bound(taps[0].double().sum(0), coins[0], claim, ROUNDS)
        assert 0 <= found.epsilon < claim.epsilon
        assert found.epsilon < found.ceiling < 8
        assert found.guesses == guesses_to_make(claim, 2000, ROUNDS) <= found.canaries == 1600
        bounds.append(found.epsilon)
    assert sum(bounds) / len(bounds) > 0.5


def test_canaries_without_noise_break_the_claim() -> None:
    taps, coins = simulate(CLAIM, rng(), noise=0.05)
    found = audit(taps[0], coins[0], replace(CLAIM, epsilon=1.0, delta=1e-7))
    assert found.bound is not None
    assert found.bound.epsilon > 1.0
    assert any("lower bound" in alarm for alarm in found.alarms)
