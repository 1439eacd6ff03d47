"""What all large models share: a pretrained diffusers pipeline whose denoiser gets adapters.

Text encoders and VAE are loaded only to encode and to draw; training loads the denoiser alone. It computes in
bf16 under autocast, with its adapters in fp32, and recomputes activations in the backward pass where the
study wants that. A concrete family adds how its pipeline conditions, noises and calls the denoiser.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyclinic.common.generators.base import BaseFiles, Tensors, Views, in_batches, named, run_pipeline
from polyclinic.common.generators.checkpoint import class_of, hash_files, read_config, read_index
from polyclinic.common.generators.diffusion import (
    Noised,
    cumulative_alphas,
    ddpm,
    flow,
    shift_time,
    view_errors,
)
from polyclinic.common.generators.families import freezes_a
from polyclinic.common.generators.lora import adapter_layers, add_adapters, merged_copy
from polyclinic.common.generators.quantized import loading
from polyclinic.common.generators.release import in_pipeline, save_adapters, usage, write_card
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.evaluation_settings import EvaluationSettings
    from polyclinic.common.study import Study

PROMPTS_AT_ONCE = 8
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LargeModel(ABC):
    """A family of large models. See `base.Family`.

    Attributes:
        part: Name of the denoiser in the pipeline.
        vae_part: Name of the autoencoder.
        multiple: Pixels that an image's side must be a multiple of.
        time_scale: What a flow's sigma is multiplied with before the denoiser is told.
        dtype: What the denoiser computes in.
    """

    part = "unet"
    vae_part = "vae"
    multiple = 8
    time_scale = 1000.0

    def __init__(
        self,
        study: Study,
        files: BaseFiles,
        *,
        device: str = "cpu",
        encoders: bool = True,
        network: bool = True,
        rank: int | None = None,
        quantized: bool = False,
    ) -> None:
        from diffusers import DDPMScheduler
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()  # our own bars speak
        assert files.pipeline is not None
        self.study, self.settings, self.device = study, study.generator, device
        self.size, self.files, self.folder = study.data.image_size, files, files.pipeline
        self.dtype = TYPES[self.settings.precision]
        self.quantized = quantized and self.settings.quantize != "none"
        self.index = read_index(self.folder)
        self.scheduler = class_of(self.folder, "scheduler").from_pretrained(
            self.folder, subfolder="scheduler"
        )
        self.vae_config = self._config(self.vae_part)
        self._check_size()
        self.alphas: Tensor | None = None  # where it is a flow
        if "Flow" not in type(self.scheduler).__name__:
            # Its own class may be one for sampling; the schedule that it names is the training's.
            training = DDPMScheduler.from_config(self.scheduler.config)
            self.alphas = cumulative_alphas(training.betas).to(device)
            self.prediction = str(training.config.prediction_type)
        if network:
            self.module: Any = self._load_network()
            add_adapters(
                self.module,
                self.settings.lora,
                self.settings.init_seed,
                freeze_a=freezes_a(study),
                rank=rank,
                excluded=self.idle_layers(),
            )
            self.gradient_checkpointing(self.settings.gradient_checkpointing)
            self.module.train()
        if encoders:
            self.base_hash = hash_files(files, study)
            self.encoders = self._load_encoders()

    # ------------------------------------------------------------ what a family knows

    def idle_layers(self) -> tuple[str, ...]:
        """Name layers that a target may match and whose output the denoiser throws away."""
        return ()

    @abstractmethod
    def pooled_prompt(self, prompts: list[str]) -> Tensors:
        """Encode a few captions as the family's own pipeline does."""

    @abstractmethod
    def predict(self, sample: Tensor, time: Tensor, views: Views) -> Tensor:
        """Call the denoiser as the family's own pipeline does; the answer has the target's shape."""

    @abstractmethod
    def synthetic_prompt(self, count: int) -> Tensors:
        """Cached prompts of the right shapes that say nothing."""

    def dynamic_shift(self) -> float:
        """Mu of a flow scheduler that shifts by the image's size, as the family's pipeline computes it."""
        raise BadInput(
            f"{self.folder / 'scheduler' / 'scheduler_config.json'}: `use_dynamic_shifting`: the pipeline of "
            f"{self.settings.family} has no such shift; write false, or name a base of another family"
        )

    def gradient_checkpointing(self, wanted: bool) -> None:
        """Recompute activations in the backward pass, or keep them."""
        getattr(self.module, f"{'en' if wanted else 'dis'}able_gradient_checkpointing")()

    # ------------------------------------------------------------ encoding

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensors:
        """Return the VAE's posterior moments as the denoiser sees latents: `mean`, `std`, `[B, C, h, w]`."""
        vae = self.encoders.vae
        nn.Module.to(vae, torch.float32)  # in bf16 the encoder would lose more than its weights did
        posterior = vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        nn.Module.to(vae, self.dtype)
        shift, scale = self.vae_config.get("shift_factor") or 0.0, self.vae_config["scaling_factor"]
        return {"mean": (posterior.mean - shift) * scale, "std": posterior.std * scale}

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Tensors:
        """Encode captions a few at a time: see `pooled_prompt`."""
        parts = [self.pooled_prompt(batch) for batch in in_batches(prompts, PROMPTS_AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # ------------------------------------------------------------ training

    def normal_shape(self, image: Tensors) -> tuple[int, ...]:
        """Two latents a view: one for the posterior sample, one for the diffusion noise."""
        return (2, *image["mean"].shape[1:])

    def latents(self, views: Views) -> Tensor:
        """Sample the posterior: what the denoiser is to arrive at."""
        return views.image["mean"] + views.image["std"] * views.normal[:, 0]

    def noised(self, views: Views) -> Noised:
        """Noise the views' latents as the checkpoint's scheduler does, and say what the answer should be."""
        latent, noise = self.latents(views), views.normal[:, -1]
        time = shift_time(views.uniform, self.settings.timestep_shift)
        if self.alphas is None:
            return flow(latent, noise, self.sigma(time), scale=self.time_scale)
        return ddpm(latent, noise, time, self.alphas, self.prediction, self.settings.snr_gamma)

    def sigma(self, time: Tensor) -> Tensor:
        """Shift even times as the family's pipeline shifts its steps: (Esser et al. 2024, 2403.03206)."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return shift_time(time, config.shift)
        mu = self.dynamic_shift()
        return shift_time(time, mu if config.time_shift_type == "linear" else math.exp(mu))

    def view_losses(self, views: Views) -> Tensor:
        """Loss of each view `[B]`, of the answer to what `noised` asks."""
        noised = self.noised(views)
        with self._lowered():
            predicted = self.predict(noised.sample.to(self.dtype), noised.time, views)
        return view_errors(predicted, noised, self.settings.loss)

    def synthetic_views(self, count: int) -> Views:
        """Views of the cached shapes that show nobody: for counting operations and for self-tests."""
        latent = torch.ones(count, *self.latent_shape(), device=self.device)
        image, normal = self.synthetic_image(latent)
        time = torch.full((count,), 0.5, device=self.device)
        return Views(image, self.synthetic_prompt(count), normal, time)

    def synthetic_image(self, latent: Tensor) -> tuple[Tensors, Tensor]:
        """Cached tensors of images that show nobody, and the normal numbers of their views."""
        return {"mean": latent, "std": latent}, torch.stack([latent, latent], 1)

    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent: channels, height, width."""
        side = self.size // 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        return int(self.vae_config["latent_channels"]), side, side

    @contextmanager
    def _lowered(self) -> Iterator[None]:
        """Compute in the study's precision; adapters are fp32 and are lowered with the rest."""
        if self.dtype == torch.float32 or self.device == "meta":  # where only operations are counted
            yield
            return
        # Autocast does it, without an fp32 copy of each input; also where the backward pass recomputes.
        self._cast_inputs(False)
        with torch.autocast(torch.device(self.device).type, self.dtype):
            yield

    def _cast_inputs(self, wanted: bool) -> None:
        for layer in adapter_layers(self.module):
            layer.cast_input_dtype_enabled = wanted

    # ------------------------------------------------------------ drawing and release

    def pipeline(self) -> Any:
        """The family's own pipeline around the denoiser itself, which is too large to copy."""
        self.encoders.register_modules(**{self.part: self.module})
        self.encoders.set_progress_bar_config(disable=True)
        return self.encoders

    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        generators: list[torch.Generator],
        settings: EvaluationSettings,
        size: int,
    ) -> Tensor:
        """Draw one image a prompt: see `base.Family`."""
        with self._as_released():
            return run_pipeline(pipeline, prompts, generators, **self.draw_arguments(settings, size))

    @contextmanager
    def _as_released(self) -> Iterator[None]:
        """Have the adapters as plain diffusers loads them, in the base's precision and without autocast.

        So what is judged here is bit for bit what a person gets who loads the export. They also ask for
        gradients or not as loaded ones do: torch's matmul picks its route by that, and routes round apart.
        """
        adapters = [p for name, p in named(self.module).items() if ".lora_" in name]
        kept = [(p.data, p.requires_grad) for p in adapters]
        self._cast_inputs(True)
        try:
            for p in adapters:
                p.requires_grad_(in_pipeline(self))
                p.data = p.data.to(self.dtype)
            yield
        finally:
            for p, (data, wanted) in zip(adapters, kept, strict=True):
                p.data = data
                p.requires_grad_(wanted)

    def draw_arguments(self, settings: EvaluationSettings, size: int) -> dict[str, Any]:
        """What the family's pipeline wants to know beside prompts and generators."""
        return {
            "height": size,
            "width": size,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
        }

    def save(self, folder: Path, *, merged: bool) -> None:
        """Write adapters beside a card that names their base, or the whole pipeline with them added."""
        if not merged:
            save_adapters(self, folder)
            return
        pipeline, networks = self.pipeline(), self.networks()
        pipeline.register_modules(**{name: merged_copy(network) for name, network in networks.items()})
        pipeline.save_pretrained(folder, safe_serialization=True)
        pipeline.register_modules(**networks)
        write_card(self, folder, merged=True)

    def networks(self) -> dict[str, nn.Module]:
        """The networks that have adapters, by their names in the pipeline."""
        return {self.part: self.module}

    def usage(self) -> list[str]:
        """Python lines by which a person loads what `save` wrote."""
        return usage(self)

    # ------------------------------------------------------------ loading

    def _config(self, part: str) -> dict[str, Any]:
        return read_config(self.folder / part)

    def _check_size(self) -> None:
        if self.size % self.multiple:
            low = self.size // self.multiple * self.multiple
            raise BadInput(
                f"`data.image_size = {self.size}`: {self.settings.family} needs a multiple of "
                f"{self.multiple}; write {low + self.multiple}" + (f" or {low}" if low else "")
            )

    def _load_network(self) -> nn.Module:
        return self._load_part(self.part, self.folder)

    def _load_part(self, part: str, folder: Path) -> nn.Module:
        maker = class_of(folder, part)
        if self.device == "meta":
            # Nothing is allocated, so that a model that does not fit can be counted.
            with torch.device("meta"):
                network: nn.Module = maker.from_config(maker.load_config(folder, subfolder=part))
            return nn.Module.to(network, self.dtype)
        more = loading(self.settings, self.dtype, self.device) if self.quantized else {}
        with _naming(folder / part):
            network = maker.from_pretrained(
                folder, subfolder=part, dtype=self.dtype, use_safetensors=True, **more
            )
        # Placed before it gets adapters: moved later, they would train and not be used (Opacus #820).
        return network if self.quantized else network.to(self.device)

    def _load_encoders(self) -> Any:
        # Neither of the others takes part in training or drawing.
        return self._load_pipeline(
            self.folder, (self.part, "safety_checker", "feature_extractor", "image_encoder")
        )

    def _load_pipeline(self, folder: Path, without: Sequence[str]) -> Any:
        maker, index = class_of(folder), read_index(folder)
        absent = {part: None for part in without if part in index}
        with _naming(folder):
            pipeline = maker.from_pretrained(
                folder, dtype=self.dtype, use_safetensors=True, trust_remote_code=False, **absent
            )
        return pipeline.to(self.device)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise BadInput(f"{folder} cannot be loaded ({first}); put the base back") from error
