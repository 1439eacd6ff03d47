"""Who is in a step, and what each of them shows: Poisson sampling and view draws.

Every patient is sampled independently with the public rate q; a sampled patient shows K views,
each one draw of (image, caption or none, noise, timestep). All of it is a function of
(key, patient, step, view) alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyclinic.common.data.cache import Cached
from polyclinic.common.generators.base import Views
from polyclinic.common.privacy.random import KeyedRandom


def poisson_sample(random: KeyedRandom, patients: Sequence[str], step: int, rate: float) -> list[int]:
    """Sample patients independently with the public rate q; positions of the sampled, possibly none."""
    return [i for i, p in enumerate(patients) if random.stream("poisson", step, p).uniform(1)[0] < rate]


def draw_views(
    random: KeyedRandom,
    data: Cached,
    chosen: Sequence[int],
    *,
    step: int,
    views: int,
    normal_shape: tuple[int, ...],
    prompt_dropout: float,
) -> Views:
    """Draw K views of each chosen patient.

    Args:
        chosen: B positions in `data.patients`.
        normal_shape: Shape of the normal numbers one view needs.
        prompt_dropout: Share of views whose caption is the empty one.

    Returns:
        Views with tensors `[B, K, ...]`.
    """
    size = int(torch.Size(normal_shape).numel())
    images: list[int] = []
    prompts: list[int] = []
    uniforms: list[float] = []
    normals = torch.empty(len(chosen) * views, size)
    for place, position in enumerate(chosen):
        rows, patient = data.images[position], data.patients[position]
        for view in range(views):
            stream = random.stream("view", step, patient, view)
            row = rows[stream.below(len(rows))]
            captions = data.captions[row]
            caption = captions[stream.below(len(captions))]
            dropped = stream.uniform(1)[0] < prompt_dropout
            images.append(row)
            prompts.append(data.empty if dropped else caption)
            uniforms.append(float(stream.uniform(1)[0]))
            normals[place * views + view] = torch.from_numpy(stream.normal(size))
    fold = (len(chosen), views)
    return Views(
        {k: v[images].reshape(*fold, *v.shape[1:]) for k, v in data.image.items()},
        {k: v[prompts].reshape(*fold, *v.shape[1:]) for k, v in data.prompt.items()},
        normals.reshape(*fold, *normal_shape),
        torch.tensor(uniforms, dtype=torch.float32).reshape(fold),
    )
