"""Near copies: changed copies are found among real X-rays, other patients are not; thresholds hold."""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.features.near import (
    EXACT,
    REACH,
    SIDE,
    nearest_by_features,
    nearest_by_pixels,
    smallest_alpha,
    threshold,
    thumbnails,
)
from polyclinic.common.refusals import BadInput

XRAYS = Path(__file__).parents[3] / "shared/data/nih-chest-xray"
needs_xrays = pytest.mark.skipif(not XRAYS.exists(), reason=f"no chest X-rays at {XRAYS}")


def _random(n: int, seed: int) -> Tensor:
    coarse = torch.rand(n, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[:, 0]


def test_pixel_search_is_the_brute_force_one() -> None:
    queries, targets = _random(5, 1), _random(7, 2)
    found = nearest_by_pixels(queries, targets)
    for i, query in enumerate(queries.double().numpy()):
        inner = query[REACH : SIDE - REACH, REACH : SIDE - REACH].ravel()
        distances = []
        for target in targets.double().numpy():
            windows = [
                target[y : y + SIDE - 2 * REACH, x : x + SIDE - 2 * REACH].ravel()
                for y in range(2 * REACH + 1)
                for x in range(2 * REACH + 1)
            ]
            distances.append(math.sqrt(1 - max(np.corrcoef(inner, w)[0, 1] for w in windows)))
        assert int(found.rows[i]) == int(np.argmin(distances))
        assert float(found.distances[i]) == pytest.approx(min(distances), abs=1e-5)


def test_feature_search_is_the_brute_force_one_over_several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    queries, targets = (torch.randn(n, 6, generator=generator) for n in (9, 23))
    targets[17] = 3 * queries[4]
    monkeypatch.setattr("polyclinic.common.features.near._AT_ONCE", 4)
    found = nearest_by_features(queries, targets)
    q, t = queries.double().numpy(), targets.double().numpy()
    cosines = (q @ t.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(t, axis=1)
    assert found.rows.tolist() == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose(found.distances, np.sqrt((1 - cosines.max(axis=1)).clip(0)), atol=1e-7)
    assert int(found.rows[4]) == 17
    assert float(found.distances[4]) < 1e-7


def test_a_constant_image_is_no_copy_and_broken_input_is_refused() -> None:
    queries = _random(3, 4)
    queries[1] = 0.25
    found = nearest_by_pixels(queries, torch.cat([queries, torch.zeros(1, SIDE, SIDE)]))
    assert found.distances.tolist() == pytest.approx([0, 1, 0], abs=2e-3)
    with pytest.raises(ValueError, match="finite"):
        nearest_by_pixels(queries, queries * float("nan"))
    with pytest.raises(ValueError, match="no targets"):
        nearest_by_features(torch.zeros(2, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="thumbnails"):
        nearest_by_pixels(queries[:, :10], queries)


def test_threshold_is_the_conformal_order_statistic() -> None:
    distances = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3])
    patients = list("abcde")
    assert threshold(distances, patients, 1 / 6) == pytest.approx(0.1)
    assert threshold(distances, patients, 2 / 6) == pytest.approx(0.2)
    assert threshold(distances, patients, 0.49) == pytest.approx(0.2)
    assert smallest_alpha(patients) == pytest.approx(1 / 6)
    with pytest.raises(BadInput, match="needs 99 public patients"):
        threshold(distances, patients, 0.01)
    # Ties: nothing strictly below the threshold may exceed alpha.
    assert threshold(torch.tensor([0.1, 0.1, 0.1, 0.9]), list("abcd"), 0.5) == pytest.approx(0.1)


def test_false_finds_stay_below_alpha_with_many_images_a_patient() -> None:
    """Patients differ in level and in number of images: image-wise quantiles would be off."""
    generator, alpha, patients, trials = torch.Generator().manual_seed(5), 0.05, 60, 3000
    sizes = torch.randint(1, 9, (trials, patients), generator=generator)
    levels = torch.rand(trials, patients + 1, generator=generator)
    # Patients with few images lie nearer: what a quantile over images gets wrong.
    levels[:, :-1] += sizes / 8
    last = torch.randint(1, 9, (trials,), generator=generator)
    levels[:, -1] += last / 8
    false, naive = 0, 0
    for trial in range(trials):
        of = torch.arange(patients).repeat_interleave(sizes[trial])
        noise = 0.2 * torch.rand(len(of) + 1, generator=generator)
        distances, fresh = levels[trial][of] + noise[:-1], float(levels[trial, -1] + noise[-1])
        names = [str(i) for i in of.tolist()]
        false += fresh < threshold(distances, names, alpha)
        naive += fresh < float(distances.quantile(alpha))
    # Three standard errors of a share of 5 % in 3,000 trials are 1.2 %.
    assert 0.02 < false / trials < alpha + 0.012
    assert naive / trials > alpha + 0.012


def _xrays(size: int) -> tuple[Tensor, list[str]]:
    """One image of each of 500 patients, [500, 3, size, size]."""
    with (XRAYS / "images.csv").open(encoding="utf-8") as table:
        first: dict[str, str] = {}
        for row in csv.DictReader(table):
            first.setdefault(row["patient"], row["image"])
    names = list(first.values())[:500]
    images = [Image.open(XRAYS / name).convert("L").resize((size, size)) for name in names]
    grey = torch.from_numpy(np.stack([np.asarray(i) for i in images])).float() / 255
    return grey[:, None].repeat(1, 3, 1, 1), list(first)[:500]


def _jpeg(images: Tensor, quality: int) -> Tensor:
    out = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(
            buffer, "JPEG", quality=quality
        )
        out.append(np.asarray(Image.open(buffer).convert("RGB")))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 255


def _blur(images: Tensor) -> Tensor:
    small = F.interpolate(images, scale_factor=1 / 3, mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic").clamp(0, 1)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda x: x,
    "shifted by 3 of 64 px": lambda x: torch.roll(x, (2, -3), (2, 3)),
    "brightened, less contrast": lambda x: 0.7 * x + 0.2,
    "gamma": lambda x: x**0.8,
    "JPEG 30": lambda x: _jpeg(x, 30),
    "blurred": _blur,
    "noisy": lambda x: (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(
        0, 1
    ),
    "shifted, brightened, JPEG": lambda x: _jpeg(torch.roll(0.85 * x + 0.1, (-2, 2), (2, 3)), 50),
}


@needs_xrays
def test_changed_copies_are_found_among_real_x_rays_and_other_patients_are_not() -> None:
    images, patients = _xrays(64)
    small = thumbnails(images)
    targets, calibration = small[:250], small[250:380]
    limit = threshold(nearest_by_pixels(calibration, targets).distances, patients[250:380], 0.01)
    for name, change in CHANGES.items():
        found = nearest_by_pixels(thumbnails(change(images[:100])), targets)
        caught = (found.distances < limit) & (found.rows == torch.arange(100))
        assert float(caught.float().mean()) >= 0.97, name
    # 120 other patients: at a chance of 1 %, five or more false finds have a chance below 1 %.
    others = nearest_by_pixels(small[250:], targets).distances
    assert int((others[130:] < limit).sum()) < 5
    # Far below the limit there is no other patient, nor is one to be expected: distances fall as r^D.
    assert not bool((others < EXACT * limit).any())
    nearest = others.sort().values[:41]
    assert 40 / float((nearest[40] / nearest[:40]).log().sum()) > 5
    for name in ("exact", "brightened, less contrast", "JPEG 30"):
        found = nearest_by_pixels(thumbnails(CHANGES[name](images[:100])), targets)
        assert bool((found.distances < EXACT * limit).all()), name


@needs_xrays
def test_features_find_brightened_copies_and_no_other_patients() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="extractor packages not installed")
    from polyclinic.common.features.efficientnet import extract

    images, patients = _xrays(64)
    features = extract(images[:140])
    targets = features[:50]
    limit = threshold(nearest_by_features(features[50:110], targets).distances, patients[50:110], 1 / 61)
    for copies in (images[:20], 0.9 * images[:20] + 0.05, images[:20] ** 0.9):
        found = nearest_by_features(extract(copies), targets)
        assert bool((found.distances < limit).all())
        assert found.rows.tolist() == list(range(20))
    assert int((nearest_by_features(features[110:], targets).distances < limit).sum()) < 5
