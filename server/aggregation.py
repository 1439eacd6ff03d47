"""From the sites' differences to the next state: a mean with public weights."""

from __future__ import annotations

from collections.abc import Iterable

from polyclinic.common.generators.base import Tensors
from polyclinic.common.settings import FederationSettings


def weighted_mean(differences: Iterable[tuple[str, Tensors]], settings: FederationSettings) -> Tensors:
    """Average differences one at a time, so that memory does not grow with the sites.

    Args:
        differences: Site name and difference, in a fixed order, so that sums are reproducible.
        settings: Gives the public weights; they are renormalised over the sites that replied.
    """
    total: Tensors = {}
    weights = 0.0
    for site, difference in differences:
        weight = 1.0 if settings.weights == "equal" else settings.weights[site]
        weights += weight
        for name, tensor in difference.items():
            if name in total:
                total[name].add_(tensor, alpha=weight)
            else:
                total[name] = tensor * weight
    return {name: tensor / weights for name, tensor in total.items()}


def advance(
    state: Tensors, average: Tensors, difference: Tensors, settings: FederationSettings
) -> tuple[Tensors, Tensors]:
    """Take the server's step and update the moving average.

    Args:
        state: Trainable state of the round.
        average: Its exponential moving average over rounds; the generator that is judged.
        difference: Mean difference of the sites.
        settings: Server learning rate and EMA decay.

    Returns:
        New state and new average.
    """
    new = {name: tensor + settings.server_learning_rate * difference[name] for name, tensor in state.items()}
    return new, {name: average[name].lerp(tensor, 1 - settings.ema) for name, tensor in new.items()}
