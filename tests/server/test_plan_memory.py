"""The forecast of memory against what an allocator counts, and what a plan refuses and advises by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from polyclinic.common.generators.base import Views, load_family
from polyclinic.common.privacy.clipping import ENGINES
from polyclinic.common.refusals import Refusal
from polyclinic.common.study import Study, parse_study
from polyclinic.server.plan import local_files, plan, words
from polyclinic.server.plan_fit import check_fit
from polyclinic.server.plan_memory import HEADROOM, training_memory, working_bytes
from polyclinic.simulation.random_checkpoints import save
from tests.four_bits import lift_the_gpu_check

PATIENTS = 6


def study_of(base: Path, **tables: dict[str, Any]) -> Study:
    family = base.name.split("-width")[0]
    values: dict[str, Any] = {
        "name": "memory",
        "data": {"image_size": 64},
        "generator": {"family": family, "base": str(base), "lora": {"rank": 4}, "max_tokens": 24},
        "privacy": {"views": 2, "micro_batch": PATIENTS, "sampling_rate": 0.5, "delta": 1e-3},
        "training": {"rounds": 1, "steps_per_round": 1, "device": "cpu", "threads": 1},
        "evaluation": {"prompts": [{"text": "a polyp"}]},
    }
    for table, update in tables.items():
        values[table] = {**values.get(table, {}), **update}
    return parse_study(values, "memory")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    widths = {"stable-diffusion": 4, "kandinsky-3": 4, "flux": 4}
    return {name: save(name, folder, width=width) for name, width in widths.items()}


def allocated(study: Study, *, quantized: bool = False) -> int:
    """Peak of what torch's CPU allocator handed out in one step, temporaries inside kernels included."""
    family = load_family(study, local_files(study, "memory"), encoders=False, quantized=quantized)
    privacy = study.privacy

    def step() -> None:
        views = family.synthetic_views(PATIENTS * privacy.views)
        if privacy.enabled:
            shaped = {n: t.view(PATIENTS, privacy.views, *t.shape[1:]) for n, t in views.tensors().items()}
            ENGINES[privacy.engine](family, Views.of(shaped), privacy.clip, privacy.micro_batch)
        else:
            torch.autograd.backward(family.view_losses(views).sum())
            family.module.zero_grad()

    step()  # caches are made the first time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("name", "kept", "precision", "private"),
    [
        ("flux", "recomputed", "bf16", True),
        ("flux", "kept", "fp32", True),
        ("kandinsky-3", "recomputed", "bf16", True),
        ("stable-diffusion", "recomputed", "bf16", True),
        ("stable-diffusion", "kept", "bf16", True),
        ("stable-diffusion", "recomputed", "fp32", False),
    ],
)
def test_working_memory_is_what_the_allocator_counts(
    bases: dict[str, Path], name: str, kept: str, precision: str, private: bool
) -> None:
    generator = study_of(bases[name]).generator.model_dump(mode="json")
    generator |= {"gradient_checkpointing": kept == "recomputed", "precision": precision}
    study = study_of(bases[name], generator=generator, privacy={"enabled": private})
    family = load_family(study, local_files(study, "memory"), device="meta", encoders=False)
    counted, forecast = allocated(study), working_bytes(study, family)
    assert 0.99 * forecast <= counted <= (1 + HEADROOM) * forecast


