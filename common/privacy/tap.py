"""The audit tap: further coordinates of every private step that no patient's gradient touches.

Each coordinate belongs to one synthetic canary, whose gradient is that coordinate alone; one in five
has none, so that the noise can be measured before any coin is known. A canary whose coin, tossed once a
study, came up heads is sampled at q each step like a patient. It passes through the patients' own norm,
factor and sum code, gets the same noise and divisor, and never meets AdamW or a weight. What a round
sends is the sum over its steps; the coins follow with the last round (PRIVACY.md, rule 17).
"""

from __future__ import annotations

import secrets

import numpy as np
import torch
from torch import Tensor, nn

from polyclinic.common.generators.base import Tensors
from polyclinic.common.privacy.clipping import accumulate
from polyclinic.common.privacy.random import KeyedRandom

# Names on the wire and of the noise stream; a slash cannot be part of a parameter's name.
SUM, COINS = "tap/sum", "tap/coins"

# Norms in units of C: below the threshold, where scale and divisor show, and far above it.
NO_CANARY, SMALL, LARGE = 0.0, 0.5, 10.0
_PATTERN = (NO_CANARY, SMALL, LARGE, SMALL, LARGE)
_AT_ONCE = 64  # canaries whose gradients are in memory together


def canary_norms(coordinates: int) -> Tensor:
    """Norm of each coordinate's canary in units of C, `[K]`; 0 where there is none."""
    return torch.tensor(_PATTERN).repeat(coordinates // len(_PATTERN) + 1)[:coordinates]


def toss_coins(coordinates: int) -> str:
    """Toss a fair coin for each coordinate by the operating system's randomness: a word of 0 and 1."""
    return "".join(secrets.choice("01") for _ in range(coordinates))


def tap_like(coordinates: int, *, last: bool) -> Tensors:
    """Zeros named and shaped as what a round sends of the tap; nothing where there is no tap."""
    names = [SUM] * (coordinates > 0) + [COINS] * (coordinates > 0 and last)
    return {name: torch.zeros(coordinates) for name in names}


class Tap:
    """The tap of one attempt at a round, with the study's `coins`, q, C and tau (`margin`).

    Attributes:
        parameter: `[K]`; the optimizer gives its gradient noise and divides it.
    """

    def __init__(
        self, coins: str, random: KeyedRandom, *, rate: float, clip: float, margin: float, device: str
    ) -> None:
        self._coins = np.array([coin == "1" for coin in coins])
        self._norms = canary_norms(len(coins)).to(device) * clip
        self._random, self._rate, self._clip, self._margin = random, rate, clip, margin
        self.parameter = nn.Parameter(torch.zeros(len(coins), device=device))
        self._total = torch.zeros(len(coins), device=device, dtype=torch.float64)

    def clipped_sum(self, step: int) -> Tensor:
        """Clipped sum `[K]` of the canaries that are in this step."""
        inside = self._random.stream("canary", step).uniform(len(self._coins)) < self._rate
        sums = {SUM: torch.zeros_like(self._norms)}
        for part in torch.from_numpy(np.flatnonzero(inside & self._coins)).split(_AT_ONCE):
            gradients = self._norms.new_zeros(len(part), len(self._coins))
            gradients[torch.arange(len(part)), part] = self._norms[part]
            accumulate(sums, {SUM: gradients}, self._clip, margin=self._margin)
        return sums[SUM]

    def collect(self) -> None:
        """Take the step's noised, divided gradient; an optimizer passes over what has none."""
        if self.parameter.grad is None:
            raise RuntimeError("the tap was given no noise in this step")
        self._total += self.parameter.grad
        self.parameter.grad = None

    def released(self, *, last: bool) -> Tensors:
        """What the round sends: the sum over its steps, fp32, and after the last round the coins."""
        sent = {SUM: self._total.float().cpu(), COINS: torch.from_numpy(self._coins).float()}
        return {name: sent[name] for name in tap_like(len(self._coins), last=last)}
