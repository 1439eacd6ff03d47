"""Near copies at the coordinator: copies are counted, fresh patients are not, small references say so."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.common.features.near import SIDE, Nearest, nearest_by_pixels
from polyclinic.server.evaluation.near_copies import ALPHA, measure_near_copies, thumbnail_extractor

XRAYS = Path(__file__).parents[3] / "shared/data/nih-chest-xray"


def _nearest(distances: torch.Tensor) -> Nearest:
    return Nearest(distances.double(), torch.zeros(len(distances), dtype=torch.int64))


def test_counts_shares_and_what_is_expected() -> None:
    generator = torch.Generator().manual_seed(1)
    real = 0.3 + torch.rand(400, generator=generator)
    patients = [f"p{i // 2}" for i in range(400)]
    drawn = torch.cat([torch.full((6,), 0.05), 0.5 + torch.rand(74, generator=generator)])
    prompts = [f"prompt {i // 8}" for i in range(80)]
    found = measure_near_copies(_nearest(drawn), prompts, _nearest(real), patients, "distance")
    assert (found.found, found.n, found.alpha) == (6, 80, ALPHA)
    assert found.share.value == 6 / 80
    assert found.share.groups == 10
    assert found.share.low is not None
    assert found.share.high is not None
    # All six are of one prompt: ten prompts cannot say more than this.
    assert found.share.low < 0.03
    assert 0.15 < found.share.high < 0.4
    assert found.expected <= ALPHA
    none = measure_near_copies(_nearest(drawn[6:] + 1), prompts[6:], _nearest(real), patients, "distance")
    assert none.found == 0
    assert none.share.high is not None
    assert none.share.high > 0.01  # none of ten prompts is not never


def test_a_small_reference_says_what_chance_it_allows() -> None:
    real, patients = (
        0.3 + torch.rand(30, generator=torch.Generator().manual_seed(2)),
        [str(i) for i in range(30)],
    )
    found = measure_near_copies(_nearest(real + 1), ["a"] * 30, _nearest(real), patients, "distance")
    assert found.alpha == pytest.approx(1 / 31)
    assert "too few patients" in found.note


@pytest.mark.skipif(not XRAYS.exists(), reason=f"no chest X-rays at {XRAYS}")
def test_a_generator_that_copies_is_told_from_one_that_does_not() -> None:
    """Half of the "drawn" X-rays are blurred, shifted, noisy copies; the others are of fresh patients."""
    with (XRAYS / "images.csv").open(encoding="utf-8") as table:
        first = {row["patient"]: row["image"] for row in csv.DictReader(table)}
    names = list(first.values())[:440]
    grey = [np.asarray(Image.open(XRAYS / name).convert("L").resize((64, 64))) for name in names]
    images = (torch.from_numpy(np.stack(grey)).float() / 255)[:, None].repeat(1, 3, 1, 1)
    noise = 0.03 * torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    copies = (0.9 * torch.roll(images[:40], (1, -2), (2, 3)) + 0.05 + noise).clamp(0, 1)
    rows = thumbnail_extractor().extract(torch.cat([images, copies])).reshape(-1, SIDE, SIDE)
    seen, other, fresh, copied = rows[:240], rows[240:400], rows[400:440], rows[440:]
    real = nearest_by_pixels(other, seen)
    results = []
    for drawn in (fresh, torch.cat([fresh[:20], copied[:20]]), copied):
        nearest = nearest_by_pixels(drawn, seen)
        results.append(
            measure_near_copies(nearest, [f"{i // 4}" for i in range(40)], real, list(first)[240:400], "p")
        )
    honest, half, all_copies = results
    assert honest.found <= 2
    assert honest.share.low is not None
    assert half.share.low is not None
    assert honest.share.low <= honest.expected <= ALPHA < half.share.low
    assert half.found >= 19
    assert all_copies.found >= 38