def test_parts_add_up_to_what_is_known_of_the_model(bases: dict[str, Path]) -> None:
    study = study_of(bases["flux"])
    memory = training_memory(study, local_files(study, "memory"))
    family = load_family(study, local_files(study, "memory"), encoders=False)
    adapters = [p for p in family.module.parameters() if p.requires_grad]
    base = sum(p.numel() * p.element_size() for p in family.module.parameters() if not p.requires_grad)
    assert memory.frozen == base
    assert memory.trained == 4 * sum(p.numel() for p in adapters)
    assert memory.moments == 2 * memory.trained
    optimizer = torch.optim.AdamW(adapters)
    for p in adapters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert memory.moments == state


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_fewer_bits_are_forecast_as_they_are_held(
    bases: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights to within a percent; a step never takes more than is forecast."""
    pytest.importorskip("torchao", reason="needs polyclinic[quantized]")
    lift_the_gpu_check(monkeypatch)
    generator = study_of(bases["flux"]).generator.model_dump(mode="json") | {"quantize": kind}
    study = study_of(bases["flux"], generator=generator)
    forecast = training_memory(study, local_files(study, "memory"))
    family = load_family(study, local_files(study, "memory"), encoders=False, quantized=True)
    held = sum(stored_bytes(p) for p in family.module.parameters() if not p.requires_grad)
    assert forecast.frozen == pytest.approx(held, rel=0.01)
    whole = training_memory(study_of(bases["flux"]), local_files(study, "memory"))
    assert forecast.frozen < (0.6 if kind == "int8" else 0.35) * whole.frozen
    assert whole.working < allocated(study, quantized=True) <= (1 + HEADROOM) * forecast.working


def stored_bytes(weight: Any) -> int:
    """What a weight takes, with its scales."""
    state = getattr(weight, "quant_state", None)
    parts = [weight.qdata, weight.scale] if hasattr(weight, "qdata") else [weight.data]
    return sum(part.nbytes for part in parts + ([state.absmax] if state else []))


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_study_that_cannot_fit_is_refused_with_settings_that_fit(
    bases: dict[str, Path], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Next to so small a model the driver's context would be everything.
    monkeypatch.setattr("polyclinic.server.plan_memory.CONTEXT_BYTES", 0.0)
    generator = study_of(bases["stable-diffusion"]).generator.model_dump(mode="json")
    generator |= {"gradient_checkpointing": False, "precision": "fp32"}
    study = study_of(bases["stable-diffusion"], generator=generator)
    files = local_files(study, "memory")
    memory = training_memory(study, files)
    limit = share * memory.total
    small = study_of(bases["stable-diffusion"], generator=generator, cost={"gpu_memory_gb": limit / 1e9})
    with pytest.raises(Refusal, match="gpu-too-small") as refused:
        plan(small, memory=True)
    said = str(refused.value)
    assert "it would fit with" in said
    # What it says is done, and then it fits.
    advised = said.split("it would fit with ")[1].split(";")[0]
    if " together" not in advised:
        advised = advised.split(" or ")[0]
    changed = small.model_dump(mode="json")
    if "gradient_checkpointing = true" in advised:
        changed["generator"]["gradient_checkpointing"] = True
    if "micro_batch = " in advised:
        changed["privacy"]["micro_batch"] = int(advised.split("micro_batch = ")[1].split()[0].strip(","))
    if '"bf16"' in advised:
        changed["generator"]["precision"] = "bf16"
    if "lora.rank = " in advised:
        changed["generator"]["lora"]["rank"] = int(advised.split("lora.rank = ")[1].split()[0].strip(","))
    mended = parse_study(changed, "mended")
    assert mended != small
    check_fit(mended, files, training_memory(mended, files))


def test_a_site_may_declare_a_gpu_of_its_own_and_hours_follow_from_its_operations(
    bases: dict[str, Path],
) -> None:
    sites = {
        "north": {"declared_patients": 20, "gpu_memory_gb": 40.0},
        "coast": {"declared_patients": 20, "gpu_memory_gb": 0.5},
    }
    cost = {"gpu_memory_gb": 24.0, "gpu_flops_per_s": 1e12, "gpu_utilisation": 0.25}
    study = study_of(bases["flux"], simulation={"sites": sites}, cost=cost)
    with pytest.raises(Refusal, match=r"where coast has 500 MB; no setting"):
        plan(study, memory=True)
    del sites["coast"]["gpu_memory_gb"]
    study = study_of(bases["flux"], simulation={"sites": sites}, cost=cost)
    planned = plan(study, memory=True)
    assert planned.memory is not None
    assert planned.sites[0].gpu_seconds == pytest.approx((planned.sites[0].flops or 0) / 0.25e12)
    text = words(planned)
    assert "GPU memory at a site" in text
    assert "at the stated utilisation" in text
