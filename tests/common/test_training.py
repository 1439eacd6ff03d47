"""A step by hand: sample, clipped sum, noise, public divisor, AdamW; and what an empty sample does."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyclinic.common.data.cache import Cached
from polyclinic.common.device import pick_device
from polyclinic.common.generators.base import Tensors, Views, trainable, trainable_state
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.other_engines import loop_sum
from polyclinic.common.plain_engine import PlainEngine
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.views import draw_views, poisson_sample
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study
from polyclinic.common.training import PatientDPOptimizer, PrivateEngine, train

RANDOM = KeyedRandom(b"t" * 32)


def private(family: Msdm, data: Cached, study: Study, *, sigma: float, divisor: float = 6.0) -> PrivateEngine:
    return PrivateEngine(family, data, study, RANDOM, sigma=sigma, divisor=divisor, device="cpu")


def views_of(data: Cached, study: Study, step: int) -> Views:
    chosen = poisson_sample(RANDOM, data.patients, step, study.privacy.sampling_rate)
    return draw_views(
        RANDOM,
        data,
        chosen,
        step=step,
        views=study.privacy.views,
        normal_shape=(2, 8, 4, 4),
        prompt_dropout=study.generator.prompt_dropout,
    )


def adamw(weights: Tensors, gradients: list[Tensors], rates: list[float], decay: float = 0.0) -> Tensors:
    """AdamW (Loshchilov & Hutter 2019) in float64."""
    out = {}
    for name, start in weights.items():
        w = start.double()
        m = v = torch.zeros_like(w)
        for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
            g = gradient[name].double()
            w = w * (1 - rate * decay)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        out[name] = w
    return out


def farthest(one: Tensors, other: Tensors) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def test_empty_sample_is_a_step_of_pure_noise(family: Msdm, cached: Cached, make_study: Any) -> None:
    study = make_study(privacy={"sampling_rate": 1e-9})
    before = trainable_state(family.module)
    private(family, cached, study, sigma=0.0).step(0)
    after = trainable_state(family.module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    private(family, cached, study, sigma=1.0).step(0)
    after = trainable_state(family.module)
    assert all(bool((before[name] != after[name]).any()) for name in before)
    noise = {
        name: RANDOM.stream("noise", 0, name).protective_normal(tensor.shape, 1.0) / 6
        for name, tensor in before.items()
    }
    assert farthest(after, adamw(before, [noise], [1e-3])) < 1e-6


def test_steps_equal_adamw_by_hand_on_clipped_sum_plus_noise(
    family: Msdm, cached: Cached, make_study: Any
) -> None:
    clip, sigma, divisor = 0.2, 0.8, 5.5
    study = make_study(
        privacy={"clip": clip}, training={"schedule": "cosine", "weight_decay": 0.1, "learning_rate": 2e-3}
    )
    engine = private(family, cached, study, sigma=sigma, divisor=divisor)
    before, gradients = trainable_state(family.module), []
    for step in (3, 4):  # a later round: the learning rate is that of the global step
        views = views_of(cached, study, step)
        assert len(views.uniform) > 0
        sums = loop_sum(family, views, clip)
        gradients.append(
            {
                name: (
                    sums[name].double()
                    + RANDOM.stream("noise", step, name).protective_normal(sums[name].shape, sigma * clip)
                )
                / divisor
                for name in sums
            }
        )
        engine.step(step)
    rates = [2e-3 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in (3, 4)]
    # AdamW turns the rounding of a near-zero gradient into a share of the rate, so the bound is a share too.
    assert farthest(trainable_state(family.module), adamw(before, gradients, rates, 0.1)) < 1e-2 * max(rates)
    wrong = adamw(before, gradients, [2e-3, 2e-3], 0.1)
    assert farthest(trainable_state(family.module), wrong) > 0.3 * max(rates)


def test_fedprox_pulls_by_what_was_moved_whatever_was_clipped(
    family: Msdm, cached: Cached, make_study: Any
) -> None:
    """Steps of pure noise with mu against the same noise by hand: g_t + mu (w_t - w_0), never clipped."""
    mu, settings = 0.4, {"privacy": {"sampling_rate": 1e-9, "clip": 1e-3}}
    study = make_study(**settings, training={"learning_rate": 1.0, "fedprox": mu})
    engine = private(family, cached, study, sigma=1.0)
    as_sgd(engine)
    start = trainable_state(family.module)
    with torch.no_grad():
        for parameter in trainable(family.module).values():
            parameter.add_(1.0)  # far from the start: the pull is far above the clip
    want = {name: tensor.double() + 1.0 for name, tensor in start.items()}
    for step in (0, 1):
        engine.step(step)
        for name, weight in want.items():
            noise = RANDOM.stream("noise", step, name).protective_normal(weight.shape, 1e-3) / 6
            want[name] = weight - noise - mu * (weight - start[name])
    assert farthest(trainable_state(family.module), want) < 1e-5
    plain = PlainEngine(
        family,
        cached,
        make_study(privacy={"enabled": False}, training={"fedprox": 1e6}),
        RANDOM,
        device="cpu",
    )
    plain.optimizer = torch.optim.SGD(trainable(family.module).values(), lr=1e-3)  # type: ignore[assignment]
    before = trainable_state(family.module)
    with torch.no_grad():
        for parameter in trainable(family.module).values():
            parameter.add_(0.001)  # little enough for the network to go on working
    plain.step(2)
    # Rate x mu = 1000 times the way, back; the gradient itself is clipped to 1.
    off = {name: tensor - before[name] for name, tensor in trainable_state(family.module).items()}
    assert all(torch.allclose(tensor, torch.tensor(0.001 - 1.0), atol=0.02) for tensor in off.values())


def as_sgd(engine: PrivateEngine) -> None:
    """Make a step show its gradient: lr 1 (schedule constant) and no moments."""
    inner: Any = engine.optimizer
    inner.original_optimizer = torch.optim.SGD(list(trainable(engine.family.module).values()), lr=1.0)


def test_noise_in_a_step_has_deviation_sigma_times_c_over_the_divisor(
    family: Msdm, cached: Cached, make_study: Any
) -> None:
    study = make_study(privacy={"sampling_rate": 1e-9, "clip": 0.3}, training={"learning_rate": 1.0})
    engine = private(family, cached, study, sigma=1.7, divisor=4.0)
    as_sgd(engine)
    with torch.no_grad():
        for parameter in family.module.parameters():
            parameter.zero_()
    engine.step(0)
    moved = torch.cat([p.detach().double().flatten() for p in family.module.parameters()])
    assert moved.numel() > 1_000_000
    assert float(moved.std()) * 4.0 == pytest.approx(1.7 * 0.3, rel=0.01)
    assert abs(float(moved.mean())) < 5 * float(moved.std()) / moved.numel() ** 0.5
    # And in each tensor, large or small: none is left without noise.
    for parameter in family.module.parameters():
        scaled = parameter.detach().double().flatten() * 4.0 / (1.7 * 0.3)
        count = scaled.numel()
        assert abs(float(scaled.square().mean()) - 1) < 6 * (2 / count) ** 0.5


def test_every_step_and_tensor_has_its_own_noise(family: Msdm, cached: Cached, make_study: Any) -> None:
    study = make_study(privacy={"sampling_rate": 1e-9}, training={"learning_rate": 1.0})
    engine = private(family, cached, study, sigma=1.0)
    as_sgd(engine)
    states = [trainable_state(family.module)]
    for step in (0, 1):
        engine.step(step)
        states.append(trainable_state(family.module))
    noise = [
        torch.cat([(states[i + 1][name] - states[i][name]).flatten() for name in states[0]]) for i in (0, 1)
    ]
    assert abs(float(torch.corrcoef(torch.stack(noise))[0, 1])) < 0.01
    biases = [(states[1][n] - states[0][n]) for n in states[0] if states[0][n].shape == (64,)]
    correlation = torch.corrcoef(torch.stack(biases)) - torch.eye(len(biases))
    assert float(correlation.abs().max()) < 0.75


def test_divisor_is_the_public_constant_whoever_is_there(
    family: Msdm, cached: Cached, make_study: Any
) -> None:
    study = make_study(training={"learning_rate": 1.0})
    start = trainable_state(family.module)
    moved = []
    for divisor in (6.0, 12.0):
        with torch.no_grad():
            for name, parameter in trainable(family.module).items():
                parameter.copy_(start[name])
        engine = private(family, cached, study, sigma=0.0, divisor=divisor)
        as_sgd(engine)
        engine.step(0)
        moved.append({n: t.double() - start[n].double() for n, t in trainable_state(family.module).items()})
    assert farthest({n: t * 2 for n, t in moved[1].items()}, moved[0]) < 1e-6
    with torch.no_grad():
        for name, parameter in trainable(family.module).items():
            parameter.copy_(start[name])
    sums = loop_sum(family, views_of(cached, study, 0), study.privacy.clip)
    assert farthest({n: t * -6 for n, t in moved[0].items()}, sums) < 1e-4


def test_a_patient_outside_the_sample_leaves_no_trace(family: Msdm, cached: Cached, make_study: Any) -> None:
    study = make_study()
    sampled = poisson_sample(RANDOM, cached.patients, 0, 0.5)
    absent = next(i for i in range(12) if i not in sampled)
    less = Cached(
        [p for i, p in enumerate(cached.patients) if i != absent],
        [rows for i, rows in enumerate(cached.images) if i != absent],
        cached.captions,
        cached.image,
        cached.prompt,
        cached.empty,
    )
    start, ends = trainable_state(family.module), []
    for data in (cached, less):
        with torch.no_grad():
            for name, parameter in trainable(family.module).items():
                parameter.copy_(start[name])
        private(family, data, study, sigma=1.0).step(0)
        ends.append(trainable_state(family.module))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)


def test_plain_step_equals_plain_autograd(family: Msdm, cached: Cached, make_study: Any) -> None:
    study = make_study(privacy={"enabled": False, "micro_batch": 2}, training={"max_grad_norm": 0.05})
    before = trainable_state(family.module)
    views = views_of(cached, study, 2)
    flat = Views.of({name: tensor.flatten(0, 1) for name, tensor in views.tensors().items()})
    parameters = trainable(family.module)
    gradients = torch.autograd.grad(family.view_losses(flat).mean(), list(parameters.values()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 0.05
    clipped = dict(zip(parameters, (g * 0.05 / norm for g in gradients), strict=True))
    PlainEngine(family, cached, study, RANDOM, device="cpu").step(2)
    want = adamw(before, [clipped], [1e-3])
    moved = {n: t for n, t in trainable_state(family.module).items()}
    # Where a gradient is all but zero, AdamW's sign is rounding: compare the rest.
    for name, gradient in clipped.items():
        clear = gradient.abs() > 1e-6
        assert torch.allclose(moved[name].double()[clear], want[name][clear], atol=2e-5), name


def test_plain_step_without_anyone_is_no_step(family: Msdm, cached: Cached, make_study: Any) -> None:
    study = make_study(privacy={"enabled": False, "sampling_rate": 1e-9}, training={"weight_decay": 0.5})
    before = trainable_state(family.module)
    PlainEngine(family, cached, study, RANDOM, device="cpu").step(0)
    assert all(torch.equal(before[n], t) for n, t in trainable_state(family.module).items())


def test_noise_is_added_in_double_precision() -> None:
    weight = nn.Parameter(torch.zeros(200_000))
    optimizer = PatientDPOptimizer(
        torch.optim.SGD([weight], lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1
    )
    fine = RANDOM.stream("fine").protective_normal(weight.shape, 1.0)

    def source(name: str, shape: torch.Size, std: float) -> Tensor:
        return fine

    optimizer.noise_source = source
    optimizer.step_on(["w"], {"w": torch.full_like(weight, 1.0)})
    assert torch.equal(-weight.detach(), (1.0 + fine).float())
    # Rounded to fp32 before, sums near zero would all lie on the coarse grid of the noise near -1.
    assert not torch.equal(-weight.detach(), 1.0 + fine.float())


def test_training_takes_the_rounds_global_steps() -> None:
    taken: list[int] = []

    train(taken.append, 6, 3, "round 3")
    assert taken == [6, 7, 8]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named() -> None:
    assert pick_device("auto") == "cpu"
    with pytest.raises(BadInput, match=r"training\.device.*no GPU"):
        pick_device("cuda")
