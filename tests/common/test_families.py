"""Every large family on a tiny random-weights checkpoint in the real format: objective, clipping, release."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file

from polyclinic.common.generators.base import (
    Views,
    load_family,
    trainable,
)
from polyclinic.common.generators.checkpoint import large_files
from polyclinic.common.generators.families import FAMILIES
from polyclinic.common.generators.lora import adapter_state
from polyclinic.common.privacy.clipping import ENGINES, tau
from polyclinic.common.selftest import self_test
from polyclinic.common.study import Study, parse_study
from polyclinic.simulation.random_checkpoints import save
from tests.common.test_engines import check_exact, gap, gradients, norm, select, views_for
from tests.reloaded import FAMILY_OF, SIZE_OF, generator_table, reloaded

NAMES = sorted(FAMILY_OF)
# Two of them are networks like another's: what their checkpoints say differs, not what is computed.
NETWORKS = [
    pytest.param(name, marks=pytest.mark.long) if name in ("flux-schnell", "stable-diffusion-2-1") else name
    for name in NAMES
]
Make = Callable[..., Any]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = save(name, folder)
        return made[name]

    return find


def study_of(name: str, base: Path, **generator: Any) -> Study:
    values = generator_table(name, base, lora={"rank": 4}, precision="fp32")
    return parse_study(
        {
            "name": "tiny",
            "data": {"image_size": SIZE_OF.get(name, 32)},
            "generator": {**values, **generator},
            "federation": {"lora_aggregation": "factors"},  # A trains, too
            "evaluation": {"prompts": [{"text": "a polyp"}], "steps": 2, "guidance": 3.0},
        },
        "tiny",
    )


@pytest.fixture
def make(checkpoint: Callable[[str], Path]) -> Make:
    """Loads a family, its adapters moved so that none is zero."""

    def load(name: str, *, encoders: bool = False, move: float = 0.1, **generator: Any) -> Any:
        study = study_of(name, checkpoint(name), **generator)
        family: Any = load_family(study, large_files(study.generator), encoders=encoders)
        source = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainable(family.module).values():
                parameter.add_(move * torch.randn(parameter.shape, generator=source))
        return family

    return load


@pytest.mark.parametrize("name", NAMES)
def test_cached_tensors_have_the_shapes_that_are_forecast(make: Make, name: str) -> None:
    family = make(name, encoders=True)
    size = family.study.data.image_size
    image = family.encode_image(torch.rand(2, 3, size, size) * 2 - 1)
    prompt = family.encode_prompt(["a polyp", "", "no polyp at all"])
    views = family.synthetic_views(2)
    assert {n: t.shape[1:] for n, t in image.items()} == {n: t.shape[1:] for n, t in views.image.items()}
    assert {n: t.shape[1:] for n, t in prompt.items()} == {n: t.shape[1:] for n, t in views.prompt.items()}
    assert family.normal_shape(image) == views.normal.shape[1:]
    assert all(bool(t.float().isfinite().all()) for t in (*image.values(), *prompt.values()))
    # A batch of captions is what each of them is alone.
    alone = family.encode_prompt(["a polyp"])
    assert all(torch.allclose(prompt[n][:1], t, atol=1e-5) for n, t in alone.items())


@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_the_target_gives_back_the_noiseless_sample(make: Make, name: str) -> None:
    """The pipeline's own scheduler, told the training target, arrives at the latent in one step."""
    family = make(name)
    views = views_of(family, 5, 1)
    views.image = {n: t * 0 if n == "std" else t for n, t in views.image.items()}
    noised = family.noised(views)
    latent = family.latents(views)
    for row in range(5):
        assert torch.allclose(one_step(family, noised, row), latent[row : row + 1], atol=2e-4)


