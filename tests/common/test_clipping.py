"""PRIVACY.md, rules 2 and 3: finite by construction, and remove-one sensitivity on the real UNet."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polyclinic.common.data.cache import Cached
from polyclinic.common.generators.base import Family, Tensors, Views, trainable
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.other_engines import loop_sum, vmap_sum
from polyclinic.common.privacy.bookkeeping import bookkeeping_sum
from polyclinic.common.privacy.clipping import TAU, clip_factors
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.views import draw_views

ENGINES = [bookkeeping_sum, vmap_sum, loop_sum]


def some_views(data: Cached, patients: int, views: int, step: int = 0) -> Views:
    random = KeyedRandom(b"c" * 32)
    return draw_views(
        random,
        data,
        list(range(patients)),
        step=step,
        views=views,
        normal_shape=(2, 8, 4, 4),
        prompt_dropout=0.2,
    )


def select(views: Views, rows: list[int]) -> Views:
    return Views.of({name: tensor[rows] for name, tensor in views.tensors().items()})


def patient_gradient(family: Family, views: Views, patient: int) -> Tensor:
    """Gradient of the plain mean loss of one patient's views, float64; shares no code with ours."""
    family.module.zero_grad()
    one = Views.of({name: tensor[patient] for name, tensor in views.tensors().items()})
    torch.autograd.backward(family.view_losses(one).mean())
    return torch.cat(
        [p.grad.double().flatten() for _, p in sorted(family.module.named_parameters()) if p.grad is not None]
    )


def vector(sums: Tensors) -> Tensor:
    return torch.cat([sums[name].double().flatten() for name in sorted(sums)])


def brute_force(family: Family, views: Views, clip: float) -> tuple[Tensor, list[float]]:
    total, norms = torch.zeros(()), []
    for patient in range(len(views.uniform)):
        gradient = patient_gradient(family, views, patient)
        norms.append(float(gradient.norm()))
        total = total + gradient * min(1.0, clip / norms[-1]) / (1 + TAU)
    family.module.zero_grad()
    return total, norms


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("count", [1, 3])
def test_loop_equals_brute_force_and_vmap_equals_loop(family: Msdm, cached: Cached, count: int) -> None:
    views = some_views(cached, 5, count)
    norms = brute_force(family, views, 1.0)[1]
    clip = sorted(norms)[2]  # two are clipped, two are not
    assert min(norms) < 0.99 * clip < 1.01 * clip < max(norms)
    want, _ = brute_force(family, views, clip)
    oracle = loop_sum(family, views, clip)
    assert relative(vector(oracle), want) < 1e-5
    for micro_batch in (1, 3) if count == 3 else (2, 8):
        sums = vmap_sum(family, views, clip, micro_batch)
        assert sums.keys() == trainable(family.module).keys()
        assert relative(vector(sums), vector(oracle)) < 1e-5, micro_batch
        for name in sums:
            scale = max(float(oracle[name].norm()), 1e-3 * float(vector(oracle).norm()))
            assert float((sums[name] - oracle[name]).norm()) < 1e-4 * scale, name


@pytest.mark.parametrize("share", ["half", "all"])
def test_removing_any_patient_moves_the_sum_by_at_most_c(family: Msdm, cached: Cached, share: str) -> None:
    views = some_views(cached, 6, 2)
    norms = sorted(brute_force(family, views, 1.0)[1])
    clip = norms[3] if share == "half" else 0.1 * norms[0]
    whole = vector(vmap_sum(family, views, clip, 4))
    moved = []
    for gone in range(6):
        # Those after the patient move to another place and another micro-batch.
        rest = vector(vmap_sum(family, select(views, [i for i in range(6) if i != gone]), clip, 4))
        moved.append(float((whole - rest).norm()))
    assert max(moved) <= clip
    assert max(moved) > 0.999 * clip
    assert share == "half" or min(moved) > 0.999 * clip


@pytest.mark.parametrize("engine", ENGINES)
def test_views_share_one_norm(family: Msdm, cached: Cached, engine: Any) -> None:
    views = some_views(cached, 1, 3)
    gradient = patient_gradient(family, views, 0)
    clip = 0.5 * float(gradient.norm())
    found = vector(engine(family, views, clip, 8))
    assert float(found.norm()) == pytest.approx(clip / (1 + TAU), rel=1e-5)
    assert relative(found, gradient * clip / gradient.norm() / (1 + TAU)) < 1e-5
    each = [
        patient_gradient(family, Views.of({n: t[:, i : i + 1] for n, t in views.tensors().items()}), 0)
        for i in range(3)
    ]
    per_view = sum(g * min(1.0, clip / float(g.norm())) for g in each)
    assert isinstance(per_view, Tensor)
    assert relative(found, per_view / 3) > 0.01  # clipping per view would be something else


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_gives_zeros_for_every_parameter(family: Msdm, cached: Cached, engine: Any) -> None:
    sums = engine(family, some_views(cached, 0, 2), 1.0, 4)
    assert {name: t.shape for name, t in sums.items()} == {
        n: p.shape for n, p in trainable(family.module).items()
    }
    assert not any(bool(tensor.any()) for tensor in sums.values())


