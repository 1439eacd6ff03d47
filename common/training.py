"""One training loop for everyone; what a step is belongs to the engine it is given.

`PrivateEngine` takes DP-SGD steps over Poisson-sampled patients: Opacus's DPOptimizer with our
clipped sum and our noise source. Where a site's own policy allows training without privacy,
`plain_engine.PlainEngine` takes its place. Both are stateless between rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from polyclinic.common.data.cache import Cached
from polyclinic.common.generators.base import Family, Tensors, Views, trainable
from polyclinic.common.optimizer import Proximal, adamw, set_rate
from polyclinic.common.privacy.clipping import ENGINES
from polyclinic.common.privacy.random import DeviceNoise, KeyedRandom, StepNoise
from polyclinic.common.privacy.tap import SUM, Tap
from polyclinic.common.privacy.views import draw_views, poisson_sample
from polyclinic.common.progress import track
from polyclinic.common.study import Study


class PatientDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's DPOptimizer, given a clipped sum over patients instead of per-sample gradients.

    Noise, scaling by the public divisor and the order of the two are Opacus's; the clipped sum comes
    from `clipping`, and `add_noise` draws from our own cryptographic streams.

    Attributes:
        noise_source: Noise of a tensor by its name, shape and standard deviation; float64.
        after_noise: Called when gradients are noised and divided, before the step is taken.
    """

    noise_source: Callable[[str, torch.Size, float], Tensor]
    after_noise: Callable[[], None] | None = None

    def step_on(self, names: list[str], sums: Tensors) -> None:
        """Add noise to the sums, divide by the public constant and step.

        Args:
            names: Parameter names in the optimizer's order.
            sums: Clipped sum by name; zeros for an empty sample, which is a step too.
        """
        self._names = names
        for name, parameter in zip(names, self.params, strict=True):
            parameter.summed_grad = sums[name]
        self.add_noise()
        self.scale_grad()
        if self.after_noise is not None:
            self.after_noise()
        self.original_optimizer.step()
        for parameter in self.params:
            parameter.summed_grad = parameter.grad = None

    def add_noise(self) -> None:
        """Add C x sigma Gaussian noise to every coordinate of the sum."""
        std = self.noise_multiplier * self.max_grad_norm
        for name, parameter in zip(self._names, self.params, strict=True):
            noise = self.noise_source(name, parameter.shape, std).to(parameter.device)
            # In float64, rounded once: see `Stream.protective_normal`.
            parameter.grad = (parameter.summed_grad.double() + noise).to(parameter.dtype)

    @property
    def accumulated_iterations(self) -> int:
        """One: a step's micro-batches are already summed."""
        return 1


class Sampler:
    """Who is in a step and what they show."""

    def __init__(self, family: Family, data: Cached, study: Study, random: KeyedRandom, device: str) -> None:
        self.data, self.study, self.random, self.device = data, study, random, device
        self.shape = family.normal_shape({name: rows[[0]] for name, rows in data.image.items()})

    def views(self, step: int) -> Views:
        """Views `[B, K, ...]` of the patients sampled for this step; B may be 0."""
        privacy = self.study.privacy
        chosen = poisson_sample(self.random, self.data.patients, step, privacy.sampling_rate)
        views = draw_views(
            self.random,
            self.data,
            chosen,
            step=step,
            views=privacy.views,
            normal_shape=self.shape,
            prompt_dropout=self.study.generator.prompt_dropout,
        )
        return Views.of({name: tensor.to(self.device) for name, tensor in views.tensors().items()})


class PrivateEngine:
    """DP-SGD for diffusion: sample patients, clip each one's gradient to C, add noise, divide, step.

    An audit tap rides along as one more tensor of the optimizer, but not of the module: what it gets is
    what every weight gets, and the trainable state stays exactly the module's.
    """

    def __init__(
        self,
        family: Family,
        data: Cached,
        study: Study,
        random: KeyedRandom,
        *,
        sigma: float,
        divisor: float,
        device: str,
        tap: Tap | None = None,
    ) -> None:
        self.family, self.study, self.random = family, study, random
        self.device, self.tap = device, tap
        self.sampler = Sampler(family, data, study, random, device)
        parameters = {**trainable(family.module), **({SUM: tap.parameter} if tap else {})}
        self.names = list(parameters)
        self.optimizer = PatientDPOptimizer(
            adamw(parameters.values(), study),
            noise_multiplier=sigma,
            max_grad_norm=study.privacy.clip,
            expected_batch_size=divisor,
        )
        self.proximal = Proximal(trainable(family.module).values(), study.training.fedprox)
        self.optimizer.after_noise = self._after_noise

    def step(self, step: int) -> None:
        """Take one noised step; a sample without patients is a step of pure noise."""
        privacy = self.study.privacy
        clipped_sum = ENGINES[privacy.engine]
        self.optimizer.noise_source = self._noise(step)
        sums = clipped_sum(self.family, self.sampler.views(step), privacy.clip, privacy.micro_batch)
        if self.tap is not None:
            sums = {**sums, SUM: self.tap.clipped_sum(step)}
        set_rate(self.optimizer.original_optimizer, self.study.learning_rate(step))
        self.optimizer.step_on(self.names, sums)

    def _after_noise(self) -> None:
        if self.tap is not None:
            self.tap.collect()
        self.proximal.add()

    def _noise(self, step: int) -> Callable[[str, torch.Size, float], Tensor]:
        """Start to make this step's noise; no CPU has a generator of its own to take it from."""
        if self.study.privacy.noise == "device" and self.device != "cpu":
            return DeviceNoise(self.device)
        shapes = zip(self.names, self.optimizer.params, strict=True)
        return StepNoise(self.random, step, {name: parameter.shape for name, parameter in shapes})


def train(take: Callable[[int], None], first: int, steps: int, label: str) -> None:
    """Run a round's steps with a progress bar; the bar shows no loss, which would be private.

    Args:
        take: Takes the step with this global number.
        first: Global number of the first step.
        steps: Steps to take.
        label: What the bar says.
    """
    with track(label, steps) as advance:
        for step in range(first, first + steps):
            take(step)
            advance(1)
