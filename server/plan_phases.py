"""Operations and speed of what surrounds training: pretraining, the sites' caches, judging.

All of it follows from the study and from sizes that are declared. What depends on how many images somebody
has is left out (the reference's own encoding) or taken as one a patient (a site's cache).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from polyclinic.common.cost import count_flops, view_flops
from polyclinic.common.evaluation_settings import EFFICIENTNET, INCEPTION, RADIOMIC, ExtractorSettings
from polyclinic.common.features.load import load_extractor
from polyclinic.common.generator_settings import VaeTraining
from polyclinic.common.generators.base import BaseFiles, Family, load_family
from polyclinic.common.generators.public import resolve
from polyclinic.common.study import Study
from polyclinic.server.adversarial import patch_discriminator
from polyclinic.server.pretrain import new_autoencoder
from polyclinic.server.report.metrics import Part

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

REFERENCE = "reference"
# Kept on this machine whole: these may be run to be counted, where a named model would be fetched.
PACKAGED = (EFFICIENTNET, RADIOMIC, INCEPTION)


class Phases(Part):
    """Operations beside training; None where the study has no such phase or they cannot be known here.

    Attributes:
        autoencoder: Training the public autoencoder, all its steps.
        autoencoder_image: One image in a step of its reconstruction.
        start: Training the public warm start, all its steps.
        encode: Encoding one image and one caption for a site's cache.
        extract: Features of one drawn image, by every extractor.
    """

    autoencoder: float | None = None
    autoencoder_image: float | None = None
    start: float | None = None
    encode: float | None = None
    extract: float | None = None

    @property
    def pretrain(self) -> float | None:
        """Both parts that are trained at the coordinator."""
        parts = [part for part in (self.autoencoder, self.start) if part is not None]
        return sum(parts) if parts else None


def count_phases(study: Study, files: BaseFiles) -> Phases:
    """Count them on the meta device, but for the extractors, which see one grey image.

    Args:
        study: The study.
        files: Its base, as far as it is here.
    """
    generator = study.generator
    made = not generator.large
    trained = made and generator.vae == REFERENCE
    recipe = generator.vae_training
    plain, sharpened = _autoencoder_flops(recipe, study.data.image_size) if trained else (0.0, 0.0)
    steps = recipe.steps * plain + recipe.adversarial_steps * sharpened
    return Phases(
        autoencoder=steps * recipe.batch_size if trained else None,
        autoencoder_image=plain if trained else None,
        start=_start_flops(study, files) if made and generator.warm_start == REFERENCE else None,
        encode=_encode_flops(study, files),
        extract=_extract_flops(study.evaluation.extractors, study.data.image_size),
    )


@lru_cache(maxsize=16)
def _autoencoder_flops(recipe: VaeTraining, size: int) -> tuple[float, float]:
    """One image in a step of `pretrain_vae`: of the reconstruction, and against the discriminator."""
    with torch.device("meta"):
        vae, judge = new_autoencoder(recipe, size), patch_discriminator()
        image = torch.zeros(1, 3, size, size)

    def against_the_discriminator() -> None:
        with torch.no_grad():
            latent = vae.encode(image).latent_dist.mean
        output = vae.decode(latent).sample
        judge.requires_grad_(False)
        (output.sum() + judge(output).mean()).backward()
        judge.requires_grad_(True)
        (judge(image).mean() + judge(output.detach()).mean()).backward()

    plain = count_flops(lambda: vae(image).sample.sum().backward())
    return float(plain), float(count_flops(against_the_discriminator))


def whole_network(study: Study, files: BaseFiles, device: str) -> Family:
    """The family as `pretrain_generator` trains it: all of its network, from untrained weights."""
    whole = study.generator.model_copy(update={"train": "all"})
    return load_family(
        study.model_copy(update={"generator": whole}), BaseFiles(vae=files.vae), device=device, encoders=False
    )


def _start_flops(study: Study, files: BaseFiles) -> float:
    settings = study.generator.warm_start_training
    return float(view_flops(whole_network(study, files, "meta"))) * settings.steps * settings.batch_size


def _encode_flops(study: Study, files: BaseFiles) -> float | None:
    made = encoder(study, files, "meta")
    return None if made is None else float(count_flops(lambda: made(1)))


def encoder(study: Study, files: BaseFiles, device: str) -> Callable[[int], None] | None:
    """What encodes so many images and captions for a cache, of the right shapes and without their weights.

    Returns:
        None for a large model, or where the autoencoder is not on this machine.
    """
    from transformers import AutoConfig, AutoModel

    generator = study.generator
    vae = None if generator.large else _autoencoder(study, files)
    if vae is None:
        return None
    folder = resolve(generator.text_encoder, generator.text_encoder_revision, "generator.text_encoder")
    with torch.device("meta"):
        text = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False)).eval()
    _fill(vae, device)
    _fill(text, device)

    def encode(count: int) -> None:
        size = study.data.image_size
        tokens = torch.zeros(count, generator.max_tokens, dtype=torch.long, device=device)
        with torch.no_grad():
            vae.encode(torch.zeros(count, 3, size, size, device=device))
            text(tokens)  # without a mask, which takes the same arithmetic

    return encode


def _fill(module: nn.Module, device: str) -> None:
    """Give a network that has shapes alone weights to be timed with."""
    if device == "meta":
        return
    module.to_empty(device=device)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.zero_()


def works(study: Study, files: BaseFiles, device: str) -> dict[str, Callable[[int], object]]:
    """What is to be timed for these phases: name in `Speed` to a function of a number of images.

    Args:
        study: The study.
        files: Its base, as far as it is here.
        device: Where to compute.
    """
    generator, size = study.generator, study.data.image_size
    found: dict[str, Callable[[int], object]] = {}
    if not generator.large and generator.vae == REFERENCE:
        with torch.device("meta"):
            vae = new_autoencoder(generator.vae_training, size)
        _fill(vae, device)

        def reconstruct(count: int) -> None:
            vae(torch.zeros(count, 3, size, size, device=device)).sample.sum().backward()

        found["autoencoder"] = reconstruct
    if not generator.large and generator.warm_start == REFERENCE:
        family = whole_network(study, files, device)
        found["start"] = lambda n: family.view_losses(family.synthetic_views(n)).mean().backward()
    encode = encoder(study, files, device)
    if encode is not None:
        found["encode"] = encode
    if all(settings.source in PACKAGED for settings in study.evaluation.extractors):
        extractors = [load_extractor(settings, device) for settings in study.evaluation.extractors]
        image = torch.full((1, 3, size, size), 0.5)
        found["extract"] = lambda n: [e.extract(image.expand(n, -1, -1, -1)) for e in extractors]
    return found


def _autoencoder(study: Study, files: BaseFiles) -> AutoencoderKL | None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        if files.vae is not None:
            return AutoencoderKL.from_config(AutoencoderKL.load_config(files.vae)).eval()
        if study.generator.vae == REFERENCE:
            return new_autoencoder(study.generator.vae_training, study.data.image_size).eval()
    return None


@lru_cache(maxsize=16)
def _extract_flops(extractors: tuple[ExtractorSettings, ...], size: int) -> float | None:
    """Operations of one image by all extractors; None where one would have to be fetched or loaded first."""
    if any(settings.source not in PACKAGED for settings in extractors):
        return None
    image = torch.full((1, 3, size, size), 0.5)
    loaded = [load_extractor(settings) for settings in extractors]
    return float(count_flops(lambda: [extractor.extract(image) for extractor in loaded]))


def forward_flops(family: Family) -> int:
    """Count the operations of one view without its backward pass."""
    views = family.synthetic_views(1)
    with torch.no_grad():
        return count_flops(lambda: family.view_losses(views))
