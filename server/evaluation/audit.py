"""What the audit tap shows at the coordinator: is a site's noise, scale and clip threshold what it claims?

A site's tap `[K]` (common/privacy/tap.py) is, in every round, a sum over the round's S steps of noise and
of the canaries that were sampled, divided by the site's public divisor. In units of C, and under the claim:

* a coordinate without a canary, or whose coin fell on tails, is N(0, sigma^2 S);
* any other adds c Binomial(S, q), with c = 0.5 / (1 + tau) for a canary of norm 0.5 C, and 1 / (1 + tau)
  for one of 10 C, which must have been clipped.

**Alarms.** False alarms are at most 2 % a study, over all sites, rounds and tests, by the union bound. Half
of it goes to the rounds: with R rounds planned and n sites heard in a round, each of them is tested at
0.01 / (R n) as soon as its reply is there. The other half goes to the end, when coins are known: each of
n sites has `END_TESTS` tests at 0.01 / (n END_TESTS). Every test is two-sided against the exact chi-square
(noise) or normal (canary means) law under the claim.

**Lower bound.** Steinke, Nasr & Jagielski 2023 (2305.08846), main theorem: let an (epsilon, delta)-DP
mechanism run on m canaries with independent fair coins, and let a guesser, from the output alone, guess
r coins and abstain on the others. Then P[at least v right] <= f(v) + 2 m delta max_i (f(v - i) - f(v)) / i
with f(v) = P[Binomial(r, e^epsilon / (1 + e^epsilon)) >= v]. Every epsilon at which this is below 5 % is
refuted. r follows from public numbers, before the output is looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats
from torch import Tensor

from polyclinic.common.privacy.tap import LARGE, NO_CANARY, SMALL, canary_norms

FALSE_ALARMS = 0.02
END_TESTS = 5  # noise, independence of rounds, small canaries, large canaries, lower bound
CONFIDENCE = 0.95  # of intervals and of the lower bound
_REHEARSALS = 8  # simulated studies by which the number of guesses is chosen


@dataclass(frozen=True)
class Claim:
    """The mechanism as a site and the study state it.

    Attributes:
        sigma: Noise in units of C.
        clip: C.
        divisor: Public constant.
        rate: q.
        steps: S, steps of a round.
        tau: Contributions were scaled by 1 / (1 + tau).
        epsilon: Of the whole study, so far.
        delta: Of that epsilon.
    """

    sigma: float
    clip: float
    divisor: float
    rate: float
    steps: int
    tau: float
    epsilon: float
    delta: float


class Measured(BaseModel):
    """A measured number with its 95 % interval beside what was claimed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float
    claimed: float


class LowerBound(BaseModel):
    """The one-run lower bound on epsilon.

    Attributes:
        epsilon: Refuted below this, at 95 %.
        ceiling: What perfect guesses would have certified with this many canaries.
        guesses: Coins guessed.
        right: Guesses that were right.
        canaries: Coins there were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: float
    ceiling: float
    guesses: int
    right: int
    canaries: int


class SiteAudit(BaseModel):
    """What the tap of one site shows.

    Attributes:
        site: Name.
        coordinates: K.
        sigma: Noise over all rounds heard, in units of C.
        sigma_by_round: Round to the noise in it, from coordinates without a canary.
        revealed: Whether the coins are known, so that canaries can be read.
        small: What canaries of norm 0.5 C came out as, in units of C.
        large: What canaries of norm 10 C came out as.
        bound: Lower bound on epsilon.
        epsilon: Claimed.
        alarms: One sentence for each test that failed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    coordinates: int
    sigma: Measured
    sigma_by_round: dict[int, Measured]
    revealed: bool = False
    small: Measured | None = None
    large: Measured | None = None
    bound: LowerBound | None = None
    epsilon: float
    alarms: list[str] = []


def round_level(rounds: int, sites: int) -> float:
    """Level of one site's test in one round: `rounds` are planned, `sites` were heard in this one."""
    return FALSE_ALARMS / 2 / (rounds * sites)


def end_level(sites: int) -> float:
    """Level of each of a site's tests at the end."""
    return FALSE_ALARMS / 2 / (sites * END_TESTS)


def blanks(tap: Tensor) -> Tensor:
    """Values of the coordinates without a canary, from `[..., K]`."""
    return tap[..., canary_norms(tap.shape[-1]) == NO_CANARY]


def measured_sigma(values: Tensor, claim: Claim) -> Measured:
    """Estimate the noise from coordinates that hold nothing else.

    Args:
        values: Sums over a round each, any shape.
        claim: Gives the scale.

    Returns:
        Sigma in units of C, with its chi-square interval.
    """
    count, total = values.numel(), _squares(values, claim)
    half = (1 - CONFIDENCE) / 2
    ends = (float(stats.chi2.isf(share, count)) for share in (half, 1 - half))
    low, high = (claim.sigma * math.sqrt(total / end) for end in ends)
    return Measured(value=claim.sigma * math.sqrt(total / count), low=low, high=high, claimed=claim.sigma)


