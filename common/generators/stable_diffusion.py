"""Stable Diffusion 1.5, 2.1 and XL: a UNet over latents, conditioned on CLIP states.

The checkpoint's scheduler says the noise schedule and what the UNet answers: epsilon, or v for 2.1 at 768 px.
XL also takes a pooled text vector and the image's size, and zeros instead of an empty prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyclinic.common.generators.base import Tensors, Views
from polyclinic.common.generators.large import LargeModel

if TYPE_CHECKING:
    from polyclinic.common.evaluation_settings import EvaluationSettings


class StableDiffusion(LargeModel):
    """The `stable-diffusion` family. See `base.Family`."""

    @property
    def xl(self) -> bool:
        """Whether the checkpoint is an XL."""
        return bool(self.index["_class_name"] == "StableDiffusionXLPipeline")

    def pooled_prompt(self, prompts: list[str]) -> Tensors:
        """Return `states`, `[B, 77, D]`, and for XL `pooled`, `[B, P]`."""
        arguments = (self.device, 1, False)
        if not self.xl:
            return {"states": self.encoders.encode_prompt(prompts, *arguments)[0]}
        states, _, pooled, _ = self.encoders.encode_prompt(prompts, None, *arguments)
        if self.encoders.config.force_zeros_for_empty_prompt:
            # What the pipeline's guidance takes for no prompt.
            given = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
            states, pooled = states * given[:, None, None], pooled * given[:, None]
        return {"states": states, "pooled": pooled}

    def predict(self, sample: Tensor, time: Tensor, views: Views) -> Tensor:  # noqa: D102
        states, more = views.prompt["states"].to(self.dtype), {}
        if self.xl:
            sizes = sample.new_tensor([self.size, self.size, 0, 0, self.size, self.size])
            more["added_cond_kwargs"] = {
                "text_embeds": views.prompt["pooled"].to(self.dtype),
                "time_ids": sizes.expand(len(sample), -1),
            }
        answer: Tensor = self.module(sample, time, states, return_dict=False, **more)[0]
        return answer

    def synthetic_prompt(self, count: int) -> Tensors:  # noqa: D102
        tokens = int(self._config("text_encoder")["max_position_embeddings"])
        made = {"states": (count, tokens, int(self._config("unet")["cross_attention_dim"]))}
        shapes: dict[str, tuple[int, ...]] = dict(made)
        if self.xl:
            shapes["pooled"] = (count, int(self._config("text_encoder_2")["projection_dim"]))
        return {name: torch.ones(shape, device=self.device) for name, shape in shapes.items()}

    def draw_arguments(self, settings: EvaluationSettings, size: int) -> dict[str, Any]:  # noqa: D102
        return super().draw_arguments(settings, size) | {"eta": settings.eta}
