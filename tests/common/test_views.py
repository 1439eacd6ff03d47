"""PRIVACY.md, rule 1: who is sampled and what they show; removing one patient moves nobody else."""

import numpy as np
import pytest
import torch

from polyclinic.common.data.cache import Cached
from polyclinic.common.generators.base import Views
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.views import draw_views, poisson_sample

RANDOM = KeyedRandom(b"v" * 32)
SHAPE = (2, 8, 4, 4)


def without(data: Cached, gone: int) -> Cached:
    """The same site had the patient never been there: their images and the row numbers after them move."""
    keep = [row for rows in data.images for row in rows if row not in data.images[gone]]
    place = {row: new for new, row in enumerate(keep)}
    return Cached(
        [p for i, p in enumerate(data.patients) if i != gone],
        [[place[row] for row in rows] for i, rows in enumerate(data.images) if i != gone],
        [data.captions[row] for row in keep],
        {name: tensor[keep] for name, tensor in data.image.items()},
        data.prompt,
        data.empty,
    )


def draw(data: Cached, chosen: list[int], step: int, *, views: int = 3, dropout: float = 0.2) -> Views:
    return draw_views(
        RANDOM, data, chosen, step=step, views=views, normal_shape=SHAPE, prompt_dropout=dropout
    )


@pytest.mark.parametrize("gone", [0, 5, 11])
def test_removing_a_patient_changes_nobody_elses_mask_or_views(cached: Cached, gone: int) -> None:
    less = without(cached, gone)
    for step in range(4):
        whole = poisson_sample(RANDOM, cached.patients, step, 0.6)
        rest = poisson_sample(RANDOM, less.patients, step, 0.6)
        names = [cached.patients[i] for i in whole]
        assert [less.patients[i] for i in rest] == [n for n in names if n != cached.patients[gone]]
        keep = [place for place, i in enumerate(whole) if i != gone]
        one, other = draw(cached, whole, step).tensors(), draw(less, rest, step).tensors()
        for name in one:
            assert torch.equal(one[name][keep], other[name]), name


def test_mask_is_independent_over_patients_and_steps_at_rate_q() -> None:
    patients = [f"p{i}" for i in range(200)]
    mask = np.zeros((100, 200))
    for step in range(100):
        mask[step, poisson_sample(RANDOM, patients, step, 0.1)] = 1
    assert abs(mask.mean() - 0.1) < 5 * np.sqrt(0.09 / mask.size)
    # Binomial spread of the sample's size: a fixed-size or shuffled sampler has none.
    assert 0.6 < mask.sum(1).var() / (200 * 0.09) < 1.5
    assert 0.6 < mask.sum(0).var() / (100 * 0.09) < 1.5
    assert poisson_sample(RANDOM, patients, 0, 1.0) == list(range(200))


def test_views_show_only_the_patients_own_images_and_captions(cached: Cached) -> None:
    chosen = [1, 2, 11]
    seen: list[set[int]] = [set() for _ in chosen]
    for step in range(30):
        views = draw(cached, chosen, step, views=4, dropout=0.0)
        for place, position in enumerate(chosen):
            for view in range(4):
                mean = views.image["mean"][place, view]
                row = next(
                    r for r in range(len(cached.captions)) if torch.equal(cached.image["mean"][[r]][0], mean)
                )
                assert row in cached.images[position]
                assert torch.equal(views.image["std"][place, view], cached.image["std"][[row]][0])
                shown = views.prompt["states"][place, view]
                assert any(torch.equal(cached.prompt["states"][[c]][0], shown) for c in cached.captions[row])
                seen[place].add(row)
    assert [sorted(rows) for rows in seen] == [cached.images[position] for position in chosen]


def test_views_of_a_patient_differ_and_dropout_has_its_rate(cached: Cached) -> None:
    dropped = total = 0
    uniforms = []
    for step in range(60):
        views = draw(cached, list(range(12)), step, dropout=0.3)
        assert views.normal.shape == (12, 3, *SHAPE)
        assert len(torch.unique(views.uniform)) == 36
        assert not torch.equal(views.normal[0, 0], views.normal[0, 1])
        empty = (views.prompt["states"] == cached.prompt["states"][[0]]).flatten(2).all(2)
        dropped, total = dropped + int(empty.sum()), total + 36
        uniforms.append(views.uniform.flatten())
    assert abs(dropped / total - 0.3) < 5 * np.sqrt(0.21 / total)
    assert abs(float(torch.cat(uniforms).mean()) - 0.5) < 0.04


def test_nobody_sampled_gives_empty_views_of_the_right_shape(cached: Cached) -> None:
    views = draw(cached, [], 0)
    assert {name: tuple(t.shape) for name, t in views.tensors().items()} == {
        "image.mean": (0, 3, 8, 4, 4),
        "image.std": (0, 3, 8, 4, 4),
        "prompt.states": (0, 3, 16, 384),
        "normal": (0, 3, *SHAPE),
        "uniform": (0, 3),
    }
