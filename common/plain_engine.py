"""Ordinary training, for studies without privacy: refused unless a site's own policy allows it."""

from __future__ import annotations

import torch

from polyclinic.common.data.cache import Cached
from polyclinic.common.generators.base import Family, Views, trainable
from polyclinic.common.optimizer import Proximal, adamw, set_rate
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.study import Study
from polyclinic.common.training import Sampler


class PlainEngine:
    """Ordinary training on the same patients and views. NOT PRIVATE."""

    def __init__(
        self, family: Family, data: Cached, study: Study, random: KeyedRandom, *, device: str
    ) -> None:
        self.family, self.study = family, study
        self.sampler = Sampler(family, data, study, random, device)
        self.optimizer = adamw(trainable(family.module).values(), study)
        self.proximal = Proximal(trainable(family.module).values(), study.training.fedprox)

    def step(self, step: int) -> None:
        """Step on the mean loss over all views of the sampled patients; nobody sampled, no step."""
        views = self.sampler.views(step)
        count = views.uniform.numel()
        if not count:
            return
        flat = {name: tensor.flatten(0, 1) for name, tensor in views.tensors().items()}
        size = self.study.privacy.micro_batch * self.study.privacy.views
        self.optimizer.zero_grad()
        for start in range(0, count, size):
            part = Views.of({name: tensor[start : start + size] for name, tensor in flat.items()})
            (self.family.view_losses(part).sum() / count).backward()
        parameters = list(trainable(self.family.module).values())
        torch.nn.utils.clip_grad_norm_(parameters, self.study.training.max_grad_norm)
        self.proximal.add()
        set_rate(self.optimizer, self.study.learning_rate(step))
        self.optimizer.step()
