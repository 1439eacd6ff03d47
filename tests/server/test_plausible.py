"""The bound on a difference's length: never passed by real training, and close to what can be reached."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from polyclinic.client.residual import unpack_residual
from polyclinic.common.data.cache import Cached
from polyclinic.common.generators.base import Tensors, trainable_state
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.plain_engine import PlainEngine
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.study import Study
from polyclinic.common.training import PrivateEngine, train
from polyclinic.common.wire import pack_reply
from polyclinic.common.wire_reading import unpack_reply
from polyclinic.server.plausible import adamw_steps, longest_difference
from tests.common.test_wire import FACTS

BETAS = [(0.9, 0.999), (0.0, 0.0), (0.0, 0.999), (0.9, 0.9), (0.99, 0.9), (0.9, 0.1)]


def norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def adam_step(betas: tuple[float, float], gradients: torch.Tensor) -> float:
    """Size of the last step of torch's own AdamW, in learning rates, after these gradients."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=betas, eps=1e-300, weight_decay=0.0)
    before = 0.0
    for gradient in gradients:
        before = float(parameter.detach())
        parameter.grad = gradient.reshape(1).double()
        optimizer.step()
    return abs(float(parameter.detach()) - before)


@pytest.mark.parametrize("betas", BETAS)
def test_no_gradients_move_adam_further_and_the_worst_move_it_so_far(betas: tuple[float, float]) -> None:
    first, second = betas
    generator = torch.Generator().manual_seed(0)
    for t, bound in enumerate(itertools.islice(adamw_steps(betas, 12), 12), start=1):
        for _ in range(10):
            gradients = torch.randn(t, generator=generator) * torch.randn(t, generator=generator).exp() ** 3
            assert adam_step(betas, gradients) <= bound * (1 + 1e-9)
        if second:  # where Cauchy-Schwarz is an equality
            worst = torch.tensor([(first / second) ** (t - i) if i < t else 1.0 for i in range(1, t + 1)])
            assert adam_step(betas, worst.double()) == pytest.approx(bound, rel=1e-6)


def test_a_second_average_without_memory_bounds_nothing() -> None:
    assert list(adamw_steps((0.9, 0.0), 3)) == [1.0, math.inf, math.inf]
    assert adam_step((0.9, 0.0), torch.tensor([1.0, 1e-9])) > 1e7


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("number", [1, 2])
def test_real_training_stays_below(
    make_study: Any, family: Msdm, cached: Cached, private: bool, decay: float, number: int
) -> None:
    study: Study = make_study(
        privacy={"enabled": private},
        training={"learning_rate": 0.01, "weight_decay": decay, "schedule": "cosine", "steps_per_round": 3},
    )
    before = {name: tensor.clone() for name, tensor in trainable_state(family.module).items()}
    bound = longest_difference(study, number, before)
    random = KeyedRandom.for_test("k", "site", number)
    if private:
        engine: Any = PrivateEngine(family, cached, study, random, sigma=1.0, divisor=6.0, device="cpu")
    else:
        engine = PlainEngine(family, cached, study, random, device="cpu")
    train(engine.step, (number - 1) * 3, 3, "round")
    moved = {name: tensor - before[name] for name, tensor in trainable_state(family.module).items()}
    assert norm(moved) <= bound
    # Not a bound that lets anything through: the first steps of Adam are nearly as long as can be.
    assert norm(moved) > bound / 4
    assert norm({name: 1000 * tensor for name, tensor in moved.items()}) > bound


def test_decay_of_large_weights_and_rounding_are_counted(make_study: Any) -> None:
    study: Study = make_study(training={"learning_rate": 1e-7, "weight_decay": 100.0, "steps_per_round": 50})
    parameter = torch.nn.Parameter(1e4 * torch.randn(1000))
    start = parameter.detach().clone()
    bound = longest_difference(study, 1, {"w": start})
    optimizer = torch.optim.AdamW([parameter], lr=1e-7, weight_decay=100.0)
    for _ in range(50):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
    assert norm({"w": parameter.detach() - start}) <= bound
    quiet: Study = make_study(training={"learning_rate": 1e-12, "steps_per_round": 50})
    assert longest_difference(quiet, 1, {"w": start}) > norm({"w": start}) * 50 * 2**-24


@pytest.mark.parametrize("transport", ["bf16", "fp32", "int8"])
def test_what_the_transport_adds_is_counted(make_study: Any, transport: Any) -> None:
    """The longest difference there is, written and with the largest residual, passes."""
    study: Study = make_study(federation={"transport": transport}, training={"steps_per_round": 1})
    like = {"w": torch.zeros(40, 33), "b": torch.zeros(7)}
    rate = study.learning_rate(0)
    residual: Tensors | None = None
    for number in range(1, 4):
        difference = {name: torch.full_like(tensor, rate) for name, tensor in like.items()}
        difference["w"][:, ::2] *= 1 - 1.5 / 127  # half-way between two steps
        stored = pack_reply(difference, FACTS, transport=transport, residual=residual)
        residual = unpack_residual(stored)
        assert norm(unpack_reply(stored).difference) <= longest_difference(study, min(number, 3), like)
