"""How well DP-CMMD finds a known distance: 1,500 patients at 5 sites, the number of patients noisy, too.

Real patients and drawn images are Gaussian vectors whose means differ; the truth is the
exact squared MMD of the two distributions under the same kernel. Every repeat draws new patients, new
images, new frequencies and new noise, as a new study would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from polyclinic.common.features.fourier import BOUND, fourier, frequencies
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.sums import TAU, noisy_sum
from polyclinic.server.evaluation.federated import noisy_mmd

WIDTH, PROMPTS = 64, 50


@dataclass(frozen=True)
class Case:
    """Patients over all sites, sites, images drawn, D, z (0: no noise)."""

    patients: int
    sites: int
    images: int
    features: int
    noise: float


def truth(shift: float, bandwidth: float, width: int = WIDTH) -> float:
    """Exact squared MMD between N(0, I) and N(mean of length `shift`, I) under the Gaussian kernel.

    E k(x, y) for x - y ~ N(mu, 2 I) is (s^2 / (s^2 + 2))^(d/2) exp(-|mu|^2 / (2 (s^2 + 2))).
    """
    spread = bandwidth**2
    same = (spread / (spread + 2)) ** (width / 2)
    return 2.0 * float(same) * (1 - math.exp(-(shift**2) / (2 * (spread + 2))))


def once(case: Case, shift: float, bandwidth: float, repeat: int) -> tuple[float, float, float]:
    """One study: the estimate, the deviation it states, and the noisy number of patients."""
    generator = torch.Generator().manual_seed(repeat)
    drawn = frequencies(f"study {repeat}", WIDTH, case.features, bandwidth)
    real = fourier(torch.randn(case.patients, WIDTH, generator=generator), drawn)
    images = torch.randn(case.images, WIDTH, generator=generator)
    images[:, 0] += shift
    total = torch.zeros(case.features + 1, dtype=torch.float64)
    for site in real.chunk(case.sites):
        stream = KeyedRandom.from_os().stream("noise", "fidelity")
        total += (1 + TAU) * noisy_sum(
            site, case.features + 1, bound=BOUND, noise=case.noise, stream=stream
        ).double()
    variance = case.sites * ((1 + TAU) * case.noise * BOUND) ** 2
    groups = [str(i % PROMPTS) for i in range(case.images)]
    return noisy_mmd(total, variance, fourier(images, drawn), groups)


def spread_of(case: Case, shift: float, bandwidth: float, repeats: int) -> dict[str, float]:
    """Repeat a case: mean and deviation of the estimate, mean stated deviation, deviation of the number."""
    found = torch.tensor([once(case, shift, bandwidth, r) for r in range(repeats)], dtype=torch.float64)
    return {
        "value": float(found[:, 0].mean()),
        "sd": float(found[:, 0].std()),
        "stated": float(found[:, 1].mean()),
        "patients": float(found[:, 2].mean()),
        "patients_sd": float(found[:, 2].std()),
    }
