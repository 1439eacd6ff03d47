"""Precision, recall, density, coverage, Vendi and MS-SSIM against loops, closed forms and torchmetrics."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.server.evaluation.diversity import (
    luminance,
    mean_similarity,
    ms_ssim,
    pairs_between,
    pairs_within,
    scales_of,
    vendi_score,
)
from polyclinic.server.evaluation.jackknife import block_jackknife
from polyclinic.server.evaluation.neighbours import NAMES, neighbour_metrics


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _names(groups: int, each: int) -> list[str]:
    return [f"g{i // each}" for i in range(groups * each)]


def _by_loops(x: Tensor, y: Tensor) -> list[float]:
    """The four numbers as the papers define them, image by image."""

    def radius(z: Tensor, i: int, k: int) -> float:
        return sorted(float((z[i] - z[j]).norm()) for j in range(len(z)) if j != i)[k - 1]

    def share(hits: list[bool]) -> float:
        return sum(hits) / len(hits)

    def near(a: Tensor, b: Tensor, bound: float) -> bool:
        return float((a - b).norm()) <= bound

    y3, y5 = ([radius(y, j, k) for j in range(len(y))] for k in (3, 5))
    x3 = [radius(x, i, 3) for i in range(len(x))]
    return [
        share([any(near(a, b, r) for b, r in zip(y, y3, strict=True)) for a in x]),
        share([any(near(a, b, r) for a, r in zip(x, x3, strict=True)) for b in y]),
        sum(near(a, b, r) for a in x for b, r in zip(y, y5, strict=True)) / (5 * len(x)),
        share([any(near(a, b, r) for a in x) for b, r in zip(y, y5, strict=True)]),
    ]


def test_neighbour_metrics_agree_with_loops_and_their_jackknife_with_refits() -> None:
    x, y = 0.8 * _normal(30, 3, 1) + 0.3, _normal(36, 3, 2)
    gx, gy = _names(10, 3), _names(12, 3)
    found = neighbour_metrics(x, y, gx, gy)
    assert list(found) == list(NAMES)
    assert [found[name].value for name in NAMES] == pytest.approx(_by_loops(x, y))
    assert 0 < found["precision"].value < 1
    assert 0 < found["recall"].value < 1

    def leave(z: Tensor, g: list[str], block: set[str]) -> Tensor:
        return z[[i for i in range(len(z)) if g[i] not in block]]

    # Ten blocks a side, groups of equal size dealt in the order of their names: y has two blocks of two.
    names = sorted(set(gy))
    blocks_y = [set(names[i::10]) for i in range(10)]
    refits = torch.tensor(
        [
            [_by_loops(leave(x, gx, {f"g{i}"}), y) for i in range(10)],
            [_by_loops(x, leave(y, gy, block)) for block in blocks_y],
        ]
    )
    variance = 0.9 * (refits - refits.mean(dim=1, keepdim=True)).square().sum(dim=(0, 1))
    for name, total in zip(NAMES, variance, strict=True):
        assert found[name].standard_error == pytest.approx(math.sqrt(total), rel=1e-6)


def test_copies_and_collapse_are_told_apart() -> None:
    """Memorised images score full precision; a collapsed generator has precision and no recall."""
    y, groups = _normal(60, 4, 3), _names(20, 3)
    copies = neighbour_metrics(y, y, groups, groups)
    assert copies["precision"].value == copies["recall"].value == copies["coverage"].value == 1
    collapsed = neighbour_metrics(y[:1].repeat(60, 1) + 1e-6 * _normal(60, 4, 4), y, groups, groups)
    assert collapsed["precision"].value == 1
    assert collapsed["recall"].value <= 1 / 60
    assert collapsed["coverage"].value < 0.3
    far = neighbour_metrics(y + 100, y, groups, groups)
    assert [far[name].value for name in NAMES] == [0, 0, 0, 0]


def test_vendi_score_counts_different_images() -> None:
    """m directions, equally often: m. Unequal shares: the exponential of their entropy."""
    groups = _names(12, 2)
    axes = torch.eye(24, dtype=torch.float64)[:, :24]
    for kinds in (1, 3, 12):
        assert vendi_score(axes[[i % kinds for i in range(24)]], groups).value == pytest.approx(kinds)
    uneven = axes[[0] * 12 + [1] * 8 + [2] * 4] * 7.0  # the length of a feature does not matter
    entropy = -sum(p * math.log(p) for p in (0.5, 1 / 3, 1 / 6))
    assert vendi_score(uneven, groups).value == pytest.approx(math.exp(entropy))
    assert vendi_score(uneven[:, :3], groups).value == pytest.approx(math.exp(entropy))
    one = vendi_score(axes[[0] * 24], groups)
    assert one.low == pytest.approx(one.high)


def _pictures(n: int, size: int, seed: int) -> Tensor:
    coarse = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


@pytest.mark.parametrize("size", [40, 64, 180])
def test_ms_ssim_agrees_with_torchmetrics(size: int) -> None:
    """Scale by scale. torchmetrics' own product averages the last similarity over padded borders, too."""
    image = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is not installed")
    whole = _pictures(4, size, 1)
    noisy = (whole + 0.1 * torch.randn(whole.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    scales = scales_of(size)
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    for other in (_pictures(4, size, 2), noisy, whole):
        a, b, expected = whole, other, torch.ones(4)
        for scale, weight in enumerate(weights):
            if scale == scales - 1:
                _, full = image.structural_similarity_index_measure(
                    a, b, data_range=1.0, reduction="none", return_full_image=True
                )
                term = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
            else:
                _, term = image.structural_similarity_index_measure(
                    a, b, data_range=1.0, reduction="none", return_contrast_sensitivity=True
                )
            expected = expected * term.clamp_min(0) ** (weight / sum(weights))
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        torch.testing.assert_close(ms_ssim(whole, other), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ms_ssim(whole, whole), torch.ones(4))


def test_scales_fit_the_image() -> None:
    assert [scales_of(side) for side in (11, 21, 22, 64, 175, 176, 1024)] == [1, 1, 2, 3, 4, 5, 5]
    with pytest.raises(ValueError, match="at least 11"):
        scales_of(10)
    assert luminance(torch.rand(2, 3, 300, 400)).shape == (2, 1, 256, 341)
    assert luminance(torch.ones(1, 3, 20, 20)).mean().item() == pytest.approx(1.0, abs=1e-5)


def test_pairs_stay_within_a_prompt_and_between_patients() -> None:
    assert pairs_within(list("aabbbc")) == [(0, 1), (2, 3), (3, 4), (4, 2)]
    groups = list("aaabbbccdd")
    pairs = pairs_between(groups)
    assert len(pairs) == 10
    assert all(groups[a] != groups[b] for a, b in pairs)
    # One patient with most images: pairs of the patient's own are left out, not counted.
    assert all("aaaaaabc"[a] != "aaaaaabc"[b] for a, b in pairs_between(list("aaaaaabc")))


def test_similar_draws_score_higher_than_different_ones() -> None:
    different = _pictures(24, 32, 5)
    prompts = _names(6, 4)
    similar = 0.9 * different[[4 * (i // 4) for i in range(24)]] + 0.1 * different
    low, high = (mean_similarity(grey, pairs_within(prompts), prompts) for grey in (different, similar))
    assert low.value < high.low
    same = mean_similarity(different[[0] * 24], pairs_within(prompts), prompts)
    assert same.value == pytest.approx(1.0)
    by_hand = [float(ms_ssim(different[[a]], different[[b]])) for a, b in pairs_within(prompts)]
    assert low.value == pytest.approx(sum(by_hand) / 24, rel=1e-5)


@pytest.mark.parametrize("scale", [0.8, 2.5])
def test_sampling_intervals_cover_the_mean_at_this_n(scale: float) -> None:
    """The promise of a sampling interval: the expected value at this n, bias included; also near 0 and 1."""
    trials, groups, each, d = 80, 20, 3, 5
    names = _names(groups, each)
    generator = torch.Generator().manual_seed(6)

    def draw(spread: float) -> Tensor:
        centres = torch.randn(groups, 1, d, generator=generator, dtype=torch.float64)
        own = torch.randn(groups, each, d, generator=generator, dtype=torch.float64)
        return spread * (centres + own).reshape(-1, d)

    results = []
    for _ in range(trials):
        x, y = draw(scale), draw(1.0)
        results.append({"vendi": vendi_score(x, names), **neighbour_metrics(x, y, names, names)})
    for metric in results[0]:
        found = [result[metric] for result in results]
        expected = sum(r.value for r in found) / trials
        assert sum(r.low <= expected <= r.high for r in found) / trials >= 0.85, metric
        if metric != "vendi":
            assert all(0 <= r.low < r.high for r in found), metric
            assert metric == "density" or all(r.high <= 1 for r in found), metric


def test_none_of_a_few_is_not_never() -> None:
    """Rule of three: none of n independent images allows about 3 / n; here n is 20 groups."""
    x, names = _normal(60, 4, 8), _names(20, 3)
    far = neighbour_metrics(x + 100, x, names, names)
    for metric in ("precision", "recall", "density", "coverage"):
        assert (far[metric].value, far[metric].low) == (0, 0)
        assert 3 / 20 < far[metric].high < 0.35
    same = neighbour_metrics(x, x, names, names)
    assert same["coverage"].value == same["coverage"].high == 1
    assert 0.65 < same["coverage"].low < 1 - 3 / 60


def test_block_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = _normal(40, 1, 7)[:, 0]
    groups = [str(i) for i in range(40)]
    found = block_jackknife(lambda keep: values[keep].mean()[None], groups, blocks=40)[0]
    assert found.standard_error == pytest.approx(float(values.std()) / math.sqrt(40))
