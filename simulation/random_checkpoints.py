"""Pretrained pipelines of the large families with random weights, small, saved as diffusers saves real ones.

They stand where no real checkpoint is at hand: everything runs on them as on real ones, and what they draw is
noise. A folder's name ends in `random-weights`: nobody takes it for more.
"""

from __future__ import annotations

import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RANDOM_WEIGHTS = "random-weights"


def save(name: str, folder: Path, **changes: Any) -> Path:
    """Save a pipeline whole, in one rename; the same weights every time.

    Args:
        name: One of `MAKERS`.
        folder: Where its own folder will stand; one that is there is left as it is.
        changes: For the maker, such as `width`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # small files are written in a blink
    marks = [*(f"{key}-{value}" for key, value in changes.items()), RANDOM_WEIGHTS]
    path = folder / "-".join([name, *marks])
    if not path.exists():
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            MAKERS[name](**changes).save_pretrained(part)
            if name == "kandinsky-2-2" and not prior_of(path).exists():
                kandinsky_2_2_prior(**changes).save_pretrained(prior_of(path))
        part.rename(path)
    return path


def prior_of(base: Path) -> Path:
    """Name the checkpoint that stands beside a decoder's."""
    return base.with_name(f"{base.name}-prior")


def clip(width: int, *, projected: bool = False) -> tuple[Any, Any]:
    """Make a CLIP tokenizer of single letters, and a text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def vae(channels: int, **more: Any) -> Any:
    """Make an autoencoder of factor 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=channels,
        norm_num_groups=4,
        **more,
    )


def _unet(cross: int, width: int = 1, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16 * width, 32 * width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=8,
        **more,
    )


def stable_diffusion(prediction: str = "epsilon", width: int = 1) -> Any:
    """Make one like 1.5, and with `v_prediction` like 2.1; `width` multiplies the UNet's channels."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    tokenizer, encoder = clip(16)
    return StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=_unet(16, width),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type=prediction,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    """Make one like XL, with two text encoders."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(16), clip(24, projected=True)
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_unet(
            40,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def t5(width: int) -> tuple[Any, Any]:
    """Make a T5 tokenizer of single letters, and its encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=4, d_ff=2 * width, num_layers=2, num_heads=2
    )
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512), T5EncoderModel(config)


def movq() -> Any:
    """Make the autoencoder of Kandinsky 2.2 and 3."""
    from diffusers import VQModel

    return VQModel(
        down_block_types=(
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
            "DownEncoderBlock2D",
            "AttnDownEncoderBlock2D",
        ),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32, 32, 32),  # its norms have 32 groups
        latent_channels=4,
        num_vq_embeddings=16,
        vq_embed_dim=4,
        norm_type="spatial",
    )


def flux(guided: bool = True, width: int = 1) -> Any:
    """Make one like [dev], and unguided like [schnell]; `width` multiplies the attention heads."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(16), t5(24)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guided else 1.0, use_dynamic_shifting=guided, max_image_seq_len=4096
        ),
        vae=vae(
            4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2 * width,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=guided,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def stable_diffusion_3() -> Any:
    """Make one like 3, with three text encoders."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    one, two, three = clip(16, projected=True), clip(24, projected=True), t5(40)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=40,
            caption_projection_dim=32,
            pooled_projection_dim=40,
            out_channels=4,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(
            4, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=one[1],
        tokenizer=one[0],
        text_encoder_2=two[1],
        tokenizer_2=two[0],
        text_encoder_3=three[1],
        tokenizer_3=three[0],
    )


def kandinsky_2_2(width: int = 1) -> Any:
    """Make the decoder of Kandinsky 2.2; `width` multiplies the UNet's channels."""
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        block_out_channels=(16 * width, 32 * width),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=16,
        encoder_hid_dim=24,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        attention_head_dim=8,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=True,
        clip_sample_range=2.0,
        thresholding=True,
        dynamic_thresholding_ratio=0.999,
    )
    return KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq())


def kandinsky_2_2_prior(width: int = 1) -> Any:
    """Make the prior of Kandinsky 2.2; `width` multiplies the attention heads."""
    from diffusers import KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    tokenizer, encoder = clip(24, projected=True)
    eye = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    prior = PriorTransformer(
        num_attention_heads=2 * width,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=24,
        num_embeddings=77,
    )
    for parameter in (prior.positional_embedding, prior.prd_embedding, prior.clip_mean):
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.uniform_(prior.clip_std, 0.5, 1.5)
    return KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=CLIPVisionModelWithProjection(eye),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(clip_sample_range=5.0, prediction_type="sample"),
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    )


def kandinsky_3(width: int = 1) -> Any:
    """Make one like Kandinsky 3; `width` multiplies the UNet's channels."""
    from diffusers import DDPMScheduler, Kandinsky3Pipeline, Kandinsky3UNet

    tokenizer, encoder = t5(24)
    unet = Kandinsky3UNet(
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8 * width, 16 * width),
        cross_attention_dim=16,
        encoder_hid_dim=24,
    )
    for parameter in unet.parameters():  # its norms' scales start at zero, which hides what conditions it
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return Kandinsky3Pipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        movq=movq(),
    )


# One view costs a little more than one of the smallest MSDM's, in the order of the real ones.
STAND_INS: dict[str, dict[str, int]] = {
    "stable-diffusion": {"width": 5},
    "kandinsky-2-2": {"width": 6},
    "kandinsky-3": {"width": 12},
    "flux": {"width": 9},
}
MAKERS: dict[str, Callable[..., Any]] = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-2-1": lambda: stable_diffusion("v_prediction"),
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux,
    "flux-schnell": lambda: flux(guided=False),
    "kandinsky-2-2": kandinsky_2_2,
    "kandinsky-3": kandinsky_3,
}
