"""FLUX.1 [dev] and [schnell]: a flow transformer over packed latents, conditioned on T5 and CLIP.

[dev] is distilled to take its guidance as an input; in training it is told `generator.guidance_embedding`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyclinic.common.generators.base import Tensors, Views
from polyclinic.common.generators.large import LargeModel

if TYPE_CHECKING:
    from polyclinic.common.evaluation_settings import EvaluationSettings


class Flux(LargeModel):
    """The `flux` family. See `base.Family`."""

    part = "transformer"
    multiple = 16
    time_scale = 1.0  # the transformer itself multiplies by 1000

    def pooled_prompt(self, prompts: list[str]) -> Tensors:
        """Return T5's `states`, `[B, max_tokens, D]`, and CLIP's `pooled`, `[B, P]`."""
        states, pooled, _ = self.encoders.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.settings.max_tokens
        )
        return {"states": states, "pooled": pooled}

    def dynamic_shift(self) -> float:
        """Mu of this image size."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        return packed_shift(self, calculate_shift, (self.size // self.multiple) ** 2)

    def predict(self, sample: Tensor, time: Tensor, views: Views) -> Tensor:  # noqa: D102
        from diffusers import FluxPipeline

        count, channels, height, width = sample.shape
        states = views.prompt["states"].to(self.dtype)
        guidance = None
        if self.module.config.guidance_embeds:
            guidance = torch.full((count,), self.settings.guidance_embedding, device=sample.device)
        answer = self.module(
            hidden_states=FluxPipeline._pack_latents(sample, count, channels, height, width),
            timestep=time,
            guidance=guidance,
            pooled_projections=views.prompt["pooled"].to(self.dtype),
            encoder_hidden_states=states,
            txt_ids=sample.new_zeros(states.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                count, height // 2, width // 2, sample.device, sample.dtype
            ),
            return_dict=False,
        )[0]
        # The inverse of packing wants pixels, 8 for a latent.
        found: Tensor = FluxPipeline._unpack_latents(answer, 8 * height, 8 * width, 8)
        return found

    def synthetic_prompt(self, count: int) -> Tensors:  # noqa: D102
        return joint_prompt(self, count, self.settings.max_tokens)

    def draw_arguments(self, settings: EvaluationSettings, size: int) -> dict[str, Any]:  # noqa: D102
        longest = {"max_sequence_length": self.settings.max_tokens}
        return super().draw_arguments(settings, size) | longest


def packed_shift(family: LargeModel, calculate: Any, patches: int) -> float:
    """Mu of an image with so many patches, by the checkpoint's own numbers and the pipeline's function."""
    config = family.scheduler.config
    return float(
        calculate(
            patches,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
    )


def joint_prompt(family: LargeModel, count: int, tokens: int) -> Tensors:
    """Cached prompts of a transformer that attends to image and text jointly; they say nothing."""
    config = family._config(family.part)
    shapes = {
        "states": (count, tokens, int(config["joint_attention_dim"])),
        "pooled": (count, int(config["pooled_projection_dim"])),
    }
    return {name: torch.ones(shape, device=family.device) for name, shape in shapes.items()}
