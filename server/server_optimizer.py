"""What becomes of the sites' combined difference: the server's optimizer, its memory on disk.

FedAvgM (Hsu et al. 2019, 1909.06335) and FedAdam (Reddi et al. 2021, 2003.00295) take the combined
difference for a gradient's negative. Flower's strategies of these names take the same steps, but hold
their moments in memory, where a restart loses them. (Flower counts FedAdam's bias correction from 2; we
count from 1, as Kingma & Ba do.)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.common.generators.base import Tensors
from polyclinic.common.settings import FederationSettings
from polyclinic.server.spool import Spooled, open_tensors

MOMENTS = "moments.safetensors"
_KINDS = {"mean": (), "fedavgm": ("momentum",), "fedadam": ("momentum", "steps", "variance")}


def moments_like(state: Tensors, settings: FederationSettings) -> Tensors:
    """Names and shapes of what the optimizer remembers; empty where it remembers nothing."""
    steps = torch.zeros(1)
    return {
        f"{name}/{kind}": steps if kind == "steps" else tensor
        for name, tensor in state.items()
        for kind in _KINDS[settings.server_optimizer]
    }


def in_order(names: Iterable[str]) -> list[str]:
    """Names of tensors in the order in which their moments are written."""
    return sorted(names, key=lambda name: f"{name}/")


class Moments(NamedTuple):
    """What the optimizer remembered before a round, and where it writes what it remembers after it."""

    before: Spooled | None = None
    after: Path | None = None


def moments_of(last: Path, spool: Path, settings: FederationSettings) -> Moments:
    """Find the moments of a round.

    Args:
        last: Folder of the checkpoint before it.
        spool: Folder of the round's spool.
        settings: Names the optimizer.
    """
    if not _KINDS[settings.server_optimizer]:
        return Moments()
    path = last / MOMENTS
    return Moments(open_tensors(path) if path.exists() else None, spool / "moments")


def remembered(name: str, tensor: Tensor, before: Spooled | None, settings: FederationSettings) -> Tensors:
    """Read what is remembered of one tensor, flat, by kind; zeros at the first step."""
    sizes = {kind: 1 if kind == "steps" else tensor.numel() for kind in _KINDS[settings.server_optimizer]}
    if before is None:
        return {kind: torch.zeros(size) for kind, size in sizes.items()}
    return {kind: before.read(f"{name}/{kind}", 0, size) for kind, size in sizes.items()}


def server_step(step: Tensor, memory: Tensors, settings: FederationSettings) -> Tensor:
    """Turn a combined difference into the move of the state, and bring the memory up to date in place.

    Args:
        step: `[N]`, the combined difference of a tensor or a piece of it; may be overwritten.
        memory: Its moments by kind, `[N]` each; `steps`, `[1]`, counts the steps with this one.
        settings: Optimizer, learning rate and betas.

    Returns:
        `[N]`, to be added to the state.
    """
    rate, (first, second) = settings.server_learning_rate, settings.server_betas
    if settings.server_optimizer == "mean":
        return step.mul_(rate)
    if settings.server_optimizer == "fedavgm":
        return memory["momentum"].mul_(first).add_(step) * rate
    count = float(memory["steps"])
    momentum = memory["momentum"].mul_(first).add_(step, alpha=1 - first)
    variance = memory["variance"].mul_(second).addcmul_(step, step, value=1 - second)
    rate *= (1 - second**count) ** 0.5 / (1 - first**count)
    return momentum * rate / (variance.sqrt() + settings.server_tau)
