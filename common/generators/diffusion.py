"""Noising and targets of the two kinds of diffusion that the families use.

Both take a time in [0, 1), 1 being pure noise, as a view's uniform number gives it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Noised:
    """What a network is asked.

    Attributes:
        sample: Noisy latents, `[B, ...]`.
        time: As the network's own pipeline tells it, `[B]`.
        target: What it should answer.
        weight: Weight of each view's loss, `[B]`; None for 1.
    """

    sample: Tensor
    time: Tensor
    target: Tensor
    weight: Tensor | None = None


def shift_time(time: Tensor, shift: float) -> Tensor:
    """Move diffusion times towards noise (Esser et al. 2024, 2403.03206): s t / (1 + (s - 1) t).

    Args:
        time: In [0, 1); 1 is pure noise.
        shift: s, above 0; 1 changes nothing, 3 moves the median from 0.5 to 0.75.

    Returns:
        Times in [0, 1], of the same shape.
    """
    return shift * time / (1 + (shift - 1) * time)


def ddpm(
    latent: Tensor, noise: Tensor, time: Tensor, alphas: Tensor, prediction: str, snr_gamma: float | None
) -> Noised:
    """Noise by a variance-preserving schedule (Ho et al. 2020, 2006.11239).

    The target is epsilon, or v (Salimans & Ho 2022, 2202.00512); min-SNR weighted where asked (2303.09556).

    Args:
        latent: `[B, C, h, w]`.
        noise: The same shape.
        time: `[B]` in [0, 1]; cut into as many steps as there are alphas.
        alphas: Cumulative products of the schedule, `[T]`.
        prediction: `epsilon`, `v_prediction` or `sample`.
        snr_gamma: Cap of the weight; None for no weights.
    """
    # A gather instead of indexing keeps this a pure function that torch.func can map.
    step = (time * len(alphas)).long().clamp(0, len(alphas) - 1)
    alpha = alphas.gather(0, step)[(slice(None), *(None,) * (latent.ndim - 1))]
    sample = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    v = prediction == "v_prediction"
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latent if v else noise
    if prediction == "sample":
        target = latent
    weight = None
    if snr_gamma is not None:
        snr = (alpha / (1 - alpha)).flatten()
        weight = snr.clamp(max=snr_gamma)
        if prediction != "sample":  # whose error is already one of the latent
            weight = weight / (snr + 1 if v else snr)
    return Noised(sample, step, target, weight)


def flow(latent: Tensor, noise: Tensor, sigma: Tensor, *, scale: float) -> Noised:
    """Noise along a straight line (Lipman et al. 2022, 2210.02747); the target is its direction.

    Args:
        latent: `[B, ...]`.
        noise: The same shape.
        sigma: Share of noise, `[B]` in [0, 1], already shifted.
        scale: What the network's pipeline multiplies sigma with.
    """
    share = sigma[(slice(None), *(None,) * (latent.ndim - 1))]
    return Noised((1 - share) * latent + share * noise, sigma * scale, noise - latent)


def view_errors(predicted: Tensor, noised: Noised, loss: str) -> Tensor:
    """Loss of each view, `[B]`: `l1` or `mse`, weighted."""
    error = (predicted.float() - noised.target).flatten(1)
    found = error.abs().mean(1) if loss == "l1" else error.square().mean(1)
    return found if noised.weight is None else found * noised.weight


def cumulative_alphas(betas: Tensor) -> Tensor:
    """Cumulative products of 1 - beta, `[T]`, fp32."""
    return torch.cumprod(1 - betas, 0).float()
