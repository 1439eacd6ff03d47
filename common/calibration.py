"""The noise of a study that is being planned or approved; a round only ever checks what it claims.

What a site spends follows from `privacy.accounting.claim` and its ledger, whatever sigma is chosen here.
"""

from __future__ import annotations

from functools import lru_cache

from polyclinic.common.privacy.accounting import epsilon_prv, epsilon_rdp
from polyclinic.common.refusals import BadInput

MAX_SIGMA = 1e4


@lru_cache(maxsize=256)
def calibrate(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Smallest sigma (to 0.1 %) whose claim stays within epsilon.

    Args:
        epsilon: Budget.
        delta: As in `claim`.
        rate: Sampling rate q.
        steps: Steps of the whole schedule.

    Raises:
        BadInput: Not even a huge sigma is enough.
    """

    def enough(sigma: float) -> bool:
        history = ((sigma, rate, steps),)
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
