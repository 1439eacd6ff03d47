"""What steps on gradients: it sees none of a private run's before they were clipped and noised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from polyclinic.common.study import Study


def adamw(parameters: Iterable[Tensor], study: Study) -> torch.optim.AdamW:
    """AdamW as the study sets it; a fresh one each round."""
    settings = study.training
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Proximal:
    """FedProx (Li et al. 2020, 1812.06127): pulls a site's weights back to those it was sent.

    Adds mu (w - w_start) to gradients that were clipped and noised already: a function of what may be
    known, so it costs no budget and changes no sensitivity.
    """

    def __init__(self, parameters: Iterable[Tensor], strength: float) -> None:
        self.pairs = [(p, p.detach().clone()) for p in parameters] if strength else []
        self.strength = strength

    def add(self) -> None:
        """Add the term to the gradients of this step."""
        for parameter, start in self.pairs:
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - start, alpha=self.strength)
