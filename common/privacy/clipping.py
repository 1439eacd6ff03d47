"""Per-patient clipping: the bounded sum that noise is added to.

Two engines give the same sum. `vmap` maps torch.func's gradient over patients, a fixed micro-batch
at a time; `loop` takes one patient at a time and is the oracle. A patient's gradient is that of the
mean loss over its K views; all trainable parameters share one norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyclinic.common.generators.base import Family, Tensors, Views, trainable

# Worst relative error of a computed norm, tested for fp32 by tests/common/test_clipping.py; every
# contribution is scaled by 1 / (1 + TAU), so that the sensitivity is at most C (PRIVACY.md, rule 3).
TAU = 1e-4

Clipper = Callable[[Views], Tensors]


class _PatientLoss(nn.Module):
    """Mean loss of one patient's views as a module, so that its parameters can be swapped."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.module = family.module
        self._losses = family.view_losses

    def forward(self, views: Tensors) -> Tensor:
        losses = self._losses(Views.of(views))
        if losses.ndim != 1:
            raise ValueError(f"view losses have shape {tuple(losses.shape)}, not [views]")
        return losses.mean()


def clip_factors(squared_norms: Tensor, clip: float) -> Tensor:
    """Factor on each patient's gradient.

    Args:
        squared_norms: `[B]`, possibly not finite.
        clip: C.

    Returns:
        `[B]`: min(1, C / norm) / (1 + tau), and exactly 0 where the norm is not finite (rule 2).
    """
    norms = squared_norms.sqrt()
    factors = (clip / norms.clamp(min=1e-12)).clamp(max=1.0) / (1 + TAU)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def _accumulate(sums: Tensors, gradients: Tensors, clip: float) -> None:
    """Add a micro-batch's clipped gradients `[B, ...]` to the running sums."""
    squared = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    factors = clip_factors(squared, clip)
    broken = factors == 0
    for name, gradient in gradients.items():
        flat = gradient.flatten(1)
        if bool(broken.any()):
            # Replaced before the product: 0 x inf is NaN.
            flat = flat.masked_fill(broken[:, None], 0.0)
        sums[name] += (factors @ flat).view_as(sums[name])


def _zeros(family: Family) -> Tensors:
    return {name: torch.zeros_like(p) for name, p in trainable(family.module).items()}


def vmap_sum(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    """Clipped sum over patients, several at once.

    Args:
        family: The generator.
        views: Tensors `[B, K, ...]`; B may be 0.
        clip: C, bound on a patient's gradient norm.
        micro_batch: Patients whose gradients are in memory at once.

    Returns:
        Parameter name to clipped sum, finite always.
    """
    loss = _PatientLoss(family)
    parameters = {f"module.{name}": p.detach() for name, p in trainable(family.module).items()}
    one = grad(lambda weights, patient: functional_call(loss, weights, (patient,)))
    many = vmap(one, in_dims=(None, 0))
    sums = _zeros(family)
    for part in _micro_batches(views, micro_batch):
        # The fused attention kernels have no batching rule; the plain formula has.
        with sdpa_kernel(SDPBackend.MATH):
            gradients = many(parameters, part)
        _accumulate(sums, {name.removeprefix("module."): g for name, g in gradients.items()}, clip)
    return sums


def loop_sum(family: Family, views: Views, clip: float, micro_batch: int = 1) -> Tensors:
    """Clipped sum over patients, one at a time by plain autograd: the oracle."""
    loss = _PatientLoss(family)
    parameters = trainable(family.module)
    sums = _zeros(family)
    for part in _micro_batches(views, 1):
        value = loss({name: tensor[0] for name, tensor in part.items()})
        gradients = torch.autograd.grad(value, list(parameters.values()))
        _accumulate(sums, dict(zip(parameters, (g[None] for g in gradients), strict=True)), clip)
    return sums


ENGINES: dict[str, Callable[[Family, Views, float, int], Tensors]] = {"vmap": vmap_sum, "loop": loop_sum}


def _micro_batches(views: Views, size: int) -> Iterator[Tensors]:
    flat = views.tensors()
    count = len(views.uniform)
    for start in range(0, count, size):
        yield {name: tensor[start : start + size] for name, tensor in flat.items()}
