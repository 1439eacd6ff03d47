"""Start-up self-test of a private run, on synthetic inputs of the cached shapes (PRIVACY.md, rule 6).

With sigma 0 and weights moved at random: removing any patient moves the clipped sum by at most C, and
every trainable tensor receives a gradient. What fails here refuses to train.
"""

from __future__ import annotations

import torch

from polyclinic.common.generators.base import Family, Views, load_trainable_state, trainable_state
from polyclinic.common.privacy.clipping import ENGINES
from polyclinic.common.refusals import Refusal

PATIENTS, VIEWS = 3, 2


def self_test(family: Family, engine: str) -> None:
    """Test the clipping engine on the real network, on its own device; weights are put back.

    Raises:
        Refusal: `self-test-failed` with the first thing that is wrong.
    """
    start = trainable_state(family.module)
    generator = torch.Generator().manual_seed(0)  # public: no patient is in it

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    # Moved, because a network whose output layer starts at zero gives most tensors no gradient.
    load_trainable_state(family.module, {name: t + 0.02 * noise(t) for name, t in start.items()})
    try:
        flat = family.synthetic_views(PATIENTS * VIEWS).tensors()
        flat = {name: t if name == "uniform" else t * noise(t) for name, t in flat.items()}
        flat["uniform"] = (
            flat["uniform"] + torch.rand(PATIENTS * VIEWS, generator=generator).to(flat["uniform"])
        ) % 1
        flat = {name: t.unflatten(0, (PATIENTS, VIEWS)) for name, t in flat.items()}
        _remove_one(family, flat, engine)
    finally:
        load_trainable_state(family.module, start)


def _remove_one(family: Family, flat: dict[str, torch.Tensor], engine: str) -> None:
    clipped_sum = ENGINES[engine]
    # C so large that nobody is clipped shows every tensor's gradient; its norm gives a C that clips all.
    free = clipped_sum(family, Views.of(flat), 1e9, PATIENTS)
    silent = [name for name, t in free.items() if not bool(t.abs().sum() > 0)]
    if silent:
        raise Refusal("self-test-failed", f"{silent[0]} receives no gradient")
    clip = 0.1 * float(torch.stack([t.square().sum() for t in free.values()]).sum().sqrt()) / PATIENTS
    whole = clipped_sum(family, Views.of(flat), clip, PATIENTS)
    for out in range(PATIENTS):
        rest = [i for i in range(PATIENTS) if i != out]
        less = clipped_sum(family, Views.of({name: t[rest] for name, t in flat.items()}), clip, PATIENTS)
        moved = float(torch.stack([(whole[n] - less[n]).double().square().sum() for n in whole]).sum().sqrt())
        if not 0 < moved <= clip:
            raise Refusal("self-test-failed", f"one patient moved the sum by {moved / clip:.4f} C")
