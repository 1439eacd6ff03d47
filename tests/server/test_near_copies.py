"""Near copies at the coordinator: copies are counted, fresh patients are not, small references say so."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.common.data.table import Record
from polyclinic.common.features.near import SIDE, Nearest, nearest_by_pixels
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.near_copies import (
    ALPHA,
    measure_near_copies,
    near_copies,
    thumbnail_extractor,
)
from polyclinic.server.reference import Reference

XRAYS = Path(__file__).parents[3] / "shared/data/nih-chest-xray"


def _nearest(distances: torch.Tensor) -> Nearest:
    return Nearest(distances.double(), torch.zeros(len(distances), dtype=torch.int64))


def test_counts_shares_and_what_is_expected() -> None:
    generator = torch.Generator().manual_seed(1)
    fresh = 0.3 + torch.rand(400, generator=generator)
    fresh_patients = [f"p{i // 2}" for i in range(400)]
    seen = torch.cat([torch.full((6,), 0.05), 0.5 + torch.rand(74, generator=generator)])
    rows = torch.tensor([4, 4, 9, 9, 9, 7] + [0] * 74)
    # Six images of four patients: a patient counts once.
    patients = ["a", "a", "b", "b", "c", "d", *(f"q{i}" for i in range(74))]
    found = measure_near_copies(Nearest(seen.double(), rows), patients, _nearest(fresh), fresh_patients, "x")
    assert (found.found, found.n, found.images, found.alpha) == (4, 78, 3, ALPHA)
    assert found.share.value == 4 / 78
    assert found.share.groups == 78
    assert found.share.low is not None
    assert found.share.high is not None
    assert 0 < found.share.low < 4 / 78 < found.share.high < 0.2
    assert found.expected <= ALPHA
    none = measure_near_copies(_nearest(seen[6:] + 1), patients[6:], _nearest(fresh), fresh_patients, "x")
    assert (none.found, none.images) == (0, 0)
    assert none.share.high is not None
    assert none.share.high > 0.01  # none of 74 patients is not never


def test_what_draws_near_to_everybody_draws_the_threshold_down() -> None:
    """Smooth pictures are near to all: those the generator has not seen are as near, so few are flagged."""
    generator, flagged, trials = torch.Generator().manual_seed(2), 0, 60
    names = [str(i) for i in range(120)]
    for _ in range(trials):
        nearness = 10.0 ** -float(torch.rand(1, generator=generator))
        seen, fresh = (nearness * torch.rand(120, generator=generator) for _ in range(2))
        flagged += measure_near_copies(_nearest(seen), names, _nearest(fresh), names, "x").found
    # The share's standard error is 0.16 %: a trial's flags hang together by their threshold.
    assert 0.003 < flagged / trials / 120 < ALPHA + 0.005


def test_a_small_reference_says_what_chance_it_allows() -> None:
    fresh, patients = (
        0.3 + torch.rand(30, generator=torch.Generator().manual_seed(2)),
        [str(i) for i in range(30)],
    )
    found = measure_near_copies(_nearest(fresh + 1), patients, _nearest(fresh), patients, "distance")
    assert found.alpha == pytest.approx(1 / 31)
    assert "too few patients" in found.note


def test_a_seen_image_under_a_fresh_id_does_not_hide_its_copies(tmp_path: Path) -> None:
    generator, records = torch.Generator().manual_seed(6), []
    for number in range(30):
        coarse = torch.randint(256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
        records.append(Record(f"p{number}", tmp_path / f"{number}.png", ()))
    seen, fresh, store = records[:12], records[12:], FeatureStore(tmp_path / "kept", 32, "crop")
    drawn = store.pixels(records[:3])
    for again, said in (([], ""), ([replace(seen[0], patient="again")], "under another id: 1.")):
        found = near_copies(drawn, thumbnail_extractor(), Reference(seen, [], fresh + again, ""), store)
        assert [measured.found for measured in found] == [3, 3]
        assert all(measured.note.endswith(said) for measured in found)
        assert all(measured.threshold > 0.01 for measured in found)


@pytest.mark.skipif(not XRAYS.exists(), reason=f"no chest X-rays at {XRAYS}")
def test_a_generator_that_copies_is_told_from_one_that_does_not() -> None:
    """40 of 200 patients are drawn: as blurred, shifted, noisy copies, or not at all but as others."""
    with (XRAYS / "images.csv").open(encoding="utf-8") as table:
        first = {row["patient"]: row["image"] for row in csv.DictReader(table)}
    names = list(first.values())[:440]
    grey = [np.asarray(Image.open(XRAYS / name).convert("L").resize((64, 64))) for name in names]
    images = (torch.from_numpy(np.stack(grey)).float() / 255)[:, None].repeat(1, 3, 1, 1)
    noise = 0.03 * torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    copies = (0.9 * torch.roll(images[:40], (1, -2), (2, 3)) + 0.05 + noise).clamp(0, 1)
    # A generator that draws smooth, average films is nearer to everybody, and still copies nobody.
    smooth = images[400:].reshape(20, 2, 3, 64, 64).mean(dim=1)
    rows = thumbnail_extractor().extract(torch.cat([images, copies, smooth])).reshape(-1, SIDE, SIDE)
    seen, fresh, others, copied, averages = (
        rows[:200],
        rows[200:400],
        rows[400:440],
        rows[440:480],
        rows[480:],
    )
    results = []
    for drawn in (others, averages, torch.cat([others[:20], copied[:20]]), copied):
        near = [nearest_by_pixels(some, drawn) for some in (seen, fresh)]
        results.append(measure_near_copies(near[0], list(first)[:200], near[1], list(first)[200:400], "p"))
    honest, averaged, half, all_copies = results
    for found in (honest, averaged):
        assert found.found <= 6  # 2 expected: 7 or more have a chance below 1 %
        assert found.share.low is not None
        assert found.share.low <= ALPHA
    assert half.share.low is not None
    assert half.share.low > ALPHA
    assert 19 <= half.found <= 26
    assert half.images is not None
    assert half.images >= 19
    assert all_copies.found >= 38
