"""MSDM: its sizes, its losses against diffusers' schedulers, what is trained, and its export."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polyclinic.common.data.cache import Cached
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.generators.base import (
    Views,
    load_trainable_state,
    trainable,
    trainable_state,
)
from polyclinic.common.generators.msdm import SIZES, TRAIN_STEPS, Msdm
from polyclinic.common.generators.public import hash_state
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.views import draw_views

RELEASED_PARAMETERS = 326.5e6


def _parameters(size: str, image_size: int) -> int:
    family = Msdm(GeneratorSettings(size=size), image_size, None, device="meta", encoders=False)  # type: ignore[arg-type]
    assert {p.device.type for p in family.module.parameters()} == {"meta"}
    return sum(p.numel() for p in family.module.parameters())


def _tiny(vae: Path, **settings: Any) -> Msdm:
    """msdm-tiny without encoders, moved away from its zero-initialised output."""
    made = Msdm(GeneratorSettings(size="msdm-tiny", max_tokens=16, **settings), 32, vae, encoders=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return made


def _views(count: int, seed: int = 0) -> Views:
    g = torch.Generator().manual_seed(seed)
    return Views(
        {
            "mean": torch.randn(count, 8, 4, 4, generator=g),
            "std": 0.2 * torch.rand(count, 8, 4, 4, generator=g),
        },
        {"states": torch.randn(count, 16, 384, generator=g)},
        torch.randn(count, 2, 8, 4, 4, generator=g),
        torch.linspace(0, 1, count + 1)[:-1] + 0.5 / count,
    )


@contextmanager
def _predicting(family: Msdm, prediction: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let the UNet answer with a given tensor; yields what it was given: noisy latents, timesteps."""
    seen: list[tuple[Tensor, Tensor]] = []

    def answer(_: Any, given: tuple[Tensor, ...], output: Any) -> Any:
        seen.append((given[0], given[1]))
        return replace(output, sample=prediction)

    handle = family.module.register_forward_hook(answer)
    try:
        yield seen
    finally:
        handle.remove()


def _latent_and_noise(views: Views) -> tuple[Tensor, Tensor]:
    return views.image["mean"] + views.image["std"] * views.normal[:, 0], views.normal[:, 1]


def _target(family: Msdm, views: Views, steps: Tensor) -> Tensor:
    """The target by diffusers' own scheduler."""
    latent, noise = _latent_and_noise(views)
    return family.scheduler().get_velocity(latent, noise, steps) if _is_v(family) else noise


def _is_v(family: Msdm) -> bool:
    return family.settings.prediction == "v_prediction"


# ---------------------------------------------------------------- sizes


def test_msdm_has_about_the_released_number_of_parameters_at_the_released_widths() -> None:
    family = Msdm(GeneratorSettings(), 256, None, device="meta", encoders=False)
    assert (
        sum(p.numel() for p in family.module.parameters()) == 310_217_480
    )  # MiniLM is 384 wide; a 768-wide encoder makes it 312.3 M
    assert _parameters("msdm", 256) == pytest.approx(RELEASED_PARAMETERS, rel=0.06)
    config: Any = family.module.config
    assert (config.block_out_channels, config.cross_attention_dim) == ((256, 512, 1024), 1024)
    assert (config.sample_size, config.layers_per_block, config.norm_num_groups) == (32, 2, 32)
    assert all("CrossAttn" in kind for kind in (*config.down_block_types, *config.up_block_types))
    attentions = [m for m in family.module.modules() if type(m).__name__ == "Attention"]
    assert {m.heads for m in attentions} == {4, 8, 16}
    assert not [name for name, _ in family.module.named_parameters() if ".ff." in name]
    assert {type(m).__name__ for m in family.module.modules()}.isdisjoint({"BatchNorm2d"})
    assert all(m.p == 0 for m in family.module.modules() if isinstance(m, torch.nn.Dropout))


def test_smaller_sizes_are_as_small_as_they_say() -> None:
    assert _parameters("msdm-small", 128) == pytest.approx(40e6, rel=0.2)
    assert 3e6 < _parameters("msdm-tiny", 64) < 5e6
    assert set(SIZES) == {"msdm", "msdm-small", "msdm-tiny"}


