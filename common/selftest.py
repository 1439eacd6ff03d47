"""Start-up self-test of a private run, on synthetic inputs of the cached shapes (PRIVACY.md, rule 6).

With sigma 0 and weights moved at random: removing any patient moves the clipped sum by at most C, and
every trainable tensor receives a gradient, the one that the one-patient-at-a-time oracle finds. Adapters are
also moved one by one: each must move the loss, or it would train and never be used. What fails here refuses
to train.
"""

from __future__ import annotations

import torch
from torch import nn

from polyclinic.common.generators.base import (
    Family,
    Tensors,
    Views,
    load_trainable_state,
    trainable,
    trainable_state,
)
from polyclinic.common.other_engines import loop_sum
from polyclinic.common.privacy.clipping import ENGINES
from polyclinic.common.refusals import Refusal

# Relative distance of a tensor from the oracle's: far above rounding, also a GPU's; far below any mistake.
ORACLE_DISTANCE = 1e-2


def self_test(family: Family, engine: str, views: int = 2) -> None:
    """Test the clipping engine on the real network, on its own device; weights are put back.

    Args:
        family: The generator.
        engine: Key of `ENGINES`.
        views: K of the study.

    Raises:
        Refusal: `self-test-failed` with the first thing that is wrong.
    """
    patients, views = 3, min(views, 2)
    start = trainable_state(family.module)
    generator = torch.Generator().manual_seed(0)  # public: no patient is in it

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    # Moved, because a network whose output layer starts at zero gives most tensors no gradient.
    load_trainable_state(family.module, {name: t + 0.02 * noise(t) for name, t in start.items()})
    try:
        flat = family.synthetic_views(patients * views).tensors()
        flat = {name: t if name == "uniform" else t * noise(t) for name, t in flat.items()}
        flat["uniform"] = (
            flat["uniform"] + torch.rand(patients * views, generator=generator).to(flat["uniform"])
        ) % 1
        _check(family, {name: t.unflatten(0, (patients, views)) for name, t in flat.items()}, engine)
        view = Views.of({name: t[:1] for name, t in flat.items()})
        adapters = {n: p for n, p in trainable(family.module).items() if ".lora_" in n}
        _check_moves(family, view, adapters, {name: noise(p) for name, p in adapters.items()})
    finally:
        load_trainable_state(family.module, start)


def _check(family: Family, flat: Tensors, engine: str) -> None:
    clipped_sum, patients = ENGINES[engine], len(flat["uniform"])
    # C so large that nobody is clipped shows every tensor's gradient; its norm gives a C that clips all.
    free = clipped_sum(family, Views.of(flat), 1e9, patients)
    silent = [name for name, t in free.items() if not bool(t.abs().sum() > 0)]
    if silent:
        raise Refusal("self-test-failed", f"{silent[0]} receives no gradient")
    clip = 0.1 * _norm(free) / patients
    whole = clipped_sum(family, Views.of(flat), clip, patients)
    for out in range(patients):
        rest = [i for i in range(patients) if i != out]
        less = clipped_sum(family, Views.of({name: t[rest] for name, t in flat.items()}), clip, patients)
        moved = _norm({name: whole[name] - less[name] for name in whole})
        if not 0 < moved <= clip:
            raise Refusal("self-test-failed", f"one patient moved the sum by {moved / clip:.4f} C")
    oracle = loop_sum(family, Views.of(flat), clip)
    # Some gradients are zero but for rounding, such as those of biases before a softmax.
    least = 1e-2 * ORACLE_DISTANCE * _norm(oracle)
    for name, wanted in oracle.items():
        if not _norm({name: whole[name] - wanted}) <= ORACLE_DISTANCE * _norm({name: wanted}) + least:
            raise Refusal("self-test-failed", f"{name} is not what one patient at a time gives")


@torch.no_grad()
def _check_moves(family: Family, view: Views, adapters: dict[str, nn.Parameter], by: Tensors) -> None:
    before = family.view_losses(view)
    for name, parameter in adapters.items():
        kept = parameter.clone()
        parameter.add_(by[name])
        if torch.equal(before, family.view_losses(view)):
            raise Refusal("self-test-failed", f"{name} does not move the output")
        parameter.copy_(kept)


def _norm(sums: Tensors) -> float:
    return float(torch.stack([t.double().square().sum() for t in sums.values()]).sum().sqrt())
