"""Kandinsky 3: a UNet over MoVQ latents, conditioned on the states of a large T5.

Its guidance runs against zeros instead of an empty prompt, so that is what a dropped prompt is trained as.
The pipeline cuts a batch's prompts after the longest, which moves the UNet's pooled text a little; training
has them at its full length, and images are drawn one at a time, so that none depends on the others.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyclinic.common.generators.base import Tensors, Views, run_pipeline
from polyclinic.common.generators.movq import MovqModel

if TYPE_CHECKING:
    from polyclinic.common.evaluation_settings import EvaluationSettings

TOKENS = 128  # the pipeline's own


class Kandinsky3(MovqModel):
    """The `kandinsky-3` family. See `base.Family`."""

    def pooled_prompt(self, prompts: list[str]) -> Tensors:
        """Return `states`, `[B, 128, D]`, and `mask`, `[B, 128]`: 1 where there is a token."""
        states, _, mask, _ = self.encoders.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, _cut_context=True
        )
        given = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
        states, mask = states * given[:, None, None], mask * given[:, None]
        missing = TOKENS - states.shape[1]
        return {"states": F.pad(states, (0, 0, 0, missing)), "mask": F.pad(mask, (0, missing)).float()}

    def predict(self, sample: Tensor, time: Tensor, views: Views) -> Tensor:  # noqa: D102
        answer: Tensor = self.module(
            sample,
            time,
            encoder_hidden_states=views.prompt["states"].to(self.dtype),
            encoder_attention_mask=views.prompt["mask"] > 0.5,
            return_dict=False,
        )[0]
        return answer

    def synthetic_prompt(self, count: int) -> Tensors:  # noqa: D102
        width = int(self._config(self.part)["encoder_hid_dim"])
        shapes = {"states": (count, TOKENS, width), "mask": (count, TOKENS)}
        return {name: torch.ones(shape, device=self.device) for name, shape in shapes.items()}

    def gradient_checkpointing(self, wanted: bool) -> None:
        """Recompute block by block; diffusers has no switch for this UNet."""
        for block in (*self.module.down_blocks, *self.module.up_blocks):
            vars(block).pop("forward", None)
            if wanted:
                # An attribute of the instance hides the method; the block's names stay what they are.
                block.forward = partial(recomputed, block.forward)

    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        generators: list[torch.Generator],
        settings: EvaluationSettings,
        size: int,
    ) -> Tensor:
        """Draw one image a prompt, each alone: see `base.Family`.

        This pipeline's guidance scale is one less than everybody else's for the same images.
        """
        arguments = self.draw_arguments(settings, size) | {"guidance_scale": settings.guidance - 1}
        with self._as_released():
            images = [
                run_pipeline(pipeline, [prompt], [generator], **arguments)
                for prompt, generator in zip(prompts, generators, strict=True)
            ]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)  # tensors it leaves as the decoder gives them


def recomputed(forward: Any, *arguments: Any, **named: Any) -> Any:
    """Run a block so that its activations are computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)