def one_step(family: Any, noised: Any, row: int) -> torch.Tensor:
    scheduler, one = copy.deepcopy(family.scheduler), slice(row, row + 1)
    time, sample, target = noised.time[row], noised.sample[one], noised.target[one]
    if family.alphas is None:
        scheduler.sigmas = torch.tensor([float(time) / family.time_scale, 0.0])
        scheduler.timesteps, scheduler._step_index = scheduler.sigmas[:1] * 1000, 0
        found: torch.Tensor = scheduler.step(target, scheduler.timesteps[0], sample).prev_sample
        return found
    # The checkpoint's schedule in the scheduler whose estimate of the end has no noise in it.
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    ddim.set_timesteps(1000)
    answer: torch.Tensor = ddim.step(target, int(time), sample).pred_original_sample
    return answer


def views_of(family: Any, patients: int, views: int) -> Views:
    """Random views `[B x K, ...]`."""
    return Views.of({n: t.flatten(0, 1) for n, t in views_for(family, patients, views).tensors().items()})


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_clipping_is_exact_under_checkpointing(make: Make, name: str, views: int) -> None:
    family = make(name)
    assert checkpoints(family)
    check_exact(family, views_for(family, 3, views), tolerance=2e-5)


def checkpoints(family: Any) -> bool:
    """Does the network recompute? Then less is saved for the backward pass than without."""
    saved = []
    for wanted in (True, False):
        family.gradient_checkpointing(wanted)
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            family.view_losses(views_of(family, 1, 1))
        saved.append(total)
    family.gradient_checkpointing(True)
    return saved[0] < saved[1]


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_sensitivity_in_bf16_is_within_tau(make: Make, name: str, views: int) -> None:
    """Frozen weights and arithmetic in bf16, adapters in fp32, activations recomputed."""
    family = make(name, precision="bf16")
    assert {p.dtype for p in trainable(family.module).values()} == {torch.float32}
    some = views_for(family, 3, views)
    each = gradients(family, some)
    clip, margin = 0.5 * min(norm(g) for g in each), 1 + tau("bookkeeping", torch.bfloat16)
    whole = ENGINES["bookkeeping"](family, some, clip, 3)
    want = {n: torch.stack([g[n] * clip / norm(g) / margin for g in each]).sum(0) for n in each[0]}
    assert gap(whole, want) < 1e-2 * norm(want)
    for gone in range(3):
        rest = ENGINES["bookkeeping"](family, select(some, [i for i in range(3) if i != gone]), clip, 3)
        assert 0.98 * clip < gap(whole, rest) <= clip


@pytest.mark.parametrize("name", ["stable-diffusion-xl", "stable-diffusion-3"])  # others: in federations
def test_the_self_test_passes_and_leaves_the_weights(make: Make, name: str) -> None:
    family = make(name, move=0.0, precision="bf16")
    start = adapter_state(family.module)
    self_test(family, "bookkeeping", 2)
    assert all(torch.equal(start[n], t) for n, t in adapter_state(family.module).items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_plain_diffusers_draws_the_same_image_from_the_adapters(
    make: Make, name: str, precision: str, tmp_path: Path
) -> None:
    family = make(name, encoders=True, move=0.3, precision=precision)
    mine = draw(family, family.pipeline())
    family.save(tmp_path, merged=False)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    theirs = reloaded(family.folder, tmp_path, family.dtype)
    assert torch.equal(draw(family, theirs), mine)
    bare = make(name, encoders=True, move=0.0, precision=precision)
    assert not torch.equal(draw(bare, bare.pipeline()), mine)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_merged_pipeline_is_plain_and_draws_what_the_adapters_draw(
    make: Make, name: str, tmp_path: Path
) -> None:
    family = make(name, encoders=True)
    mine = draw(family, family.pipeline())
    family.save(tmp_path, merged=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(path.suffix in (".bin", ".ckpt", ".pt") for path in files)
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert not any("lora" in key for path in weights for key in load_file(path))
    facts = FAMILIES[family.settings.family]
    assert (facts.distilled if name == "flux" else facts.licence) in (tmp_path / "README.md").read_text()
    theirs = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.allclose(draw(family, theirs), mine, atol=1e-3)
    # The adapters are where they were.
    assert torch.equal(draw(family, family.pipeline()), mine)


def draw(family: Any, pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images: torch.Tensor = family.draw(
        pipeline, ["a polyp", "no polyp"], generators, family.study.evaluation, family.study.data.image_size
    )
    return images
