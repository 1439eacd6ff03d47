"""Kandinsky 2.2: a prior turns a prompt into an image embedding, a decoder turns that into MoVQ latents.

Both are trained as one: their adapters lie in one module, and a view's loss is the sum of both stages'.
So a patient has one gradient, clipped over the adapters of both to one bound C and noised once: one mechanism
and one epsilon, whichever stages `generator.stages` names. The cache holds each image's CLIP embedding, by
which the decoder is conditioned and at which the prior aims, so that no encoder is in memory in training.

The decoder's guidance runs against the embedding of a black image, so that is what it is given where a view's
prompt is dropped. The prior answers with the embedding itself, normalised by its checkpoint's own statistics.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyclinic.common.generators.base import Tensors, Views
from polyclinic.common.generators.checkpoint import class_of, read_config
from polyclinic.common.generators.diffusion import Noised, ddpm, shift_time, view_errors
from polyclinic.common.generators.kandinsky_3 import recomputed
from polyclinic.common.generators.movq import MovqModel

if TYPE_CHECKING:
    from polyclinic.common.evaluation_settings import EvaluationSettings

# Stage to its network: the part of its own checkpoint, and of the pipeline of both.
PARTS = {"decoder": ("unet", "unet"), "prior": ("prior", "prior_prior")}
PRIOR_STEPS = 25  # the pipeline's own


class Kandinsky22(MovqModel):
    """The `kandinsky-2-2` family. See `base.Family`."""

    # ------------------------------------------------------------ loading

    def _load_network(self) -> nn.Module:
        return nn.ModuleDict({stage: self._load_stage(stage) for stage in self.settings.stages})

    def _load_stage(self, stage: str) -> nn.Module:
        return self._load_part(PARTS[stage][0], self._folder(stage))

    def _folder(self, stage: str) -> Path:
        assert self.files.prior is not None
        return self.folder if stage == "decoder" else self.files.prior

    def _load_encoders(self) -> Any:
        self.prior = self._load_pipeline(self._folder("prior"), ("prior",))
        return super()._load_encoders()

    def networks(self) -> dict[str, nn.Module]:
        """Name the stages' networks as the pipeline of both does."""
        return {PARTS[stage][1]: network for stage, network in self.module.items()}

    def gradient_checkpointing(self, wanted: bool) -> None:
        """Recompute the decoder by diffusers' switch, the prior, which has none, block by block."""
        for stage, network in self.module.items():
            if stage == "decoder":
                getattr(network, f"{'en' if wanted else 'dis'}able_gradient_checkpointing")()
                continue
            for block in network.transformer_blocks:
                vars(block).pop("forward", None)
                if wanted:
                    block.forward = partial(recomputed, block.forward)

    # ------------------------------------------------------------ encoding

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensors:
        """Return the MoVQ's `latent`, `[B, C, h, w]`, and CLIP's `embedding`, `[B, E]`."""
        return {**super().encode_image(pixels), "embedding": self._embed(pixels)}

    def _embed(self, pixels: Tensor) -> Tensor:
        """Embed images `[B, 3, H, W]` in [-1, 1] as the prior's own image processor prepares them."""
        as_bytes = ((pixels / 2 + 0.5) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        ready = self.prior.image_processor(list(as_bytes), return_tensors="pt").pixel_values
        found: Tensor = self.prior.image_encoder(ready.to(self.device, self.dtype)).image_embeds
        return found

    def pooled_prompt(self, prompts: list[str]) -> Tensors:
        """Return CLIP's `states`, `[B, 77, E]`, `pooled`, `[B, E]`, and `mask`, `[B, 77]`.

        And for the decoder `given`, `[B, 1]`: 0 for no prompt; and `blank`, `[B, E]`: what stands for none.
        """
        pooled, states, mask = self.prior._encode_prompt(prompts, self.device, 1, False)
        given = torch.tensor([[float(bool(prompt))] for prompt in prompts], device=self.device)
        blank = self.prior.get_zero_embed(len(prompts), device=self.device)
        return {"states": states, "pooled": pooled, "mask": mask.float(), "given": given, "blank": blank}

    # ------------------------------------------------------------ training

    def normal_shape(self, image: Tensors) -> tuple[int, ...]:
        """Noise of both stages side by side: of the embedding, then of the latent."""
        return (1, image["embedding"].shape[1] + image["latent"][0].numel())

    def noised(self, views: Views) -> Noised:
        """Noise the latents, for the decoder."""
        latent = views.image["latent"]
        noise = views.normal[:, 0, views.image["embedding"].shape[1] :].view_as(latent)
        assert self.alphas is not None
        return ddpm(latent, noise, self._time(views), self.alphas, self.prediction, self.settings.snr_gamma)

    def embedding(self, views: Views) -> Tensor:
        """Normalise the embeddings as the prior has them: what it is to arrive at."""
        network = self.module["prior"]
        return (views.image["embedding"] - network.clip_mean.float()) / network.clip_std.float()

    def noised_embedding(self, views: Views) -> Noised:
        """Noise the embeddings, for the prior."""
        embedding = self.embedding(views)
        noise = views.normal[:, 0, : embedding.shape[1]]
        alphas = self.prior_scheduler.alphas_cumprod.float().to(embedding.device)
        kind = str(self.prior_scheduler.config.prediction_type)
        return ddpm(embedding, noise, self._time(views), alphas, kind, self.settings.snr_gamma)

    def _time(self, views: Views) -> Tensor:
        return shift_time(views.uniform, self.settings.timestep_shift)

    @cached_property
    def prior_scheduler(self) -> Any:
        """The prior's own schedule, as its checkpoint says."""
        folder = self._folder("prior")
        return class_of(folder, "scheduler").from_pretrained(folder, subfolder="scheduler")

    def view_losses(self, views: Views) -> Tensor:
        """Loss of each view `[B]`: of all stages that are trained, added up."""
        stages = {
            "decoder": (self.noised, self.predict),
            "prior": (self.noised_embedding, self.predict_prior),
        }
        total = torch.zeros_like(views.uniform)
        for stage in self.module:
            noise, predict = stages[stage]
            noised = noise(views)
            with self._lowered():
                predicted = predict(noised.sample.to(self.dtype), noised.time, views)
            total = total + view_errors(predicted, noised, self.settings.loss)
        return total

    def predict(self, sample: Tensor, time: Tensor, views: Views) -> Tensor:
        """Call the decoder; the second half of its answer is a variance, which this loss does not train."""
        given, blank = views.prompt["given"] > 0.5, views.prompt["blank"]
        embedding = torch.where(given, views.image["embedding"], blank).to(self.dtype)
        answer: Tensor = self.module["decoder"](
            sample, time, None, added_cond_kwargs={"image_embeds": embedding}, return_dict=False
        )[0]
        return answer[:, : sample.shape[1]]

    def predict_prior(self, sample: Tensor, time: Tensor, views: Views) -> Tensor:
        """Call the prior as its pipeline does."""
        answer: Tensor = self.module["prior"](
            sample,
            time,
            proj_embedding=views.prompt["pooled"].to(self.dtype),
            encoder_hidden_states=views.prompt["states"].to(self.dtype),
            attention_mask=views.prompt["mask"] > 0.5,
            return_dict=False,
        )[0]
        return answer

    def synthetic_image(self, latent: Tensor) -> tuple[Tensors, Tensor]:  # noqa: D102
        embedding = torch.ones(len(latent), self._width(), device=self.device)
        normal = torch.cat([embedding, latent.flatten(1)], 1)[:, None]
        return {"latent": latent, "embedding": embedding}, normal

    def synthetic_prompt(self, count: int) -> Tensors:  # noqa: D102
        width, tokens = self._width(), int(self._config("prior")["num_embeddings"])
        shapes = {
            "states": (count, tokens, width),
            "pooled": (count, width),
            "mask": (count, tokens),
            "given": (count, 1),
            "blank": (count, width),
        }
        return {name: torch.ones(shape, device=self.device) for name, shape in shapes.items()}

    def _width(self) -> int:
        return int(self._config("prior")["embedding_dim"])

    def _config(self, part: str) -> dict[str, Any]:
        return read_config(self._folder("prior" if part == "prior" else "decoder") / part)

    # ------------------------------------------------------------ drawing and release

    def pipeline(self) -> Any:
        """The pipeline of both stages; one that is not trained is loaded as it was released."""
        from diffusers import KandinskyV22CombinedPipeline

        both = {
            stage: self.module[stage] if stage in self.module else self._load_stage(stage) for stage in PARTS
        }
        prior = {f"prior_{name}": part for name, part in self.prior.components.items() if name != "prior"}
        made = KandinskyV22CombinedPipeline(
            unet=both["decoder"],
            scheduler=self.encoders.scheduler,
            movq=self.encoders.movq,
            prior_prior=both["prior"],
            **prior,
        )
        made.set_progress_bar_config(disable=True)
        return made

    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        generators: list[torch.Generator],
        settings: EvaluationSettings,
        size: int,
    ) -> Tensor:
        """Draw one image a prompt: see `base.Family`."""
        images = super().draw(pipeline, prompts, generators, settings, size)
        return (images / 2 + 0.5).clamp(0, 1)  # tensors it leaves as the decoder gives them

    def draw_arguments(self, settings: EvaluationSettings, size: int) -> dict[str, Any]:  # noqa: D102
        prior = {"prior_guidance_scale": settings.guidance, "prior_num_inference_steps": PRIOR_STEPS}
        return super().draw_arguments(settings, size) | prior

    def usage(self) -> list[str]:
        """Python lines that load the two checkpoints, these adapters, and draw."""
        settings, lines = self.settings, ["import torch", "from diffusers import KandinskyV22Pipeline"]
        lines[1] += ", KandinskyV22PriorPipeline"
        named = {
            "decoder": ("KandinskyV22Pipeline", settings.base, settings.base_revision),
            "prior": ("KandinskyV22PriorPipeline", settings.prior, settings.prior_revision),
        }
        lines += ["from peft import PeftModel", ""]
        for stage, (kind, source, revision) in named.items():
            at = f', revision="{revision}"' if revision else ""
            lines.append(f'{stage} = {kind}.from_pretrained("{source}"{at}, dtype={self.dtype})')
        for stage in self.settings.stages:
            own, part = PARTS[stage]
            place = f"this folder/{part}" if len(self.settings.stages) > 1 else "this folder"
            network = f"{stage}.{own}"
            lines.append(
                f'{network} = PeftModel.from_pretrained({network}, "{place}", autocast_adapter_dtype=False)'
            )
        return [
            *lines,
            'embeds, blank = prior("a prompt").to_tuple()',
            "images = decoder(image_embeds=embeds, negative_image_embeds=blank).images",
        ]
