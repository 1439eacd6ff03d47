"""Families around any single module, and what one patient at a time gives for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyclinic.common.generators.base import Tensors, Views, trainable
from polyclinic.common.privacy import bookkeeping, layers
from polyclinic.common.privacy.bookkeeping import bookkeeping_sum
from polyclinic.common.privacy.clipping import TAU
from polyclinic.common.privacy.layers import Conv, Matrix

# Work of an entry and of a Gram entry, bytes that may be stored, entries of a small kernel: one way is open.
ROUTES: dict[str, tuple[tuple[int, int], int, int]] = {
    "gram": ((10**12, 0), 0, 0),
    "stored": ((0, 0), 2**40, 0),
    "grouped": ((0, 0), 2**40, 2**40),
    "one at a time": ((0, 0), -(2**40), 0),
}


@contextmanager
def only(route: str) -> Iterator[None]:
    work, stored, small = ROUTES[route]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matrix, "work", work)
        patch.setattr(Conv, "work", work)
        patch.setattr(bookkeeping, "STORED_BYTES", stored)
        patch.setattr(layers, "SMALL_KERNEL", small)
        yield


def clipped(family: Any, views: Views, clip: float, micro_batch: int) -> Tensors:
    return bookkeeping_sum(family, views, clip, micro_batch)


class Toy:
    """A family around any module; a view's input is its `normal`, its loss a random product of the output.

    `rising` makes every gradient positive: where thousands of positions cancel to nothing, a norm from Gram
    matrices is rounded up by more than the tolerance.
    """

    def __init__(
        self, module: nn.Module, run: Callable[[Tensor], Tensor] | None = None, *, rising: bool = False
    ) -> None:
        self.module, self.run, self.rising = module, run or module, rising
        generator = torch.Generator().manual_seed(3)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def view_losses(self, views: Views) -> Tensor:
        rows = self.run(views.normal).flatten(1)
        direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(4))
        made = nn.functional.softplus(rows) @ direction.abs() if self.rising else rows.sin() @ direction
        return made * (1 + views.uniform)


def toy_views(inputs: Tensor) -> Views:
    """Views of inputs `[B, K, ...]`."""
    uniform = torch.rand(inputs.shape[:2], generator=torch.Generator().manual_seed(5))
    return Views({}, {}, inputs, uniform)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patients_of(family: Any, views: Views) -> list[Tensors]:
    """Gradients by plain autograd, one patient at a time; shares no code with ours."""
    found = []
    for patient in range(len(views.uniform)):
        one = Views({}, {}, views.normal[patient], views.uniform[patient])
        loss = family.view_losses(one).mean()
        parameters = trainable(family.module)
        made = torch.autograd.grad(loss, list(parameters.values()))
        found.append({n: g.double() for n, g in zip(parameters, made, strict=True)})
    return found


def norm(gradient: Tensors) -> float:
    return float(torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt())


def clipped_each(each: list[Tensors], clip: float) -> Tensors:
    parts = [{n: g[n] * min(1.0, clip / norm(g)) / (1 + TAU) for n in g} for g in each]
    return {n: torch.stack([part[n] for part in parts]).sum(0) for n in each[0]}


def gap(one: Tensors, other: Tensors) -> float:
    return norm({name: one[name].double() - other[name].double() for name in one})


def check(family: Any, views: Views, *, tolerance: float = 1e-5) -> None:
    """Sum and norms are those of one patient at a time, whoever is clipped."""
    each = patients_of(family, views)
    norms = sorted(norm(gradient) for gradient in each)
    for clip in (1e6, norms[len(norms) // 2], 0.3 * norms[0]):
        want = clipped_each(each, clip)
        for micro_batch in (len(each), 2):
            assert gap(clipped(family, views, clip, micro_batch), want) < tolerance * norm(want)
    for patient, gradient in enumerate(each):
        one = Views({}, {}, views.normal[patient : patient + 1], views.uniform[patient : patient + 1])
        clip = 1e-2 * norm(gradient)
        # A clipped contribution is C x (true norm) / (norm that the engine found).
        assert norm(clipped(family, one, clip, 1)) == pytest.approx(clip / (1 + TAU), rel=tolerance)


class ScaleOf(nn.Module):
    """A bare parameter beside a submodule."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros(2, width))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x * self.table[0]).tanh() + self.table[1]
        return made
