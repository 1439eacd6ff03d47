"""Kandinsky 2.2: two stages, one module and one loss; what each is told and what it should answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.common.generators.base import load_family, trainable
from polyclinic.common.generators.checkpoint import large_files
from polyclinic.simulation.random_checkpoints import save
from tests.common.test_engines import gradients, norm, views_for
from tests.common.test_families import study_of, views_of

NAME = "kandinsky-2-2"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(NAME, tmp_path_factory.mktemp("kandinsky"))


def load(base: Path, *, encoders: bool = False, **generator: Any) -> Any:
    study = study_of(NAME, base, **generator)
    return load_family(study, large_files(study.generator), encoders=encoders)


def test_the_priors_target_is_the_embedding_as_its_own_scheduler_ends(base: Path) -> None:
    family = load(base)
    views = views_of(family, 4, 1)
    noised, scheduler = family.noised_embedding(views), family.prior_scheduler
    width = views.image["embedding"].shape[1]
    noise, embedding = views.normal[:, 0, :width], family.embedding(views)
    assert torch.allclose(noised.sample, scheduler.add_noise(embedding, noise, noised.time), atol=1e-6)
    scheduler.register_to_config(clip_sample=False)
    last = scheduler.step(noised.target, 0, noised.sample, prev_timestep=-1).prev_sample
    ended = family.module["prior"].post_process_latents(last)
    # That scheduler takes 1 - alpha of its first step, 4e-5, in fp32.
    assert torch.allclose(ended, views.image["embedding"], rtol=3e-3, atol=3e-3)


def test_both_stages_noises_are_their_own(base: Path) -> None:
    family = load(base)
    views = views_of(family, 2, 1)
    width, kept = views.image["embedding"].shape[1], (family.noised(views), family.noised_embedding(views))
    views.normal[:, :, :width] += 1.0
    assert torch.equal(family.noised(views).sample, kept[0].sample)
    assert not torch.equal(family.noised_embedding(views).sample, kept[1].sample)


def test_an_image_is_embedded_as_the_prior_pipeline_embeds_it(base: Path) -> None:
    family = load(base, encoders=True)
    drawn = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(drawn).permute(2, 0, 1)[None].float() / 127.5 - 1
    prepared = family.prior.image_processor(Image.fromarray(drawn), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = family.prior.image_encoder(prepared).image_embeds
    assert torch.allclose(family.encode_image(pixels)["embedding"], expected, atol=1e-5)


def test_without_a_prompt_the_decoder_is_given_a_black_image(base: Path) -> None:
    family = load(base, encoders=True)
    empty = family.encode_prompt([""])
    black = family.prior.get_zero_embed()
    assert torch.allclose(empty["blank"], black)
    views = views_of(family, 1, 1)
    noised = family.noised(views)
    answers = []
    for given, image in ((0.0, views.image["embedding"]), (0.0, 2 * views.image["embedding"]), (1.0, black)):
        views.prompt |= {"given": torch.tensor([[given]]), "blank": black}
        views.image["embedding"] = image
        answers.append(family.predict(noised.sample, noised.time, views))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_a_patients_norm_is_over_both_stages(base: Path) -> None:
    """One bound C on both together: sqrt(|decoder|^2 + |prior|^2), with each what it is alone."""
    both = load(base)
    views = views_for(both, 2, 2)
    sizes = {}
    for stages in (("decoder", "prior"), ("decoder",), ("prior",)):
        family = load(base, stages=stages)
        with torch.no_grad():
            for name, parameter in trainable(family.module).items():
                source = torch.Generator().manual_seed(len(name))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
        assert {name.split(".")[0] for name in trainable(family.module)} == set(stages)
        sizes[stages] = [norm(each) for each in gradients(family, views)]
    together, *alone = sizes.values()
    for size, decoder, prior in zip(together, *alone, strict=True):
        assert size == pytest.approx((decoder**2 + prior**2) ** 0.5, rel=1e-5)
        assert min(decoder, prior) > 0
