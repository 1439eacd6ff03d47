"""Stable Diffusion 3 and 3.5: a flow transformer, conditioned on states and vectors of two CLIPs and T5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from polyclinic.common.generators.base import Tensors, Views
from polyclinic.common.generators.flux import joint_prompt, packed_shift
from polyclinic.common.generators.large import LargeModel

if TYPE_CHECKING:
    from polyclinic.common.evaluation_settings import EvaluationSettings

CLIP_TOKENS = 77


class StableDiffusion3(LargeModel):
    """The `stable-diffusion-3` family. See `base.Family`."""

    part = "transformer"
    multiple = 16

    def idle_layers(self) -> tuple[str, ...]:
        """The last block drops the text stream: what its queries find is thrown away."""
        return (f"transformer_blocks.{len(self.module.transformer_blocks) - 1}.attn.add_q_proj",)

    def pooled_prompt(self, prompts: list[str]) -> Tensors:
        """Return `states`, `[B, 77 + max_tokens, D]`, and `pooled`, `[B, P]`."""
        states, _, pooled, _ = self.encoders.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_tokens,
        )
        return {"states": states, "pooled": pooled}

    def dynamic_shift(self) -> float:
        """Mu of this image size."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        side = self.latent_shape()[1] // int(self._config(self.part)["patch_size"])
        return packed_shift(self, calculate_shift, side**2)

    def predict(self, sample: Tensor, time: Tensor, views: Views) -> Tensor:  # noqa: D102
        answer: Tensor = self.module(
            hidden_states=sample,
            timestep=time,
            encoder_hidden_states=views.prompt["states"].to(self.dtype),
            pooled_projections=views.prompt["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
        return answer

    def synthetic_prompt(self, count: int) -> Tensors:  # noqa: D102
        return joint_prompt(self, count, CLIP_TOKENS + self.settings.max_tokens)

    def draw_arguments(self, settings: EvaluationSettings, size: int) -> dict[str, Any]:  # noqa: D102
        longest = {"max_sequence_length": self.settings.max_tokens}
        return super().draw_arguments(settings, size) | longest
