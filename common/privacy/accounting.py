"""How much privacy a history of noised steps has cost.

Unit: the patient; neighbours differ by one patient added or removed; sampler: Poisson with rate q.
Within a study the upper end of Opacus's PRV accountant (Gopi et al. 2021, 2106.02848) is claimed. It
must lie between dp-accounting's privacy loss distribution (both directions) less 1 % and Opacus's
RDP; otherwise the run refuses (PRIVACY.md, rule 5).
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant

from polyclinic.common.refusals import Refusal

# (sigma, q, steps): noise standard deviation in units of C, sampling rate, number of steps.
History = tuple[tuple[float, float, int], ...]

# Whole numbers from 12 on: Opacus's series for fractional orders cancels to nonsense at large ones, and
# ended in a negative epsilon for sigma above 20.
RDP_ORDERS = [
    *(1 + x / 10 for x in range(1, 100)),
    *range(12, 64),
    *(round(64 * 2 ** (x / 4)) for x in range(17)),
]


def epsilon_prv(history: History, delta: float) -> float:
    """Upper end of the PRV accountant's epsilon; its own error is kept under a hundredth of it."""
    accountant = PRVAccountant()
    accountant.history = list(history)
    with np.errstate(divide="ignore"):  # log(1 - q) at q = 1, which is not used there
        coarse = float(accountant.get_epsilon(delta))
        if coarse <= 1:
            coarse = float(accountant.get_epsilon(delta, eps_error=max(coarse / 100, 1e-4)))
    return coarse


@lru_cache(maxsize=256)
def epsilon_rdp(history: History, delta: float) -> float:
    """Renyi accountant's epsilon, orders up to 1024 (Mironov et al. 2019, 1908.10530)."""
    accountant = RDPAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():
        # "optimal order is the largest/smallest alpha": still an upper bound.
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta, alphas=RDP_ORDERS))


@lru_cache(maxsize=256)
def epsilon_pld(history: History, delta: float) -> float:
    """dp-accounting's privacy loss distribution, for adding and for removing a patient."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for sigma, rate, steps in history:
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def claim(history: History, delta: float) -> float:
    """Epsilon that is claimed for a history.

    Args:
        history: Steps taken; empty costs nothing.
        delta: Probability that the guarantee may fail.

    Raises:
        Refusal: `accountant-disagrees` where the three accountants are not in order.
    """
    if not history:
        return 0.0
    value = epsilon_prv(history, delta)
    low, high = epsilon_pld(history, delta), epsilon_rdp(history, delta)
    if not 0.99 * low <= value <= high:
        raise Refusal("accountant-disagrees", f"PLD {low:.4f}, PRV {value:.4f}, RDP {high:.4f}")
    return value
