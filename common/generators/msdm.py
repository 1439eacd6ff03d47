"""MSDM: a compact text-conditioned latent diffusion model for medicine (arXiv 2505.05573).

Built on diffusers' UNet2DConditionModel and exported as a StableDiffusionPipeline. Departures of
`size = "msdm"` from the released model (326.5 M parameters), each on purpose:

* Text path: one linear projection to keys and values (diffusers' `text_proj`) where the released
  model has Linear-SiLU-Linear, so that a plain StableDiffusionPipeline loads the result. The
  attention-pooled text vector added to the time embedding is kept (`addition_embed_type="text"`).
* Attention is diffusers' `SimpleCrossAttn` block (as in Kandinsky 2): image tokens attend to image and
  text tokens at once, without a feed-forward part. diffusers' transformer blocks would bring 95 M
  parameters of feed-forward that the released model does not have.
* Heads are 64 wide (4, 8 and 16 by level); the released model has 8 at each level, which diffusers'
  up blocks cannot express for unequal widths.
* The time embedding scales and shifts inside residual blocks (`scale_shift`).
* Dropout is 0 instead of 0.1: dropout inside the network would make one patient's draws depend on
  the batch it stands in (PRIVACY.md, rule 1).
* No colour jitter and no flips: preprocessing is deterministic, so that latents are cached once.
* The text encoder is a setting; the released code used CLIP ViT-L/14.
* Together: 312.3 M parameters at the released widths with a 768-wide text encoder, 4 % fewer than released.

`msdm-small` and `msdm-tiny` are the same design, narrower and shallower; they are ours.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyclinic.common.generators.base import Tensors, Views, load_weights, run_pipeline
from polyclinic.common.generators.diffusion import cumulative_alphas, ddpm, shift_time, view_errors
from polyclinic.common.generators.public import hash_base, resolve

if TYPE_CHECKING:
    from polyclinic.common.evaluation_settings import EvaluationSettings
    from polyclinic.common.generator_settings import GeneratorSettings

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Widths by level, residual blocks a level, key/value width, width of a head, GroupNorm groups.
SIZES: dict[str, tuple[tuple[int, ...], int, int, int, int]] = {
    "msdm": ((256, 512, 1024), 2, 1024, 64, 32),
    "msdm-small": ((128, 256, 288), 2, 320, 32, 32),
    "msdm-tiny": ((64, 128), 1, 128, 16, 16),
}

# Noise schedule of the released training: T = 1000, scaled_linear 0.002 -> 0.02.
TRAIN_STEPS, BETA_START, BETA_END = 1000, 0.002, 0.02


def build_unet(settings: GeneratorSettings, latent_size: int, latent_channels: int, text_width: int) -> Any:
    """Build the denoiser with random weights.

    Args:
        settings: The study's generator table.
        latent_size: Latent pixels a side: image size over the VAE's factor.
        latent_channels: Channels of the VAE's latent.
        text_width: Width of the text encoder's last hidden state.
    """
    from diffusers import UNet2DConditionModel

    widths, layers, cross, head_width, groups = SIZES[settings.size]
    levels = len(widths)
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=("SimpleCrossAttnDownBlock2D",) * levels,
        up_block_types=("SimpleCrossAttnUpBlock2D",) * levels,
        cross_attention_dim=cross,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=head_width,
        resnet_time_scale_shift="scale_shift",
        encoder_hid_dim=text_width,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        norm_num_groups=groups,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def train_only(unet: nn.Module, part: str) -> None:
    """Let only one part of the UNet require gradients: `all`, `attention` or `conditioning`.

    Fewer trained parameters meet less noise: its norm grows with the square root of their number.
    """
    text = ("encoder_hid_proj.", "add_embedding.")
    inside = {
        "all": lambda name: True,
        "attention": lambda name: ".attentions." in name or name.startswith(text),
        "conditioning": lambda name: name.startswith(
            ("encoder_hid_proj.", "add_embedding.proj.", "add_embedding.norm")
        ),
    }[part]
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(inside(name))


class Msdm:
    """The MSDM family. See `base.Family`."""

    dtype = torch.float32

    def __init__(
        self,
        settings: GeneratorSettings,
        image_size: int,
        vae: Path | None,
        *,
        frozen: Path | None = None,
        device: str = "cpu",
        encoders: bool = True,
    ) -> None:
        from diffusers import AutoencoderKL
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # small public models load in a blink; our own bars speak
        self.settings, self.device = settings, device
        text = resolve(settings.text_encoder, settings.text_encoder_revision, "generator.text_encoder")
        if encoders and vae is not None:
            self.base_hash = hash_base(vae, text, settings.max_tokens, frozen)
            self.vae = AutoencoderKL.from_pretrained(vae, use_safetensors=True, low_cpu_mem_usage=False).to(
                device
            )
            self.tokenizer = AutoTokenizer.from_pretrained(
                text, model_max_length=settings.max_tokens, trust_remote_code=False
            )
            self.text_encoder = AutoModel.from_pretrained(
                text, use_safetensors=True, trust_remote_code=False
            ).to(device)
            # StableDiffusionPipeline passes the padding mask to the encoder only if it says so.
            self.text_encoder.config.use_attention_mask = True
            self.vae.eval()
            self.text_encoder.eval()
        recipe = settings.vae_training
        channels, vae_levels, self.scaling = recipe.latent_channels, len(recipe.widths), 1.0
        if vae is not None:
            vae_config = AutoencoderKL.load_config(vae)
            channels, self.scaling = int(vae_config["latent_channels"]), float(vae_config["scaling_factor"])
            vae_levels = len(vae_config["block_out_channels"])
        width = int(AutoConfig.from_pretrained(text, trust_remote_code=False).hidden_size)
        # On the meta device nothing is allocated, so that a model that does not fit can be counted; elsewhere
        # the start is drawn on the CPU and is the same for every device.
        place = torch.device("meta" if device == "meta" else "cpu")
        with torch.random.fork_rng(devices=[]), place:
            torch.manual_seed(settings.init_seed)
            self.module = build_unet(settings, image_size // 2 ** (vae_levels - 1), channels, width).to(
                device
            )
        if frozen is not None:
            load_weights(self.module, frozen)
        train_only(self.module, settings.train)
        if settings.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        self.module.train()
        betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
        self.alphas = cumulative_alphas(betas).to(device)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensors:
        """Return the VAE's posterior moments, scaled to unit variance: `mean`, `std`, `[B, C, h, w]`."""
        posterior = self.vae.encode(pixels.to(self.device)).latent_dist
        return {"mean": posterior.mean * self.scaling, "std": posterior.std * self.scaling}

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Tensors:
        """Return the text encoder's last hidden state, padded to `max_tokens`: `states`, `[B, T, D]`."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.settings.max_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        output = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return {"states": output.last_hidden_state}

    def normal_shape(self, image: Tensors) -> tuple[int, ...]:
        """Two latents a view: one for the posterior sample, one for the diffusion noise."""
        return (2, *image["mean"].shape[1:])

    def view_losses(self, views: Views) -> Tensor:
        """Loss of each view `[B]`: L1 or squared error of the epsilon or v prediction (Ho et al. 2020,
        2006.11239; Salimans & Ho 2022, 2202.00512), min-SNR weighted where asked (2303.09556).
        """
        latent = views.image["mean"] + views.image["std"] * views.normal[:, 0]
        settings = self.settings
        time = shift_time(views.uniform, settings.timestep_shift)
        noised = ddpm(latent, views.normal[:, 1], time, self.alphas, settings.prediction, settings.snr_gamma)
        predicted = self.module(noised.sample, noised.time, views.prompt["states"]).sample
        return view_errors(predicted, noised, settings.loss)

    def synthetic_views(self, count: int) -> Views:
        """Views of the cached shapes that show nobody: for counting operations and for self-tests."""
        config, device = self.module.config, self.device
        latent = torch.ones(count, config.in_channels, config.sample_size, config.sample_size, device=device)
        states = torch.ones(count, self.settings.max_tokens, config.encoder_hid_dim, device=device)
        return Views(
            {"mean": latent, "std": latent},
            {"states": states},
            torch.stack([latent, latent], 1),
            torch.full((count,), 0.5, device=device),
        )

    def scheduler(self) -> Any:
        """DDIM over the training's own noise schedule."""
        from diffusers import DDIMScheduler

        return DDIMScheduler(
            num_train_timesteps=TRAIN_STEPS,
            beta_start=BETA_START,
            beta_end=BETA_END,
            beta_schedule="scaled_linear",
            prediction_type=self.settings.prediction,
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
            steps_offset=1,  # what StableDiffusionPipeline wants; no effect with trailing steps
        )

    def pipeline(self) -> Any:
        """A StableDiffusionPipeline around a copy of the current weights, ready to sample or to save.

        Its weights say that they require gradients, as freshly loaded ones do: torch's matmul picks its
        route by that flag even without gradients, and the routes round differently on a CPU. So what
        is judged here is bit for bit what a person gets who loads the export.
        """
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        unet = copy.deepcopy(self.module).eval().requires_grad_(True)
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=self.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        generators: list[torch.Generator],
        settings: EvaluationSettings,
        size: int,
    ) -> Tensor:
        """Draw one image a prompt: see `base.Family`."""
        return run_pipeline(
            pipeline,
            prompts,
            generators,
            height=size,
            width=size,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            eta=settings.eta,
        )

    def save(self, folder: Path, *, merged: bool = True) -> None:
        """Write the whole pipeline: it has no other form."""
        self.pipeline().save_pretrained(folder, safe_serialization=True)
