"""Adapters over 8- and 4-bit weights: clipping as exact as over whole ones, and what cannot be had here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyclinic.client.approval import check_base
from polyclinic.common.generators.base import (
    BaseFiles,
    load_family,
    load_trainable_state,
    trainable,
    trainable_state,
)
from polyclinic.common.generators.checkpoint import hash_files, large_files
from polyclinic.common.generators.quantized import check_quantized
from polyclinic.common.privacy.clipping import ENGINES
from polyclinic.common.refusals import BadInput
from polyclinic.common.selftest import self_test
from polyclinic.common.study import Resolved
from polyclinic.simulation.random_checkpoints import save
from tests.common.test_engines import check_exact, gap, norm, select, views_for
from tests.common.test_families import study_of
from tests.four_bits import lift_the_gpu_check

pytest.importorskip("torchao", reason="needs polyclinic[quantized]")
pytest.importorskip("bitsandbytes", reason="needs polyclinic[quantized]")

# One of each kind of network, and both stages of one that has two.
NAMES = ["stable-diffusion", "stable-diffusion-3", "flux", "kandinsky-2-2", "kandinsky-3"]
KINDS = [("int8", name) for name in NAMES] + [("nf4", "stable-diffusion"), ("nf4", "flux")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save(name, folder) for name in NAMES}


@pytest.fixture
def nf4_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lift_the_gpu_check(monkeypatch)


def load(base: Path, name: str, kind: str, precision: str = "fp32", move: float = 0.1) -> Any:
    study = study_of(name, base, quantize=kind, precision=precision)
    family: Any = load_family(study, large_files(study.generator), encoders=False, quantized=True)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(family.module).values():
            parameter.add_(move * torch.randn(parameter.shape, generator=source))
    return family


@pytest.mark.usefixtures("nf4_on_a_cpu")
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_clipping_is_exact_under_checkpointing(
    bases: dict[str, Path], kind: str, name: str, views: int
) -> None:
    family = load(bases[name], name, kind)
    assert family.settings.gradient_checkpointing
    check_exact(family, views_for(family, 3, views), tolerance=2e-5)


@pytest.mark.usefixtures("nf4_on_a_cpu")
@pytest.mark.parametrize(("kind", "name"), [("int8", "flux"), ("nf4", "flux"), ("int8", "kandinsky-2-2")])
def test_sensitivity_in_bf16_is_within_tau(bases: dict[str, Path], kind: str, name: str) -> None:
    family = load(bases[name], name, kind, "bf16")
    assert {p.dtype for p in trainable(family.module).values()} == {torch.float32}
    some = views_for(family, 3, 3)
    clip = 0.5 * min(norm(ENGINES["loop"](family, select(some, [i]), 1e9, 1)) for i in range(3))
    whole = ENGINES["bookkeeping"](family, some, clip, 3)
    assert gap(whole, ENGINES["loop"](family, some, clip, 3)) < 1e-2 * norm(whole)
    for gone in range(3):
        rest = ENGINES["bookkeeping"](family, select(some, [i for i in range(3) if i != gone]), clip, 3)
        assert 0.98 * clip < gap(whole, rest) <= clip


@pytest.mark.usefixtures("nf4_on_a_cpu")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_self_test_passes(bases: dict[str, Path], kind: str) -> None:
    self_test(load(bases["flux"], "flux", kind, "bf16", move=0.0), "bookkeeping", 2)


@pytest.mark.usefixtures("nf4_on_a_cpu")
@pytest.mark.parametrize(("kind", "largest"), [("int8", 0.05), ("nf4", 0.25)])
def test_weights_are_rounded_and_adapters_are_those_of_the_whole_base(
    bases: dict[str, Path], kind: str, largest: float
) -> None:
    """Each linear layer but adapters is the whole base's, rounded; its state fits the whole base."""
    family, study = load(bases["flux"], "flux", kind), study_of("flux", bases["flux"])
    whole: Any = load_family(study, large_files(study.generator), encoders=False)
    load_trainable_state(whole.module, trainable_state(family.module))
    names = {n: m for n, m in whole.module.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n}
    source = torch.Generator().manual_seed(0)
    for name, layer in names.items():
        rounded = family.module.get_submodule(name)
        given = torch.randn(64, layer.in_features, generator=source)
        with torch.no_grad():
            want, found = layer(given), rounded(given)
        error = float((found - want).norm() / want.norm())
        assert 0 < error < largest, (name, error)
    views = family.synthetic_views(2)
    assert torch.allclose(family.view_losses(views), whole.view_losses(views), rtol=largest)


def test_what_is_drawn_stands_on_the_whole_base(bases: dict[str, Path]) -> None:
    """Judging and export load without `quantized`, so that what is judged is what a person gets."""
    plain, study = study_of("flux", bases["flux"]), study_of("flux", bases["flux"], quantize="int8")
    files = large_files(study.generator)
    one, other = (
        dict(load_family(s, files, encoders=False).module.named_parameters()) for s in (plain, study)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert hash_files(files, plain) == hash_files(
        files, study
    )  # the same checkpoint; the study says the rest
    assert "trained over int8 weights" in study.generator.words


def resolved(base: Path, kind: str) -> tuple[Resolved, BaseFiles]:
    study, files = study_of("flux", base, quantize=kind), BaseFiles(pipeline=base)
    training = study.training.model_copy(update={"device": "cpu"})
    study = study.model_copy(update={"training": training})
    named = hash_files(files, study)
    return Resolved(study=study, base_hash=named, start_hash="0" * 64, reference_hash="0" * 64), files


def test_four_bits_without_a_gpu_are_refused_before_anything_is_spent(bases: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=r'quantize = "nf4"` needs an NVIDIA GPU, and this site trains on cpu'):
        check_base(*resolved(bases["flux"], "nf4"))
    check_base(*resolved(bases["flux"], "int8"))


def test_a_missing_package_is_named(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)  # as where it is not installed
    with pytest.raises(BadInput, match=r"needs the package torchao.*polyclinic\[quantized\]"):
        check_base(*resolved(bases["flux"], "int8"))
    check_quantized(study_of("flux", bases["flux"]).generator, "cpu")