def test_parameters_do_not_depend_on_image_size() -> None:
    assert _parameters("msdm-tiny", 32) == _parameters("msdm-tiny", 256)


def test_the_start_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(tiny_vae: Path) -> None:
    settings = GeneratorSettings(size="msdm-tiny", max_tokens=16)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first = hash_state(trainable_state(Msdm(settings, 32, tiny_vae, encoders=False).module))
    assert torch.equal(torch.get_rng_state(), before)
    assert hash_state(trainable_state(Msdm(settings, 32, tiny_vae, encoders=False).module)) == first
    other = settings.model_copy(update={"init_seed": 1})
    assert hash_state(trainable_state(Msdm(other, 32, tiny_vae, encoders=False).module)) != first


def test_the_untrained_output_is_zero(tiny_vae: Path) -> None:
    family = Msdm(GeneratorSettings(size="msdm-tiny", max_tokens=16), 32, tiny_vae, encoders=False)
    views = _views(4)
    expected = views.normal[:, 1].flatten(1).abs().mean(1)
    torch.testing.assert_close(family.view_losses(views), expected)


def test_a_state_of_other_names_or_shapes_is_not_loaded(tiny_vae: Path) -> None:
    family = _tiny(tiny_vae)
    state = trainable_state(family.module)
    with pytest.raises(ValueError, match=r"conv_in\.weight: shape \(1,\)"):
        load_trainable_state(family.module, {**state, "conv_in.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other tensors than the generator, e\.g\. extra"):
        load_trainable_state(family.module, {**state, "extra": torch.zeros(1)})
    load_trainable_state(family.module, {name: tensor + 1 for name, tensor in state.items()})
    assert all(torch.equal(t, state[n] + 1) for n, t in trainable_state(family.module).items())


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_target_are_those_of_diffusers(prediction: str, tiny_vae: Path) -> None:
    family, views = _tiny(tiny_vae, prediction=prediction), _views(8)
    steps = (views.uniform * TRAIN_STEPS).long()
    target = _target(family, views, steps)
    with _predicting(family, target) as seen, torch.no_grad():
        losses = family.view_losses(views)
    assert float(losses.abs().max()) < 1e-6
    ((noisy, given_steps),) = seen
    assert torch.equal(given_steps, steps)
    torch.testing.assert_close(
        noisy, family.scheduler().add_noise(*_latent_and_noise(views), steps), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampling_steps", [1, 4, 25])
def test_one_ddim_step_on_the_exact_target_moves_along_the_exact_path(
    prediction: str, sampling_steps: int, tiny_vae: Path
) -> None:
    """From every timestep of a sampler the clean latent is recovered, and the next noisy one is right."""
    family, views = _tiny(tiny_vae, prediction=prediction), _views(1)
    latent, noise = _latent_and_noise(views)
    scheduler = family.scheduler()
    scheduler.set_timesteps(sampling_steps)
    assert int(scheduler.timesteps[0]) == TRAIN_STEPS - 1
    for place, step in enumerate(scheduler.timesteps):
        alpha = family.alphas[step]
        noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
        output = scheduler.step(_target(family, views, step[None]), step, noisy, eta=0.0)
        # At high noise the latent is what is left after a subtraction: rounding grows by 1 / sqrt(alpha).
        torch.testing.assert_close(output.pred_original_sample, latent, atol=2e-3, rtol=1e-3)
        if place + 1 < sampling_steps:
            after = family.alphas[scheduler.timesteps[place + 1]]
            torch.testing.assert_close(
                output.prev_sample, after.sqrt() * latent + (1 - after).sqrt() * noise, atol=2e-3, rtol=1e-3
            )
        else:
            torch.testing.assert_close(output.prev_sample, latent, atol=2e-3, rtol=1e-3)


def test_noise_schedule_is_the_released_one(tiny_vae: Path) -> None:
    family = _tiny(tiny_vae)
    betas = np.linspace(0.002**0.5, 0.02**0.5, 1000) ** 2
    np.testing.assert_allclose(family.alphas.numpy(), np.cumprod(1 - betas), rtol=1e-5)
    torch.testing.assert_close(family.scheduler().alphas_cumprod, family.alphas, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("loss", ["l1", "mse"])
@pytest.mark.parametrize("gamma", [None, 0.5, 5.0])
def test_loss_and_min_snr_weights(prediction: str, loss: str, gamma: float | None, tiny_vae: Path) -> None:
    """With every prediction off by 3 the loss is 3 or 9 times the weight that 2303.09556 gives."""
    family, views = _tiny(tiny_vae, prediction=prediction, loss=loss, snr_gamma=gamma), _views(16)
    steps = (views.uniform * TRAIN_STEPS).long()
    with _predicting(family, _target(family, views, steps) + 3), torch.no_grad():
        losses = family.view_losses(views)
    assert losses.shape == (16,)
    alpha = family.scheduler().alphas_cumprod[steps].double()
    snr = alpha / (1 - alpha)
    weight = torch.ones_like(snr)
    if gamma is not None:
        weight = torch.minimum(snr, torch.tensor(gamma)) / (snr + 1 if prediction == "v_prediction" else snr)
        assert float(weight.max() / weight.min()) > 2
    torch.testing.assert_close(losses.double(), (3 if loss == "l1" else 9) * weight, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_timesteps_have_the_distribution_of_their_formula(shift: float, tiny_vae: Path) -> None:
    """t' < x if and only if t < x / (s - (s - 1) x); and the latents are noised as the network is told."""
    # In float64: latent and noise nearly cancel in places, where fp32 would show how a processor rounds.
    single = _views(250).tensors()
    family = _tiny(tiny_vae, timestep_shift=shift)
    family.module.double()
    views = Views.of({name: tensor.double() for name, tensor in single.items()})
    with _predicting(family, views.normal[:, 1]) as seen, torch.no_grad():
        family.view_losses(views)
    ((noisy, steps),) = seen
    for x in (0.1, 0.25, 0.5, 0.75, 0.9):
        share = float((steps < x * TRAIN_STEPS).double().mean())
        assert share == pytest.approx(x / (shift - (shift - 1) * x), abs=0.006)
    assert 0 <= int(steps.min()) < int(steps.max()) < TRAIN_STEPS
    # diffusers takes its products in fp32, which every processor rounds its own way: here in float64.
    scheduler = family.scheduler()
    first, last = (scheduler.config[name] ** 0.5 for name in ("beta_start", "beta_end"))
    betas = torch.linspace(first, last, TRAIN_STEPS, dtype=torch.float64) ** 2
    torch.testing.assert_close(scheduler.betas.double(), betas, rtol=1e-6, atol=0.0)
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    expected = scheduler.add_noise(*_latent_and_noise(views), steps)
    torch.testing.assert_close(noisy, expected, atol=1e-6, rtol=1e-5)


def test_a_views_loss_does_not_depend_on_its_company(tiny_vae: Path) -> None:
    family, views = _tiny(tiny_vae), _views(5)
    together = family.view_losses(views)
    for place in range(5):
        one = Views.of({name: tensor[place : place + 1] for name, tensor in views.tensors().items()})
        torch.testing.assert_close(family.view_losses(one)[0], together[place], rtol=1e-5, atol=1e-6)


def test_every_part_of_the_text_path_moves_the_loss(tiny_vae: Path) -> None:
    family, views = _tiny(tiny_vae), _views(2)
    other = Views(views.image, {"states": views.prompt["states"].roll(1, 0)}, views.normal, views.uniform)
    assert not torch.allclose(family.view_losses(views), family.view_losses(other), rtol=1e-5)


# ---------------------------------------------------------------- prompts


def test_a_dropped_prompt_is_the_empty_prompts_embedding(encoders: Msdm) -> None:
    texts = ["", "a polyp", "no polyp"]
    states = encoders.encode_prompt(texts)["states"]
    data = Cached(["p"], [[0, 1]], [[1], [2]], {"mean": torch.zeros(2, 8, 4, 4)}, {"states": states}, 0)

    def drawn(dropout: float) -> Tensor:
        views = draw_views(
            KeyedRandom.for_test("k", "s", 1),
            data,
            [0],
            step=0,
            views=400,
            normal_shape=(1,),
            prompt_dropout=dropout,
        )
        return views.prompt["states"][0]

    empty = encoders.encode_prompt([""])["states"][0]
    torch.testing.assert_close(drawn(1.0), empty.expand(400, -1, -1), atol=1e-5, rtol=1e-5)
    is_empty = [bool(torch.equal(row, states[0])) for row in drawn(0.2)]
    assert 50 < sum(is_empty) < 110
    assert not any(torch.equal(row, states[0]) for row in drawn(0.0))


def test_the_pipeline_conditions_on_the_same_embeddings_that_are_cached(encoders: Msdm) -> None:
    """Guidance at sampling uses the embedding that dropped prompts were trained with."""
    text, empty = encoders.pipeline().encode_prompt("a polyp", "cpu", 1, True)
    torch.testing.assert_close(text, encoders.encode_prompt(["a polyp"])["states"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(empty, encoders.encode_prompt([""])["states"], atol=1e-5, rtol=1e-5)


def test_a_long_prompt_is_cut_to_max_tokens(encoders: Msdm) -> None:
    assert encoders.encode_prompt(["polyp " * 100])["states"].shape == (1, 16, 384)


# ---------------------------------------------------------------- what is trained


def test_training_attention_alone_freezes_the_rest(tiny_vae: Path) -> None:
    family = _tiny(tiny_vae, train="attention")
    chosen = set(trainable(family.module))
    inside = {
        f"{name}.{leaf}"
        for name, module in family.module.named_modules()
        if type(module).__name__ == "Attention" or name in ("encoder_hid_proj", "add_embedding")
        for leaf, _ in module.named_parameters()
    }
    assert chosen == inside
    assert set(trainable_state(family.module)) == chosen
    before = {name: p.detach().clone() for name, p in family.module.named_parameters()}
    optimizer = torch.optim.AdamW(family.module.parameters(), lr=1e-3)
    family.view_losses(_views(4)).mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    for name, parameter in family.module.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in chosen), name


def test_everything_is_trained_by_default(tiny_vae: Path) -> None:
    family = _tiny(tiny_vae)
    assert set(trainable(family.module)) == {name for name, _ in family.module.named_parameters()}
    family.view_losses(_views(4)).mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in family.module.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


# ---------------------------------------------------------------- export

RELOAD = """
import sys
import numpy as np, torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], low_cpu_mem_usage=False)
assert "polyclinic" not in sys.modules
images = pipeline(["a polyp", "no polyp"], num_inference_steps=3, guidance_scale=4.5, eta=1.0, height=32,
                  width=32, output_type="np", generator=torch.Generator().manual_seed(5)).images
np.save(sys.argv[2], images)
"""


def test_export_draws_the_same_images_bit_for_bit_in_plain_diffusers(encoders: Msdm, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    pipeline = encoders.pipeline()
    images = pipeline(
        ["a polyp", "no polyp"],
        num_inference_steps=3,
        guidance_scale=4.5,
        eta=1.0,
        output_type="np",
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(5),
    ).images
    assert images.shape == (2, 32, 32, 3)
    assert images.std() > 0.01
    assert not np.array_equal(images[0], images[1])
    pipeline.save_pretrained(tmp_path / "export")
    assert not [
        path for path in (tmp_path / "export").rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")
    ]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "export"), str(tmp_path / "images.npy")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), images)


def test_the_pipeline_is_a_copy_that_training_does_not_touch(encoders: Msdm) -> None:
    unet = encoders.pipeline().unet
    assert not unet.training
    assert unet.conv_in.weight.data_ptr() != encoders.module.conv_in.weight.data_ptr()
    assert torch.equal(unet.conv_in.weight, encoders.module.conv_in.weight)


@pytest.fixture(scope="module")
def encoders(tiny_vae: Path) -> Msdm:
    """msdm-tiny with encoders, random-weight VAE, moved away from its zero-initialised output."""
    made = Msdm(GeneratorSettings(size="msdm-tiny", max_tokens=16), 32, tiny_vae)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return made
