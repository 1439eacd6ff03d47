"""What Kandinsky 2.2 and 3 share: latents of a MoVQ autoencoder (Zheng et al. 2022, 2209.09002).

Its encoder has no posterior: an image has one latent, taken before quantisation, as its decoder takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyclinic.common.generators.base import Tensors, Views
from polyclinic.common.generators.large import LargeModel


class MovqModel(LargeModel):
    """A large model over MoVQ latents."""

    vae_part = "movq"
    multiple = 64  # its pipelines round sizes up to that

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensors:
        """Return the encoder's `latent`, `[B, C, h, w]`; the denoiser sees it unscaled."""
        movq = self.encoders.movq
        nn.Module.to(movq, torch.float32)
        latent = movq.encode(pixels.to(self.device, torch.float32)).latents
        nn.Module.to(movq, self.dtype)
        return {"latent": latent}

    def normal_shape(self, image: Tensors) -> tuple[int, ...]:
        """One latent a view, for the diffusion noise."""
        return (1, *image["latent"].shape[1:])

    def latents(self, views: Views) -> Tensor:
        """Take the latent itself: what the denoiser is to arrive at."""
        return views.image["latent"]

    def synthetic_image(self, latent: Tensor) -> tuple[Tensors, Tensor]:
        """Cached tensors of images that show nobody, and the normal numbers of their views."""
        return {"latent": latent}, latent[:, None]
