"""`polyclinic-server pretrain`: what the coordinator trains on its public reference, and only on it.

Both parts are public by construction: they see the reference's pretrain part and nothing else.
Runs are seeded; equal machines give equal files, and the study names the result by its hash.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.data.holdout import position
from polyclinic.common.data.pixels import load_pixels
from polyclinic.common.data.table import Record
from polyclinic.common.files import write_atomic
from polyclinic.common.generator_settings import VaeTraining
from polyclinic.common.generators.base import BaseFiles, Tensors, Views, load_family, trainable
from polyclinic.common.progress import say, track
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study
from polyclinic.server.adversarial import sharpen

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

HELD_OUT = 0.1  # share of the pretrain part's patients that PSNR is printed on


def pretrain_vae(study: Study, records: list[Record], folder: Path) -> float:
    """Train an AutoencoderKL and save it as a diffusers folder, fp16 safetensors.

    Loss: mean squared error + KL + L1 between image gradients (a weights-free stand-in for a
    perceptual term); then, where the study asks for it, the decoder alone against a patch discriminator.
    Where every public image is grey the decoder's output is, too: tints that nobody sees are far from
    any real image to a feature extractor.

    Args:
        study: Gives `generator.vae_training` and the preprocessing.
        records: The reference's pretrain part; a tenth of its patients is held out.
        folder: Where the VAE goes; written whole or not at all.

    Returns:
        Reconstruction PSNR on the held-out images, dB (peak 1.0 for pixels in [0, 1]).
    """
    settings = study.generator.vae_training
    train = [r for r in records if position(r.patient, "vae-held-out") >= HELD_OUT]
    held = [r for r in records if position(r.patient, "vae-held-out") < HELD_OUT]
    if not train or not held:
        raise BadInput(
            f"the reference's pretrain part has {len(records)} images, too few; raise reference.pretrain"
        )
    pixels, held_pixels = (
        load_pixels(train, study.data.image_size, study.data.fit),
        load_pixels(held, study.data.image_size, study.data.fit),
    )
    grey = bool((pixels == pixels[:, :1]).all())
    torch.manual_seed(settings.seed)
    vae = new_autoencoder(settings, study.data.image_size)

    def draw_batch() -> Tensor:
        batch = pixels[torch.randint(len(pixels), (settings.batch_size,))]
        return torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(3), batch)

    def decode(latent: Tensor) -> Tensor:
        output = vae.decode(latent).sample
        return output.mean(1, keepdim=True).expand_as(output) if grey else output

    def reconstruction(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target) + settings.gradient_weight * _gradient_l1(output, target)

    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    say(f"VAE: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {len(train)} public images")
    with track("pretrain vae", settings.steps) as advance:
        for _ in range(settings.steps):
            batch = draw_batch()
            posterior = vae.encode(batch).latent_dist
            loss = reconstruction(decode(posterior.sample()), batch)
            loss = loss + settings.kl_weight * posterior.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1)
    if settings.adversarial_steps:
        sharpen(vae, draw_batch, decode, reconstruction, settings)
    if grey:
        # The mean over output channels of a convolution is the convolution with the mean weights.
        with torch.no_grad():
            for part in (vae.decoder.conv_out.weight, vae.decoder.conv_out.bias):
                part.copy_(part.mean(0, keepdim=True).expand_as(part))
    vae.eval().half().float()  # what is measured is what is saved
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
        psnr = _psnr(torch.cat([vae(part).sample for part in held_pixels.split(64)]), held_pixels)
    _save_whole(vae.half(), folder)
    say(f"VAE: reconstruction PSNR {psnr:.1f} dB on {len(held)} held-out public images, {folder}")
    return psnr


def new_autoencoder(settings: VaeTraining, image_size: int) -> AutoencoderKL:
    """The autoencoder that `generator.vae_training` describes, untrained."""
    from diffusers import AutoencoderKL

    levels = len(settings.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.widths,
        layers_per_block=settings.layers_per_block,
        latent_channels=settings.latent_channels,
        norm_num_groups=16,
        sample_size=image_size,
        mid_block_add_attention=False,
    )


def _gradient_l1(output: Tensor, target: Tensor) -> Tensor:
    across = F.l1_loss(output.diff(dim=3), target.diff(dim=3))
    return across + F.l1_loss(output.diff(dim=2), target.diff(dim=2))


def _psnr(output: Tensor, target: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, dB."""
    error = ((output.clamp(-1, 1) - target) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def _save_whole(model: torch.nn.Module, folder: Path) -> None:
    """Save a diffusers model next to its place and rename it there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(temporary, safe_serialization=True)  # type: ignore[operator]
        if folder.exists():
            shutil.rmtree(folder)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def pretrain_generator(
    study: Study, records: list[Record], vae: Path, path: Path, *, device: str = "cpu"
) -> None:
    """Train the generator on the reference's pretrain part: a public warm start.

    Args:
        study: Gives `generator.warm_start_training`.
        records: The reference's pretrain part.
        vae: Folder of the frozen autoencoder.
        path: Safetensors file of the trainable state, fp16, written whole or not at all.
        device: Where to train.
    """
    settings = study.generator.warm_start_training
    whole = study.generator.model_copy(update={"train": "all"})
    family = load_family(study.model_copy(update={"generator": whole}), BaseFiles(vae=vae), device=device)
    pixels = load_pixels(records, study.data.image_size, study.data.fit)
    image = _encode(family, pixels)
    texts = [_texts(record, study) for record in records]
    captions = sorted({caption for of_record in texts for caption in of_record} | {""})
    prompts = torch.cat(
        [family.encode_prompt(captions[i : i + 64])["states"] for i in range(0, len(captions), 64)]
    )
    row_of = {caption: row for row, caption in enumerate(captions)}
    rows = [torch.tensor([row_of[c] for c in of_record]) for of_record in texts]
    torch.manual_seed(settings.seed)
    parameters = trainable(family.module)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    average = {name: p.detach().clone() for name, p in parameters.items()}
    shape = family.normal_shape(image)
    with track("pretrain generator", settings.steps) as advance:
        for step in range(settings.steps):
            chosen = torch.randint(len(records), (settings.batch_size,))
            caption = torch.stack([rows[i][torch.randint(len(rows[i]), ())] for i in chosen.tolist()])
            dropped = torch.rand(len(chosen)) < study.generator.prompt_dropout
            caption = torch.where(dropped, torch.tensor(row_of[""]), caption)
            views = Views(
                {k: v[chosen].to(device) for k, v in image.items()},
                {"states": prompts[caption].to(device)},
                torch.randn(len(chosen), *shape, device=device),
                torch.rand(len(chosen), device=device),
            )
            loss = family.view_losses(views).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
            optimizer.step()
            schedule.step()
            # A short-horizon average early on, so that the random start is forgotten.
            decay = min(settings.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    average[name].lerp_(parameter, 1 - decay)
            advance(1, f"loss {loss.item():.3f}")
    state: Tensors = {name: value.to("cpu", torch.float16).contiguous() for name, value in average.items()}
    if not all(math.isfinite(float(value.float().sum())) for value in state.values()):
        raise BadInput("generator.warm_start_training diverged; lower its learning_rate")
    write_atomic(path, save(state))


def _texts(record: Record, study: Study) -> list[str]:
    """What an image is shown with: its captions, or its labels in words."""
    if study.generator.warm_start_training.captions == "own":
        return list(record.captions)
    known = [(concept, record.labels.get(concept)) for concept in study.reference.concepts]
    return [", ".join(f"{concept}: {value}" for concept, value in known if value)]


def _encode(family: object, pixels: Tensor) -> Tensors:
    parts = [family.encode_image(part) for part in pixels.split(64)]  # type: ignore[attr-defined]
    return {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}
