"""Per-patient clipping: the bounded sum that noise is added to.

A patient's gradient is that of the mean loss over its K views; all trainable parameters share one norm.
Every engine gives the same sum. `bookkeeping` takes one ordinary backward pass; the others
are there to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

import torch
from torch import Tensor

from polyclinic.common.generators.base import Family, Tensors, Views, trainable

# Worst relative excess of a released contribution over C, in fp32; every contribution is scaled by
# 1 / (1 + tau), so that the sensitivity is at most C (PRIVACY.md, rule 3).
TAU = 1e-4
# The same where autocast lowers the model's own arithmetic. Both are tested in tests/common/test_engines.py.
_LOWERED = {("bookkeeping", torch.bfloat16): 1e-2, ("loop", torch.bfloat16): 1e-2}

Clipper = Callable[[Family, Views, float, int], Tensors]


def tau(engine: str, dtype: torch.dtype = torch.float32) -> float:
    """Return the tested bound on an engine's relative error.

    Args:
        engine: Key of `ENGINES`.
        dtype: What the model computes in: fp32, or what autocast lowers it to.

    Raises:
        ValueError: Nobody has tested this engine in this type.
    """
    if dtype == torch.float32 and engine in ENGINES:
        return TAU
    if (engine, dtype) not in _LOWERED:
        raise ValueError(f"no tested error bound for engine {engine} in {dtype}")
    return _LOWERED[engine, dtype]


def compute_dtype(family: Family) -> torch.dtype:
    """Return what the generator computes in just now."""
    device = next(family.module.parameters()).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else family.dtype


def clip_factors(squared_norms: Tensor, clip: float, margin: float = TAU) -> Tensor:
    """Factor on each patient's gradient.

    Args:
        squared_norms: `[B]`, possibly not finite.
        clip: C.
        margin: tau.

    Returns:
        `[B]`: min(1, C / norm) / (1 + tau), and exactly 0 where the norm is not finite (rule 2).
    """
    norms = squared_norms.sqrt()
    factors = (clip / norms.clamp(min=1e-12)).clamp(max=1.0) / (1 + margin)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def accumulate(
    sums: Tensors, gradients: Tensors, clip: float, *, margin: float = TAU, squared: Tensor | None = None
) -> Tensor:
    """Add a micro-batch's clipped gradients to the running sums.

    Args:
        sums: Running sums by name, changed in place; absent ones are zero.
        gradients: Per-patient gradients `[B, ...]` by name.
        clip: C.
        margin: tau.
        squared: `[B]`, squared norms of the part of each gradient that the caller adds by itself.

    Returns:
        `[B]`: the factors, exactly 0 for a patient who contributes nothing.
    """
    parts = [] if squared is None else [squared]
    device = (*parts, *gradients.values())[0].device.type
    with torch.autocast(device, enabled=False):  # it would lower the very product that is released
        return _accumulate(sums, gradients, clip, margin, parts)


def _accumulate(sums: Tensors, gradients: Tensors, clip: float, margin: float, parts: list[Tensor]) -> Tensor:
    for gradient in gradients.values():
        # In two stages, because the fast norm adds up one by one: a million squares would lose digits.
        inner = torch.linalg.vector_norm(gradient.flatten(2), dim=-1) if gradient.ndim > 2 else gradient
        parts.append(inner.flatten(1).square().sum(1))
    factors = clip_factors(torch.stack(parts).sum(0), clip, margin)
    broken = factors == 0
    any_broken = bool(broken.any())
    for name, gradient in gradients.items():
        flat = gradient.flatten(1)
        if any_broken:
            # Replaced before the product: 0 x inf is NaN.
            flat = flat.masked_fill(broken[:, None], 0.0)
        add(sums, name, (factors @ flat).view(gradient.shape[1:]))
    return factors


def add(sums: Tensors, name: str, part: Tensor) -> None:
    """Add to a sum; a sum that is not there yet is zero."""
    sums[name] = sums[name].add_(part) if name in sums else part


def zeros(family: Family) -> Tensors:
    """Return the sum over nobody: zeros by parameter name."""
    return {name: torch.zeros_like(p, requires_grad=False) for name, p in trainable(family.module).items()}


def micro_batches(views: Views, size: int) -> Iterator[Tensors]:
    """Cut views `[B, K, ...]` into flat dictionaries of at most `size` patients each."""
    flat = views.tensors()
    for start in range(0, len(views.uniform), size):
        yield {name: tensor[start : start + size] for name, tensor in flat.items()}


def patient_losses(family: Family, part: Tensors) -> Tensor:
    """Mean loss over each patient's views, `[B]`, from flat views `[B, K, ...]`.

    Raises:
        ValueError: The family does not give one loss a view.
    """
    patients, views = part["uniform"].shape
    losses = family.view_losses(Views.of({name: tensor.flatten(0, 1) for name, tensor in part.items()}))
    if losses.shape != (patients * views,):
        raise ValueError(f"view losses have shape {tuple(losses.shape)}, not [views]")
    return losses.view(patients, views).mean(1)


def _of(module: str, function: str) -> Clipper:
    """Import an engine when it is first used: bookkeeping builds on this module."""

    def run(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
        found: Clipper = getattr(import_module(module), function)
        return found(family, views, clip, micro_batch)

    return run


ENGINES: dict[str, Clipper] = {
    "bookkeeping": _of("polyclinic.common.privacy.bookkeeping", "bookkeeping_sum"),
    "loop": _of("polyclinic.common.other_engines", "loop_sum"),
    "vmap": _of("polyclinic.common.other_engines", "vmap_sum"),
    "hooks": _of("polyclinic.common.other_engines", "hooks_sum"),
    "ghost": _of("polyclinic.common.other_engines", "ghost_sum"),
}
