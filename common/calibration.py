"""The noise of a study that is being planned or approved; a round only ever checks what it claims.

What a site spends follows from `privacy.accounting.claim` and its ledger, whatever sigma is chosen here.
"""

from __future__ import annotations

from functools import lru_cache

from polyclinic.common.privacy.accounting import History, epsilon_prv, epsilon_rdp
from polyclinic.common.refusals import BadInput
from polyclinic.common.release_settings import ReleaseSettings
from polyclinic.common.settings import PrivacySettings
from polyclinic.common.study import Study

MAX_SIGMA = 1e4


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

    def enough(sigma: float) -> bool:
        history = (*beside, (sigma, rate, steps))
        # PRV's grid takes gigabytes where sigma is far too small, and its sums may end in NaN: RDP rules
        # those out first, and a NaN is never enough.
        return epsilon_rdp(history, delta) <= 50 + 10 * epsilon and epsilon_prv(history, delta) <= epsilon

    high = 1.0
    while not enough(high):
        high *= 2
        if high > MAX_SIGMA:
            raise BadInput(
                f"privacy.epsilon = {epsilon:g} cannot be met in {steps} steps at q = {rate:g}; "
                "raise epsilon, or take fewer steps"
            )
    low = 0.3  # below this the accountants' discretisation no longer fits in memory
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
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
