"""Adversarial fine-tuning of a VAE's decoder on public images, so that reconstructions keep fine texture.

Squared error alone gives the mean of what a latent may stand for, which is a blur: pixel by pixel close,
and unlike any real image to a feature extractor. The recipe is that of VQGAN and latent diffusion (Esser et
al. 2021, 2012.09841; Rombach et al. 2022, 2112.10752): a patch discriminator (Isola et al. 2017, 1611.07004)
with the hinge loss. Its weight is fixed: scaled by the ratio of gradients, as in VQGAN, it blew up here
whenever the discriminator was sure for a while (weight 78, 20 dB, instead of 0.004 and 27 dB). The encoder
stays as it is, so latents and everything trained on them stay valid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.common.generator_settings import VaeTraining
from polyclinic.common.progress import track


def patch_discriminator() -> nn.Sequential:
    """Judge overlapping patches of about 22 pixels: `[B, 3, H, W]` to one score a patch, real is high."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.GroupNorm(8, 128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 1, 3, padding=1),
    )


def sharpen(
    vae: AutoencoderKL,
    draw_batch: Callable[[], Tensor],
    decode: Callable[[Tensor], Tensor],
    reconstruction: Callable[[Tensor, Tensor], Tensor],
    settings: VaeTraining,
) -> None:
    """Fine-tune the decoder against a discriminator for `settings.adversarial_steps`.

    Args:
        vae: Trained autoencoder; its encoder is left unchanged.
        draw_batch: Draws public images `[B, 3, H, W]` in [-1, 1].
        decode: Latents to images.
        reconstruction: Loss of (output, target) that keeps the decoder close to the target.
        settings: Steps, learning rate and weight.
    """
    decoder = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    discriminator = patch_discriminator()
    rate = settings.adversarial_learning_rate
    generator_step = torch.optim.Adam(decoder, lr=rate, betas=(0.5, 0.9))
    discriminator_step = torch.optim.Adam(discriminator.parameters(), lr=rate, betas=(0.5, 0.9))
    with track("sharpen VAE", settings.adversarial_steps) as advance:
        for step in range(settings.adversarial_steps):
            # A linear way down at the end: the last steps settle what the players fought over.
            share = min(1.0, 4 * (1 - step / settings.adversarial_steps))
            for optimizer in (generator_step, discriminator_step):
                optimizer.param_groups[0]["lr"] = rate * share
            batch = draw_batch()
            with torch.no_grad():
                latent = vae.encode(batch).latent_dist.sample()
            output = decode(latent)
            close = reconstruction(output, batch)
            discriminator.requires_grad_(False)
            real = -discriminator(output).mean()
            generator_step.zero_grad()
            (close + settings.adversarial_weight * real).backward()
            generator_step.step()
            discriminator.requires_grad_(True)
            hinge = (
                F.relu(1 - discriminator(batch)).mean() + F.relu(1 + discriminator(output.detach())).mean()
            )
            discriminator_step.zero_grad()
            hinge.backward()
            discriminator_step.step()
            advance(1)