@pytest.mark.parametrize("value", [1e36, float("inf"), float("nan")])
def test_a_patient_who_overflows_contributes_exactly_zero(family: Msdm, cached: Cached, value: float) -> None:
    views = some_views(cached, 4, 2)
    views.image["mean"][2] = value
    assert not bool(patient_gradient(family, views, 2).isfinite().all())
    rest = select(views, [0, 1, 3])
    for engine in ENGINES:
        # One patient a micro-batch: the others' arithmetic is the same, so equality is exact.
        sums, without = engine(family, views, 0.1, 1), engine(family, rest, 0.1, 1)
        assert all(torch.equal(sums[name], without[name]) for name in sums)
    together = vector(vmap_sum(family, views, 0.1, 4))
    assert bool(together.isfinite().all())
    assert relative(together, vector(vmap_sum(family, rest, 0.1, 4))) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_overflow_for_everyone_give_exactly_zero(
    family: Msdm, cached: Cached, engine: Any
) -> None:
    with torch.no_grad():
        for parameter in family.module.parameters():
            parameter.mul_(1e25)
    sums = engine(family, some_views(cached, 3, 2), 1.0, 2)
    assert not any(bool(tensor.any()) for tensor in sums.values())


def test_factors_of_odd_norms() -> None:
    squared = torch.tensor([0.0, 1e-30, 0.25, 4.0, 1e38, torch.inf, torch.nan])
    factors = clip_factors(squared, 1.0)
    assert factors.tolist()[:4] == pytest.approx([1 / (1 + TAU)] * 3 + [0.5 / (1 + TAU)])
    assert factors.tolist()[5:] == [0.0, 0.0]
    assert bool(factors.isfinite().all())


class GradientFamily:
    """A family whose patient gradient is the number given as the patient's `normal`, exactly."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.module = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})

    def view_losses(self, views: Views) -> Tensor:
        made: Tensor = self.module["a"](views.normal[:, :2]) + self.module["b"](views.normal[:, 2:])
        return made[:, 0]


ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ANY, ANY, ANY), max_size=6), st.floats(1e-3, 1e3), st.integers(1, 7))
def test_any_gradient_gives_a_finite_sum_of_bounded_parts(
    rows: list[tuple[float, float, float]], clip: float, micro_batch: int
) -> None:
    family: Any = GradientFamily()
    normal = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 1, 3)
    views = Views({}, {}, normal, torch.zeros(len(rows), 1))
    want = torch.zeros(3, dtype=torch.float64)
    for row in normal[:, 0]:
        one = Views({}, {}, row[None, None], torch.zeros(1, 1))
        for engine in ENGINES:
            part = vector(engine(family, one, clip, 1))
            assert float(part.norm()) <= clip
            if not bool(row.isfinite().all()):
                assert not bool(part.any())
        want += part
    for engine in ENGINES:
        found = vector(engine(family, views, clip, micro_batch))
        assert bool(found.isfinite().all())
        assert torch.allclose(found, want, rtol=1e-5, atol=1e-5 * clip)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_finite_gradient_whose_norm_overflows_contributes_exactly_zero(engine: Any) -> None:
    family: Any = GradientFamily()
    normal = torch.tensor([[[1e30, 0.0, 0.0]], [[0.0, 0.5, 0.0]]])
    sums = engine(family, Views({}, {}, normal, torch.zeros(2, 1)), 1.0, 2)
    assert vector(sums).tolist() == pytest.approx([0.0, 0.5 / (1 + TAU), 0.0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_one_number_a_view_is_refused(engine: Any) -> None:
    module = nn.Linear(3, 1)
    losses = lambda views: module(views.normal).sum()  # noqa: E731
    family: Any = SimpleNamespace(module=module, dtype=torch.float32, view_losses=losses)
    with pytest.raises(ValueError, match="view losses have shape"):
        engine(family, Views({}, {}, torch.ones(2, 2, 3), torch.zeros(2, 2)), 1.0, 2)


def test_only_what_is_trained_enters_sum_and_norm(family: Msdm, cached: Cached) -> None:
    for name, parameter in family.module.named_parameters():
        parameter.requires_grad_(".attentions." in name)
    views = some_views(cached, 2, 2)
    found = vmap_sum(family, views, 1e-3, 2)
    assert found.keys() == trainable(family.module).keys()
    assert len(found) < len(list(family.module.parameters()))
    assert relative(vector(found), brute_force(family, views, 1e-3)[0]) < 1e-5
