"""One noisy sum over patients: what a site releases beside its rounds (PRIVACY.md, rules 15 and 16).

Each patient adds one vector, a function of that patient and of public things alone, whose norm is held to
`bound` here, whatever made it. So a patient added or removed moves the sum by at most `bound`, and

    sum over patients  +  N(0, (z x bound)^2 I)

is the Gaussian mechanism with noise z: (sigma = z, q = 1, 1 step) in a ledger.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from polyclinic.common.privacy.random import Stream

# Every vector is scaled by 1 / (1 + TAU): above what float64 sums over a million patients are off by.
TAU = 1e-6


def bounded(vector: Tensor, bound: float) -> Tensor:
    """Hold one patient's vector to a norm of at most `bound` / (1 + TAU), in float64.

    A vector that is not finite becomes zero (rule 2).
    """
    vector = vector.double()
    norm = torch.linalg.vector_norm(vector)
    if not bool(torch.isfinite(norm)):
        return torch.zeros_like(vector)
    return vector * (min(1.0, bound / max(float(norm), 1e-300)) / (1 + TAU))


def noisy_sum(vectors: Iterable[Tensor], width: int, *, bound: float, noise: float, stream: Stream) -> Tensor:
    """Add up the patients' vectors and noise.

    Args:
        vectors: `[width]`, one a patient.
        width: Length of a vector.
        bound: Most that one patient can add.
        noise: z, in units of `bound`; 0 only where the study is not private.
        stream: Randomness of this attempt that nothing else draws from.

    Returns:
        `[width]`, fp32: rounded once, after the noise was added in float64.
    """
    total = torch.zeros(width, dtype=torch.float64)
    for vector in vectors:
        total += bounded(vector, bound)
    return (total + stream.protective_normal((width,), noise * bound)).float()
