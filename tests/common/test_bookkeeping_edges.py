"""The one-backward engine where things go wrong: overflow, errors, modules it cannot clip, autocast."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyclinic.common.generators.base import Views
from polyclinic.common.privacy.clipping import tau
from polyclinic.common.refusals import Refusal
from tests.common.toys import (
    ROUTES,
    ScaleOf,
    Toy,
    check,
    clipped,
    clipped_each,
    gap,
    norm,
    normal,
    only,
    patients_of,
    toy_views,
)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_broken_patients_contribute_zero_and_harm_nobody(route: str, value: float) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(27, 2))
    # 1e30 overflows only in the second family, whose gradient is the input itself.
    family = Toy(module) if value != 1e30 else Toy(nn.Linear(2, 2))
    views = toy_views(normal(5, 2, 2, 5, 5) if value != 1e30 else normal(5, 2, 2))
    views.normal[1, 0].flatten()[0] = value
    views.normal[3] = value
    rest = Views({}, {}, views.normal[[0, 2, 4]], views.uniform[[0, 2, 4]])
    with only(route):
        for clip in (1e-2, 1e4):
            found, want = clipped(family, views, clip, 5), clipped(family, rest, clip, 5)
            assert norm(want) > 0
            assert gap(found, want) < 1e-6 * norm(want)
            alone = clipped(family, Views({}, {}, views.normal[[3]], views.uniform[[3]]), clip, 1)
            assert not any(bool(t.any()) for t in alone.values())


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20])
def test_gram_norms_never_fall_short_of_the_true_norm(scale: float) -> None:
    # Squares of the output gradient vanish, or those of the input overflow; the product is harmless.
    family: Any = SimpleNamespace(module=nn.Linear(2, 2, bias=False), dtype=torch.float32)
    family.view_losses = lambda views: family.module(views.normal).sum((1, 2)) * views.uniform
    views = Views({}, {}, normal(3, 1, 4, 2) / scale**0.9, torch.full((3, 1), scale))
    with only("gram"):
        for patient in range(3):
            one = Views({}, {}, views.normal[[patient]], views.uniform[[patient]])
            assert norm(clipped(family, one, 1e-3, 1)) <= 1e-3


def test_the_generator_is_left_as_it_was_also_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), ScaleOf(3))
    family = Toy(module)
    module[1].weight.requires_grad_(False)
    before = {name: (p, p.requires_grad) for name, p in module.named_parameters()}
    attributes = {name: set(vars(m)) for name, m in module.named_modules()}
    views = toy_views(normal(2, 2, 3))
    clipped(family, views, 1.0, 2)
    family.run = lambda x: module(x) / None  # type: ignore[operator]
    with pytest.raises(TypeError):
        clipped(family, views, 1.0, 2)
    for name, p in module.named_parameters():
        assert (p, p.requires_grad) == before[name]
        assert p.grad is None
    for name, child in module.named_modules():
        assert set(vars(child)) == attributes[name]
        assert not child._forward_hooks
        assert not child._forward_pre_hooks


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(3, 3), nn.Linear(3, 3)


class OutOfSight(Silent):
    """Uses a weight without calling the module that owns it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.other.weight, self.other.bias)


class Unheard(Silent):
    """Calls a layer whose output goes nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        self.other(x)
        made: Tensor = self.used(x)
        return made


class OneForAll(Silent):
    """Calls a layer on one row that serves every view."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.used(x) * self.other(x[:1])
        return made


class TwoTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.pair(x, x)
        return made


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (OutOfSight(), "other.*does not use"),
        (Unheard(), "other.*called 1 times and got 0"),
        (OneForAll(), "other.*one row a view"),
        (TwoTensors(), r"pair \(Bilinear\).*one tensor"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), r"1 \(BatchNorm1d\) mixes patients"),
    ],
)
def test_what_cannot_be_clipped_exactly_is_refused_by_name(module: nn.Module, says: str) -> None:
    with pytest.raises(Refusal, match=says):
        clipped(Toy(module), toy_views(normal(3, 2, 3)), 1.0, 3)


def test_another_hook_on_a_layer_does_not_change_what_is_recorded() -> None:
    family = Toy(nn.Linear(3, 3))
    family.module.register_forward_hook(lambda module, args, output: output * 3)
    check(family, toy_views(normal(3, 2, 4, 3)))


def test_under_bf16_autocast_norm_and_sum_are_of_the_same_tensors() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(72, 4))
    family, views = Toy(module), toy_views(normal(5, 2, 3, 5, 5))
    each = patients_of(family, views)
    clip = 0.5 * min(norm(g) for g in each)
    want = clipped_each(each, clip)
    for route in ROUTES:
        with only(route), torch.autocast("cpu", torch.bfloat16):
            found = clipped(family, views, clip, 5)
            one = clipped(family, toy_views(views.normal[:1]), clip, 1)
        assert all(t.dtype == torch.float32 for t in found.values())
        assert gap(found, want) < 0.05 * norm(want)
        # The norm is that of the very tensors that are summed: one patient alone is clipped as in fp32.
        assert norm(one) == pytest.approx(clip / (1 + tau("bookkeeping", torch.bfloat16)), rel=1e-4)
