"""The noise of a study that is being planned or approved; a round only ever checks what it claims.

What a site spends follows from `privacy.accounting.claim` and its ledger, whatever sigma is chosen here.
"""

from __future__ import annotations

import math
from functools import lru_cache

from polyclinic.common.privacy.accounting import History, epsilon_prv, epsilon_rdp
from polyclinic.common.refusals import BadInput
from polyclinic.common.release_settings import ReleaseSettings
from polyclinic.common.settings import PrivacySettings
from polyclinic.common.study import Study

MAX_SIGMA = 1e4
WIDTH = 1e-3


@lru_cache(maxsize=256)
def calibrate(epsilon: float, delta: float, rate: float, steps: int, beside: History = ()) -> float:
    """Smallest sigma (to 0.1 %) whose claim stays within epsilon.

    Args:
        epsilon: Budget.
        delta: As in `claim`.
        rate: Sampling rate q.
        steps: Steps of the whole schedule.
        beside: What is released beside it, within the same epsilon.

    Raises:
        BadInput: Not even a huge sigma is enough.
    """
    if beside and not epsilon_prv(beside, delta) < epsilon:
        raise BadInput(
            f"privacy.epsilon = {epsilon:g} is no more than what releases.fidelity_epsilon and "
            "releases.copies_epsilon take; lower those, or allow more here"
        )

    ruled_in = math.inf

    def spent(sigma: float) -> float:
        nonlocal ruled_in
        history = (*beside, (sigma, rate, steps))
        # PRV's grid takes gigabytes where sigma is far too small, and its sums may end in NaN: RDP rules
        # those out first, and a NaN is never enough.
        if sigma < ruled_in and epsilon_rdp(history, delta) > 50 + 10 * epsilon:
            return math.inf
        ruled_in = min(ruled_in, sigma)
        value = epsilon_prv(history, delta)
        return math.inf if math.isnan(value) else value

    low, over = 0.3, math.inf  # below this the accountants' discretisation no longer fits in memory
    high = 1.0
    while (under := spent(high)) > epsilon:
        low, over, high = high, under, 2 * high
        if high > MAX_SIGMA:
            raise BadInput(
                f"privacy.epsilon = {epsilon:g} cannot be met in {steps} steps at q = {rate:g}; "
                "raise epsilon, or take fewer steps"
            )
    above = True
    while high - low > WIDTH * high:
        middle = (low + high) / 2
        if over < math.inf and under > 0:
            # The logarithm of epsilon is nearly a line in that of sigma. A step past where they meet, to one
            # side and then the other, closes the bracket from both.
            share = math.log(over / epsilon) / math.log(over / under)
            met = low * (high / low) ** share * (1 + WIDTH * (0.4 if above else -0.4))
            middle = min(max(met, low + 0.01 * (high - low)), high - 0.01 * (high - low))
        value = spent(middle)
        if above := value > epsilon:
            low, over = middle, value
        else:
            high, under = middle, value
    return round(high + 5e-5, 4)


def release_noise(privacy: PrivacySettings, releases: ReleaseSettings) -> dict[str, float]:
    """Noise z of each charged extra release, in units of what one patient adds; 0 where not private."""
    if not privacy.enabled:
        return dict.fromkeys(releases.epsilons, 0.0)
    return {name: calibrate(own, privacy.delta, 1.0, 1) for name, own in releases.epsilons.items()}


def study_noise(study: Study, epsilon: float) -> tuple[float, dict[str, float], History]:
    """Choose the noise of a private study so that rounds and extra releases together stay within epsilon.

    Returns:
        sigma of the rounds, z of each extra release by name, and the history they make.

    Raises:
        BadInput: It cannot be met.
    """
    privacy, noise = study.privacy, release_noise(study.privacy, study.releases)
    beside = tuple((z, 1.0, 1) for z in noise.values())
    sigma = calibrate(epsilon, privacy.delta, privacy.sampling_rate, study.total_steps, beside)
    return sigma, noise, (*beside, (sigma, privacy.sampling_rate, study.total_steps))