def noise_p(values: Tensor, claim: Claim) -> float:
    """Two-sided p-value of "these values are noise of the claimed deviation"."""
    total, count = _squares(values, claim), values.numel()
    return 2 * float(min(stats.chi2.cdf(total, count), stats.chi2.sf(total, count)))


def round_alarm(tap: Tensor, claim: Claim, level: float) -> str | None:
    """Test the noise of one round, before any coin is known.

    Args:
        tap: `[K]`.
        claim: Of the site that sent it.
        level: See `round_level`.
    """
    if noise_p(blanks(tap), claim) >= level:
        return None
    return f"noise {_words(measured_sigma(blanks(tap), claim))}"


def audit_site(
    site: str,
    taps: dict[int, Tensor],
    coins: Tensor | None,
    claim: Claim,
    *,
    rounds: int,
    heard: dict[int, int],
) -> SiteAudit:
    """Audit one site by everything it has sent so far.

    Args:
        site: Its name.
        taps: Round to tap `[K]`.
        coins: `[K]`, 1 where a coin fell on heads; None before the last round.
        claim: Its mechanism.
        rounds: Rounds the study plans.
        heard: Round to the number of sites heard in it.
    """
    alarms = []
    for number, tap in sorted(taps.items()):
        alarm = round_alarm(tap, claim, round_level(rounds, heard[number]))
        alarms += [f"round {number}: {alarm}"] if alarm else []
    stacked = torch.stack([taps[number] for number in sorted(taps)])
    found = SiteAudit(
        site=site,
        coordinates=stacked.shape[1],
        sigma=measured_sigma(blanks(stacked), claim),
        sigma_by_round={number: measured_sigma(blanks(tap), claim) for number, tap in sorted(taps.items())},
        epsilon=claim.epsilon,
        alarms=alarms,
    )
    if coins is None:
        return found
    return _at_the_end(found, stacked, coins > 0.5, claim, end_level(heard[rounds]))


def _at_the_end(found: SiteAudit, taps: Tensor, coins: Tensor, claim: Claim, level: float) -> SiteAudit:
    """Add what can be said when the coins are known."""
    rounds, total = len(taps), taps.double().sum(0)
    norms = canary_norms(taps.shape[1])
    silent = (norms == NO_CANARY) | ~coins
    sigma = measured_sigma(taps[:, silent], claim)
    alarms = list(found.alarms)
    wrong_noise = noise_p(taps[:, silent], claim) < level
    if wrong_noise:
        alarms.append(f"whole study: noise {_words(sigma)}")
    # Noise that comes back in every round adds up to more than independent noise does.
    between = total[silent] / math.sqrt(rounds)
    if rounds > 1 and sigma.value and noise_p(between, claim) < level:
        ratio = measured_sigma(between, claim).value / sigma.value
        if not 0.9 < ratio < 1.1:
            alarms.append(
                f"noise of the rounds is not independent: their sum deviates {ratio:.2f} times as much"
            )
    scales: dict[float, Measured | None] = {}
    for norm, threshold in ((SMALL, SMALL), (LARGE, 1.0)):
        values = total[(norms == norm) & coins]
        scales[norm], p = _canary_scale(values, threshold / (1 + claim.tau), claim, rounds * claim.steps)
        if p < level:
            alarms.append(f"canaries of norm {norm:g} C {_words(scales[norm])}")
    if wrong_noise and _same_factor(sigma, scales):
        alarms.append(
            "noise and canaries seem to be off by the same factor: look at the divisor, or at C in both"
        )
    bound = one_run_bound(total, coins, claim, rounds)
    if p_value(bound.right, bound.guesses, bound.canaries, claim.epsilon, claim.delta) < level:
        alarms.append(f"lower bound on epsilon {bound.epsilon:.2f} is above the claimed {claim.epsilon:.2f}")
    return found.model_copy(
        update={
            "sigma": sigma,
            "revealed": True,
            "small": scales[SMALL],
            "large": scales[LARGE],
            "bound": bound,
            "alarms": alarms,
        }
    )


def one_run_bound(total: Tensor, coins: Tensor, claim: Claim, rounds: int) -> LowerBound:
    """Guess the canaries' coins and bound epsilon from below.

    Args:
        total: `[K]`, sums over all rounds heard.
        coins: `[K]`, the truth, read only to count right guesses.
        claim: The mechanism; it decides how many coins are guessed.
        rounds: Rounds in `total`.
    """
    norms = canary_norms(len(total)).numpy()
    there = norms != NO_CANARY
    scores = _scores(total.double().numpy()[there] * claim.divisor / claim.clip, norms[there], claim, rounds)
    guesses = guesses_to_make(claim, len(total), rounds)
    surest = np.argsort(-np.abs(scores), kind="stable")[:guesses]
    right = int(((scores[surest] > 0) == coins.numpy()[there][surest]).sum())
    canaries = int(there.sum())
    return LowerBound(
        epsilon=lower_bound(right, guesses, canaries, claim.delta),
        ceiling=lower_bound(canaries, canaries, canaries, claim.delta),
        guesses=guesses,
        right=right,
        canaries=canaries,
    )


