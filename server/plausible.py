"""How long a site's difference can be at most, from public numbers only.

A longer one was not made by the study's steps, whatever the images: by a fault, another code, or on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from polyclinic.common.generators.base import Tensors
from polyclinic.common.study import Study

# Relative error of fp32 sums over a round, and of writing a difference in bf16 (2^-9).
SLACK = 1.01
# A weight is rounded to fp32 (2^-24 of itself) at most four times a step: decay, step, and the difference.
ROUNDING = 2.0**-22


def adamw_steps(betas: tuple[float, float], steps: int) -> Iterator[float]:
    """Yield, for t = 1, 2, ..., the most that Adam's t-th step can move a coordinate, in learning rates.

    Adam moves by lr m̂/(√v̂ + ε), with m = (1-b1) Σ b1^(t-i) g_i, v = (1-b2) Σ b2^(t-i) g_i², and
    m̂ = m/(1-b1^t), v̂ = v/(1-b2^t). By Cauchy-Schwarz,

        |Σ b1^(t-i) g_i| = |Σ (b1²/b2)^((t-i)/2) b2^((t-i)/2) g_i|
                         <= √(Σ_{j<t} (b1²/b2)^j) √(Σ b2^(t-i) g_i²),

    so that whatever the gradients are, clipped, noised or nonsense,

        |m̂|/√v̂ <= (1-b1)/√(1-b2) √(Σ_{j<t} (b1²/b2)^j) √(1-b2^t)/(1-b1^t).

    It is 1 at the first step, equality is possible at every t, and for the usual betas it grows slowly to
    7.3. Kingma & Ba (2015, section 2.1) give (1-b1)/√(1-b2) = 3.2, which leaves out the sum over j: that is
    the largest step for one gradient after zeros, not for every sequence.

    Args:
        betas: b1 and b2.
        steps: Steps t, from 1.
    """
    first, second = betas
    if second == 0.0 < first:  # v is the last gradient's alone, which may be zero
        yield from (1.0 if t == 1 else math.inf for t in range(1, steps + 1))
        return
    ratio = first**2 / second if second else 0.0
    total = 0.0
    for t in range(1, steps + 1):
        total = 1.0 + ratio * total
        corrected = math.sqrt(1 - second**t) / (1 - first**t)
        yield (1 - first) / math.sqrt(1 - second) * math.sqrt(total) * corrected


def longest_difference(study: Study, number: int, state: Tensors) -> float:
    """Bound the Euclidean norm of what a site may send in a round.

    With d coordinates, learning rate lr(t), Adam's a(t) from `adamw_steps` and AdamW's decoupled decay w
    (Loshchilov & Hutter 2019), a step is x <- (1 - lr w) x - lr u with |u| <= a in each coordinate, so

        |x_t - x_0| <= |x_{t-1} - x_0| + lr w |x_{t-1}| + √d lr a,
        |x_t|       <= |1 - lr w| |x_{t-1}| + √d lr a.

    In int8 each coordinate of what is sent is off by half a step of its row, 1/254 of the row's largest
    entry, and holds as much from the round before.

    Args:
        study: Gives learning rates, betas, decay, steps and transport.
        number: Round, from 1.
        state: Trainable state the sites start from.
    """
    coordinates = sum(tensor.numel() for tensor in state.values())
    norm = math.sqrt(math.fsum(float(torch.linalg.vector_norm(t.double())) ** 2 for t in state.values()))
    longest = SLACK * _drift(study, number, norm, math.sqrt(coordinates))
    if study.federation.transport == "int8":
        largest = max(float(tensor.abs().max()) for tensor in state.values())
        longest += 2 / 253 * math.sqrt(coordinates) * SLACK * _drift(study, number, largest, 1.0)
    return longest


def _drift(study: Study, number: int, start: float, step: float) -> float:
    """Largest distance from the start after a round; `step` is the length of a step of 1 everywhere."""
    training = study.training
    first = (number - 1) * training.steps_per_round
    distance, size = 0.0, start
    for t, adam in enumerate(adamw_steps(training.betas, training.steps_per_round)):
        rate = study.learning_rate(first + t)
        distance += rate * training.weight_decay * size + rate * adam * step + ROUNDING * size
        size = abs(1 - rate * training.weight_decay) * size + rate * adam * step
    return distance
