"""Random Fourier features of a Gaussian kernel (Rahimi & Recht 2007), in pairs, so that each has norm 1.

With frequencies w_j drawn from N(0, 1/s^2), phi(x) = sqrt(2/D) (cos w_j x, sin w_j x)_j has norm exactly 1,
and phi(x) phi(y) is an unbiased estimate of exp(-|x - y|^2 / 2 s^2). A constant coordinate is appended, so
that a sum of these over patients holds their number, too: as noisy as the rest (PRIVACY.md, rule 15).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from polyclinic.common.privacy.random import KeyedRandom

# Small, because it takes part in the norm that noise is measured by; large enough to tell the number.
CONSTANT = 0.3
BOUND = math.sqrt(1 + CONSTANT**2)


def frequencies(seed: str, width: int, length: int, bandwidth: float) -> Tensor:
    """Draw the public frequencies of a study.

    Args:
        seed: Public; the hash of the resolved study.
        width: Length d of an image's features.
        length: D, even.
        bandwidth: s of the kernel.

    Returns:
        `[D/2, d]`, float64.
    """
    stream = KeyedRandom(hashlib.sha256(f"fourier|{seed}".encode()).digest()).stream("frequencies")
    drawn = torch.from_numpy(stream.normal(length // 2 * width))
    return drawn.view(length // 2, width) / bandwidth


def fourier(features: Tensor, frequencies: Tensor) -> Tensor:
    """Map features `[n, d]` to `[n, D + 1]`, float64: norm 1, and the constant."""
    angles = features.double() @ frequencies.T
    mapped = torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(len(frequencies))
    return torch.cat([mapped, mapped.new_full((len(mapped), 1), CONSTANT)], dim=1)
