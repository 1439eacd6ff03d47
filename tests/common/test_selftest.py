"""The start-up self-test passes on a sound engine and refuses each broken one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyclinic.common import selftest
from polyclinic.common.generators.base import Family, Tensors, Views, trainable_state
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.other_engines import vmap_sum
from polyclinic.common.privacy.clipping import ENGINES
from polyclinic.common.refusals import Refusal


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "loop"])
def test_a_sound_engine_passes_and_the_weights_are_put_back(family: Msdm, engine: str) -> None:
    before = trainable_state(family.module)
    selftest.self_test(family, engine)
    after = trainable_state(family.module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def unclipped(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    return vmap_sum(family, views, 1e9, micro_batch)


def clipped_by_view(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    """What ghost clipping does to K views: each is clipped on its own, so a patient counts K times."""
    flat = {name: t.flatten(0, 1).unsqueeze(1) for name, t in views.tensors().items()}
    return vmap_sum(family, Views.of(flat), clip, micro_batch)


def deaf_to_one_tensor(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    sums = vmap_sum(family, views, clip, micro_batch)
    sums["conv_in.weight"].zero_()
    return sums


def shuffled(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    """The right norms and the wrong gradient: no harm to privacy, and nothing is learnt."""
    sums = vmap_sum(family, views, clip, micro_batch)
    sums["conv_in.weight"] = sums["conv_in.weight"].flip(0)
    return sums


def a_little_wrong(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    """What a parameter that is also used outside its module would look like: a part is missing."""
    sums = vmap_sum(family, views, clip, micro_batch)
    sums["conv_norm_out.bias"] *= 0.9
    return sums


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (unclipped, "moved the sum"),
        (clipped_by_view, "moved the sum"),
        (deaf_to_one_tensor, "conv_in.weight"),
        (shuffled, "conv_in.weight is not"),
        (a_little_wrong, "conv_norm_out.bias is not"),
    ],
)
def test_a_broken_engine_is_refused(
    family: Msdm, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Tensors], says: str
) -> None:
    before = trainable_state(family.module)
    monkeypatch.setitem(ENGINES, "vmap", broken)
    with pytest.raises(Refusal, match=r"self-test-failed") as caught:
        selftest.self_test(family, "vmap")
    assert says in str(caught.value)
    after = trainable_state(family.module)
    assert all(torch.equal(before[name], after[name]) for name in before)
