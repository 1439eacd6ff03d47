"""LoRA factors (Hu et al. 2021, 2106.09685) by name: what a round trains, and sites of a smaller rank.

A layer's update is `scale * B @ A`, with A `[r, in]` (a convolution's: `[r, in, k, k]`) and B `[out, r]`
(`[out, r, 1, 1]`). `scale` is one number for all sites, whatever their rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from polyclinic.common.generators.base import Tensors, named
from polyclinic.common.refusals import Refusal
from polyclinic.common.settings import LoraRule

A, B = ".lora_A.weight", ".lora_B.weight"

# What the study's `federation.lora_aggregation` names:
# freeze-a: A is drawn once and shared, only B is trained (FFA-LoRA, Sun et al. 2024, 2403.12313).
# factors: A and B are trained and averaged each on its own, which misses the mean of their products.
# stack: A and B are trained; the products are averaged exactly (FLoRA, Wang et al. 2024, 2409.05976).
# alternate: B in odd rounds, A in even ones (RoLoRA, Chen et al. 2025, 2502.01755).


def layers(names: Iterable[str]) -> list[str]:
    """Names of the layers that have both factors, sorted."""
    found = set(names)
    return sorted(n.removesuffix(A) for n in found if n.endswith(A) and n.removesuffix(A) + B in found)


def trains(name: str, rule: LoraRule, round_number: int) -> bool:
    """Whether a round trains this tensor; what is no factor always is."""
    if rule == "freeze-a":
        return not name.endswith(A)
    if rule == "alternate":
        return not name.endswith(A if round_number % 2 else B)
    return True


def trained(state: Tensors, rule: LoraRule, round_number: int) -> Tensors:
    """The part of a state that a round trains, and of which replies hold the difference."""
    return {name: tensor for name, tensor in state.items() if trains(name, rule, round_number)}


def freeze(module: nn.Module, rule: LoraRule, round_number: int) -> None:
    """Leave only what a round trains trainable."""
    for name, parameter in named(module).items():
        if not trains(name, rule, round_number):
            parameter.requires_grad_(False)


def narrow(state: Tensors, rank: int | None) -> Tensors:
    """Cut factors to their first `rank` components: a site of a smaller rank trains these; None: all."""
    if rank is None:
        return state
    return {name: _part(name, tensor, rank).contiguous() for name, tensor in state.items()}


def pad(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Give a difference the components that its site does not hold: they did not move.

    Raises:
        Refusal: `bad-state` where it is not `like`'s shape with a smaller rank.
    """
    if tensor.shape == like.shape:
        return tensor
    axis = _axis(name)
    if axis is None or tensor.dim() != like.dim() or tensor.shape[axis] > like.shape[axis]:
        raise Refusal("bad-state", f"{name} has shape {tuple(tensor.shape)}")
    out = torch.zeros(like.shape, dtype=tensor.dtype)
    place = _part(name, out, tensor.shape[axis])
    if place.shape != tensor.shape:
        raise Refusal("bad-state", f"{name} has shape {tuple(tensor.shape)}")
    place.copy_(tensor)
    return out


def rank_of(state: Tensors) -> int:
    """Rank of a state's factors; 0 where it has none."""
    return max((t.shape[axis] for n, t in state.items() if (axis := _axis(n)) is not None), default=0)


def _axis(name: str) -> int | None:
    return 0 if name.endswith(A) else 1 if name.endswith(B) else None


def _part(name: str, tensor: Tensor, rank: int) -> Tensor:
    axis = _axis(name)
    return tensor if axis is None else tensor.narrow(axis, 0, min(rank, tensor.shape[axis]))