@lru_cache(maxsize=256)
def guesses_to_make(claim: Claim, coordinates: int, rounds: int) -> int:
    """Choose r, the number of coins to guess, by rehearsing the claimed mechanism under a fixed seed."""
    norms = canary_norms(coordinates).numpy()
    norms = norms[norms != NO_CANARY]
    steps, rng = rounds * claim.steps, np.random.default_rng(0)
    right = np.zeros(len(norms))
    for _ in range(_REHEARSALS):
        coins = rng.random(len(norms)) < 0.5
        there = coins * rng.binomial(steps, claim.rate, len(norms)) * np.minimum(norms, 1.0) / (1 + claim.tau)
        values = there + claim.sigma * math.sqrt(steps) * rng.standard_normal(len(norms))
        scores = _scores(values, norms, claim, rounds)
        order = np.argsort(-np.abs(scores), kind="stable")
        right += np.cumsum((scores[order] > 0) == coins[order]) / _REHEARSALS
    candidates = sorted({round(r) for r in np.geomspace(min(8, len(norms)), len(norms), 20)})
    return max(candidates, key=lambda r: lower_bound(int(right[r - 1]), r, len(norms), claim.delta))


def p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Bound the chance of so many right guesses about an (epsilon, delta)-DP mechanism.

    Args:
        right: v, right guesses.
        guesses: r.
        canaries: m.
        epsilon: Hypothesis; may be infinite.
        delta: Hypothesis.
    """
    share = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, share))
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, share))
    worst = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, tail + 2 * canaries * delta * worst)


def lower_bound(right: int, guesses: int, canaries: int, delta: float) -> float:
    """Largest epsilon (to 0.001) that this many right guesses refute at 95 %; 0 where they refute none."""
    low, high = 0.0, 1.0
    if p_value(right, guesses, canaries, low, delta) >= 1 - CONFIDENCE:
        return 0.0
    while p_value(right, guesses, canaries, high, delta) < 1 - CONFIDENCE:
        low, high = high, 2 * high
    while high - low > 1e-3:
        middle = (low + high) / 2
        refuted = p_value(right, guesses, canaries, middle, delta) < 1 - CONFIDENCE
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _squares(values: Tensor, claim: Claim) -> float:
    """Sum of squares in units of the claimed variance: chi-square with as many degrees of freedom."""
    scaled = values.double() * (claim.divisor / (claim.clip * claim.sigma * math.sqrt(claim.steps)))
    return float(scaled.square().sum())


def _scores(
    values: NDArray[np.float64], norms: NDArray[np.float32], claim: Claim, rounds: int
) -> NDArray[np.float64]:
    """Log likelihood ratio of heads to tails, the canary's binomial taken as its mean."""
    steps = rounds * claim.steps
    mean = np.minimum(norms, 1.0) / (1 + claim.tau) * claim.rate * steps
    return mean * (values - mean / 2) / (claim.sigma**2 * steps)


def _canary_scale(values: Tensor, claimed: float, claim: Claim, steps: int) -> tuple[Measured | None, float]:
    """What canaries whose coin fell on heads came out as, in units of C, and the p-value of the claim."""
    count = len(values)
    if count < 2:
        return None, 1.0
    each = values * (claim.divisor / (claim.clip * claim.rate * steps))
    mean, spread = float(each.mean()), float(each.std()) / math.sqrt(count)
    half = float(stats.t.isf((1 - CONFIDENCE) / 2, count - 1)) * spread
    variance = claim.sigma**2 * steps + claimed**2 * steps * claim.rate * (1 - claim.rate)
    deviation = math.sqrt(variance / count) / (claim.rate * steps)
    p = 2 * float(stats.norm.sf(abs(mean - claimed) / deviation))
    return Measured(value=mean, low=mean - half, high=mean + half, claimed=claimed), p


def _same_factor(sigma: Measured, scales: dict[float, Measured | None]) -> bool:
    """Tell whether canaries follow the factor by which the noise is off, rather than their claim."""

    def misfit(factor: float) -> float:
        known = [scale for scale in scales.values() if scale]
        return sum(((m.value - factor * m.claimed) / max(m.high - m.value, 1e-12)) ** 2 for m in known)

    return misfit(sigma.value / sigma.claimed) < misfit(1.0) > 2


def _words(found: Measured | None) -> str:
    if found is None:
        return "not measured"
    return f"measured {found.value:.3g} ({found.low:.3g} to {found.high:.3g}), claimed {found.claimed:.3g}"
