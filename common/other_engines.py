"""Other ways to the same clipped sum, to compare the one-backward engine with.

`loop` takes one patient at a time by plain autograd and is the oracle. `vmap` is torch.func's gradient
mapped over patients. `hooks` and `ghost` are Opacus's, which are silently
wrong on some layouts (`tensor_utils.unfold2d` reads a convolution's input as if it were contiguous) and
for K > 1 views (`ghost` clips every row on its own): there they refuse. The sum, the norm and the factors
are `clipping`'s, and the start-up self-test holds for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyclinic.common.generators.base import Family, Tensors, Views, trainable
from polyclinic.common.privacy.clipping import (
    accumulate,
    add,
    clip_factors,
    compute_dtype,
    micro_batches,
    patient_losses,
    tau,
    zeros,
)
from polyclinic.common.refusals import Refusal


def loop_sum(family: Family, views: Views, clip: float, micro_batch: int = 1) -> Tensors:
    """Clipped sum over patients, one at a time by plain autograd: the oracle."""
    parameters = trainable(family.module)
    sums = zeros(family)
    margin = tau("loop", compute_dtype(family))
    for part in micro_batches(views, 1):
        gradients = torch.autograd.grad(patient_losses(family, part).sum(), list(parameters.values()))
        found = dict(zip(parameters, (g[None] for g in gradients), strict=True))
        accumulate(sums, found, clip, margin=margin)
    return sums


class _PatientLoss(nn.Module):
    """Mean loss of one patient's views as a module, so that its parameters can be swapped."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.module = family.module
        self._family = [family]  # in a list: not a submodule, not walked

    def forward(self, views: Tensors) -> Tensor:
        one = {name: tensor[None] for name, tensor in views.items()}
        return patient_losses(self._family[0], one).sum()


def vmap_sum(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    """Clipped sum over patients, several at once through torch.func.

    Args:
        family: The generator.
        views: Tensors `[B, K, ...]`; B may be 0.
        clip: C, bound on a patient's gradient norm.
        micro_batch: Patients whose gradients are in memory at once.

    Returns:
        Parameter name to clipped sum, finite always.
    """
    loss = _PatientLoss(family)
    trained = trainable(family.module)
    # torch.func wants the module's own names, which for adapters are not those of states.
    own = {id(p): name for name, p in family.module.named_parameters()}
    parameters = {f"module.{own[id(p)]}": p.detach() for p in trained.values()}
    one = grad(lambda weights, patient: functional_call(loss, weights, (patient,)))
    many = vmap(one, in_dims=(None, 0))
    sums = zeros(family)
    margin = tau("vmap", compute_dtype(family))
    for part in micro_batches(views, micro_batch):
        # The fused attention kernels have no batching rule; the plain formula has.
        with sdpa_kernel(SDPBackend.MATH):
            gradients = many(parameters, part)
        found = {name: gradients[f"module.{own[id(p)]}"] for name, p in trained.items()}
        accumulate(sums, found, clip, margin=margin)
    return sums


def hooks_sum(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    """Clipped sum with Opacus's hooks; arguments as `vmap_sum`.

    Raises:
        Refusal: `self-test-failed`, where Opacus is known to be wrong.
    """
    sums = zeros(family)
    margin = tau("hooks", compute_dtype(family))
    for part in micro_batches(views, micro_batch):
        fold = part["uniform"].shape
        with _attached(family, "hooks", GradSampleHooks):
            patient_losses(family, part).sum().backward()
            # Rows are views, patients slowest; a row's loss already carries 1/K.
            found = {
                name: p.grad_sample.unflatten(0, fold).sum(1)  # type: ignore[attr-defined]
                for name, p in trainable(family.module).items()
            }
        accumulate(sums, found, clip, margin=margin)
    return sums


def ghost_sum(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    """Clipped sum with Opacus's ghost clipping, in two backward passes; arguments as `vmap_sum`.

    Raises:
        Refusal: `self-test-failed`, where Opacus is known to be wrong, and for K > 1 views.
    """
    sums = zeros(family)
    margin = tau("ghost", compute_dtype(family))
    for part in micro_batches(views, micro_batch):
        if part["uniform"].shape[1] != 1:
            raise _refusal("ghost", f"would clip each of a patient's {part['uniform'].shape[1]} views")
        with _attached(family, "ghost", GradSampleHooksFastGradientClipping) as opacus:
            losses = patient_losses(family, part)
            losses.sum().backward(retain_graph=True)
            factors = clip_factors(opacus.get_norm_sample().square(), clip, margin)
            opacus.disable_hooks()
            for parameter in family.module.parameters():
                parameter.grad = None
            sound = factors > 0
            if not bool(sound.all()):
                # Their graph holds what is not finite, and 0 x inf is NaN: the others anew, without them.
                part = {name: tensor[sound] for name, tensor in part.items()}
                losses, factors = patient_losses(family, part), factors[sound]
            if len(factors):
                (losses * factors).sum().backward()
                for name, parameter in trainable(family.module).items():
                    assert parameter.grad is not None
                    add(sums, name, parameter.grad)
    return sums


@contextmanager
def _attached(family: Family, engine: str, kind: type[Any]) -> Iterator[Any]:
    """Attach Opacus to the generator without wrapping it, and leave no trace of it afterwards."""
    module = family.module
    modules = dict(module.named_modules())
    if any(getattr(child, "gradient_checkpointing", False) for child in modules.values()):
        raise _refusal(engine, "fails under gradient checkpointing")
    if not module.training:
        raise _refusal(engine, "records nothing in evaluation mode")
    for path, child in modules.items():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise _refusal(engine, f"cannot clip {path}: it mixes patients")
    with ExitStack() as stack:
        for path, child in modules.items():
            if isinstance(child, nn.Conv2d) and child.weight.requires_grad:
                stack.enter_context(child.register_forward_pre_hook(_contiguous_only(engine, path)))
        opacus = kind(module, loss_reduction="sum", strict=False)
        stack.callback(_detach, opacus, module)
        with torch.enable_grad():
            yield opacus


def _detach(opacus: Any, module: nn.Module) -> None:
    opacus.cleanup()
    for child in module.modules():
        for name in ("activations", "max_batch_len"):
            if hasattr(child, name):
                delattr(child, name)
    for parameter in module.parameters():
        parameter.grad = None


def _contiguous_only(engine: str, path: str) -> Any:
    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs[0].is_contiguous():
            raise _refusal(engine, f"is wrong for {path}, whose input is permuted or channels_last")

    return check


def _refusal(engine: str, reason: str) -> Refusal:
    return Refusal("self-test-failed", f'Opacus\'s "{engine}" {reason}; write privacy.engine = "bookkeeping"')
