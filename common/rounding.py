"""How a tensor is written in fewer bits: bf16, or int8 with a scale a row and what the rounding lost.

A difference has its noise when it comes here, and a state is public: nothing private is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyclinic.common.generators.base import Tensors
from polyclinic.common.settings import Transport

# Parts of a reply, and what the names in them begin with; no parameter's name has the slash that follows.
SCALE, RESIDUAL = "scale", "residual"
_LARGEST = torch.finfo(torch.bfloat16).max  # fp32 goes a little further, to what bf16 calls infinity


def rows_of(tensor: Tensor) -> int:
    """Scales a tensor has: one a slice of its leading dimension, one in all for a vector."""
    return len(tensor) if tensor.dim() > 1 else 1


def widen(steps: Tensor, scale: Tensor) -> Tensor:
    """Multiply 8-bit steps by their rows' scales, in fp32."""
    return (steps.reshape(len(scale), -1).float() * scale[:, None]).reshape(steps.shape)


def encode(name: str, tensor: Tensor, transport: Transport, residual: Tensor | None = None) -> Tensors:
    """Round a tensor; in int8, with its scales and with what the rounding lost.

    What is finite stays finite; what is not becomes a scale or a number that the other side refuses.
    """
    if transport == "fp32":
        return {name: tensor}
    wanted = (tensor if residual is None else tensor + residual).clamp(-_LARGEST, _LARGEST)
    if transport == "bf16":
        return {name: wanted.bfloat16()}
    rows = wanted.reshape(rows_of(wanted), -1)
    scale = rows.abs().amax(dim=1) / 127
    # A row of zeros divides by zero: no step is its step.
    rounded = (rows / scale[:, None]).nan_to_num(0.0).round().clamp(-127, 127)
    steps = rounded.to(torch.int8).reshape(wanted.shape)
    return {name: steps, f"{SCALE}/{name}": scale, f"{RESIDUAL}/{name}": wanted - widen(steps, scale)}
