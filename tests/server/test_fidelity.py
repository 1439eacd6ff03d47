"""Fidelity against oracles, plain loops, closed forms and simulation."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy import linalg
from torch import Tensor, nn

from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.estimate import measure_fidelity
from polyclinic.server.evaluation.fidelity import (
    CMMD_SCALE,
    CMMD_SIGMA,
    frechet_distance,
    frechet_of_moments,
    grouped_cmmd,
    grouped_frechet,
    grouped_kid,
    merge,
    moments,
)
from polyclinic.server.evaluation.jackknife import Jackknifed
from polyclinic.server.evaluation.split import equal_n, floor


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _clustered(groups: int, each: int, d: int, generator: torch.Generator, spread: float = 1.0) -> Tensor:
    """Images that share their group's offset: [groups * each, d]."""
    centres = torch.randn(groups, 1, d, generator=generator, dtype=torch.float64) * spread
    own = torch.randn(groups, each, d, generator=generator, dtype=torch.float64)
    return (centres + own).reshape(groups * each, d)


def _names(groups: int, each: int, prefix: str = "p") -> list[str]:
    return [f"{prefix}{i // each}" for i in range(groups * each)]


class _Features(nn.Module):
    """Hands features through, so that torchmetrics can be the oracle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(("n", "m", "d"), [(60, 45, 20), (200, 200, 64), (50, 30, 90), (30, 200, 64)])
def test_frechet_agrees_with_sqrtm_and_torchmetrics(n: int, m: int, d: int) -> None:
    mix = _normal(d, d, 9) / math.sqrt(d)
    x, y = _normal(n, d, 1), _normal(m, d, 2) @ mix + 0.3
    sx, sy = torch.cov(x.T), torch.cov(y.T)
    root = linalg.sqrtm((sx @ sy).numpy()).real.trace()
    oracle = float((x.mean(0) - y.mean(0)).square().sum() + sx.trace() + sy.trace()) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(oracle, rel=1e-4)

    image = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    metric = image.FrechetInceptionDistance(feature=_Features(d))
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert frechet_distance(x, y) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_frechet_of_known_gaussians() -> None:
    """For commuting covariances it is |m1 - m2|^2 + sum (s1 - s2)^2: whiten samples, then scale exactly."""
    d = 6
    x, y = _normal(40, d, 3), _normal(70, d, 4)

    def exact(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        z = z - z.mean(0)
        whitener = torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T)))
        moved: Tensor = z @ whitener.T * scale + mean
        return moved

    m1, m2, s1, s2 = _normal(4, d, 5)
    s1, s2 = s1.abs(), s2.abs()
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(exact(x, m1, s1), exact(y, m2, s2)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(30, 80), (80, 30)])
def test_frechet_of_a_sample_with_itself_is_zero(n: int, d: int) -> None:
    x = _normal(n, d, 6)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-8 * d)
    # A dead feature makes the covariance singular; nothing may become NaN.
    x[:, 0] = 2.0
    assert frechet_distance(x, x + 1.0) == pytest.approx(d, rel=1e-6)


def test_moments_of_parts_merge_to_those_of_the_whole() -> None:
    """Also where the mean is a million times the spread, which a sum of squares does not survive."""
    x, y = _normal(90, 7, 30) + 1e6, _normal(60, 7, 31) * 2 + 1e6
    parts = [moments(part) for part in (x[:20], x[20:23], x[23:])]
    merged = merge(parts[0], merge(parts[1], parts[2]))
    torch.testing.assert_close(merged.scatter / (merged.n - 1), torch.cov(x.T), rtol=1e-9, atol=1e-9)
    assert frechet_of_moments(merged, moments(y)) == pytest.approx(frechet_distance(x, y), rel=1e-7)
    # Fewer rows than features: the covariance has no inverse.
    few, other = _normal(5, 12, 32), _normal(9, 12, 33)
    by_moments = frechet_of_moments(moments(few), moments(other))
    assert by_moments == pytest.approx(frechet_distance(few, other), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(12, 40), (40, 40)])
def test_frechet_jackknife_replicates_are_refits(n: int, m: int) -> None:
    """With as many blocks as groups, the standard error is that of plain leave-one-group-out refits."""
    x, y = _normal(n, 16, 7), _normal(m, 16, 8)
    gx, gy = _names(n // 2, 2), _names(m // 2, 2)
    variance = 0.0
    for left_x, left_y, count in ((gx, [], n // 2), ([], gy, m // 2)):
        refits = []
        for name in sorted(set(left_x or left_y)):
            kept_x = [i for i in range(n) if not left_x or left_x[i] != name]
            kept_y = [i for i in range(m) if not left_y or left_y[i] != name]
            refits.append(frechet_distance(x[kept_x], y[kept_y]))
        mean = sum(refits) / count
        variance += (count - 1) / count * sum((r - mean) ** 2 for r in refits)
    measured = grouped_frechet(x, y, gx, gy, blocks=100)
    assert measured.value == frechet_distance(x, y)
    assert measured.standard_error == pytest.approx(math.sqrt(variance), rel=1e-4)


def test_ungrouped_kid_agrees_with_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    n, d = 60, 24
    x, y = _normal(n, d, 10), _normal(n, d, 11) * 1.2 + 0.2
    metric = image.KernelInceptionDistance(feature=_Features(d), subsets=1, subset_size=n)
    metric.update(x, real=True)
    metric.update(y, real=False)
    alone = [str(i) for i in range(n)]
    assert grouped_kid(x, y, alone, alone).value == pytest.approx(
        float(metric.compute()[0]), abs=1e-4, rel=1e-6
    )


def _cubic(a: Tensor, b: Tensor) -> float:
    return float(a @ b / len(a) + 1) ** 3


def _gaussian(a: Tensor, b: Tensor) -> float:
    apart = float((a / a.norm() - b / b.norm()).square().sum())
    return CMMD_SCALE * math.exp(-apart / (2 * CMMD_SIGMA**2))


def _mmd_by_loops(
    x: Tensor, y: Tensor, gx: list[str], gy: list[str], k: Callable[[Tensor, Tensor], float]
) -> float:
    def within(z: Tensor, g: list[str]) -> float:
        pairs = [k(z[i], z[j]) for i, j in itertools.product(range(len(z)), repeat=2) if g[i] != g[j]]
        return sum(pairs) / len(pairs)

    across = [k(a, b) for a in x for b in y]
    return within(x, gx) + within(y, gy) - 2 * sum(across) / len(across)


@pytest.mark.parametrize(("metric", "kernel"), [(grouped_kid, _cubic), (grouped_cmmd, _gaussian)])
def test_grouped_mmd_and_its_jackknife_agree_with_loops(
    monkeypatch: pytest.MonkeyPatch,
    metric: Callable[..., Jackknifed],
    kernel: Callable[[Tensor, Tensor], float],
) -> None:
    # Slabs smaller than the sample, so that the seams are tested too.
    monkeypatch.setattr("polyclinic.server.evaluation.fidelity.ROWS_AT_ONCE", 5)
    x, y = _normal(11, 4, 12), _normal(9, 4, 13) + 0.5
    gx, gy = list("aabcccdabbd"), list("uvvwwwuxx")
    measured = metric(x, y, gx, gy)
    assert measured.value == pytest.approx(_mmd_by_loops(x, y, gx, gy, kernel), rel=1e-9)

    variance = 0.0
    for side in (0, 1):
        refits = []
        for name in sorted(set((gx, gy)[side])):
            keep_x = [i for i in range(len(x)) if side == 1 or gx[i] != name]
            keep_y = [i for i in range(len(y)) if side == 0 or gy[i] != name]
            left = [gx[i] for i in keep_x], [gy[i] for i in keep_y]
            refits.append(_mmd_by_loops(x[keep_x], y[keep_y], *left, kernel))
        mean = sum(refits) / len(refits)
        variance += (len(refits) - 1) / len(refits) * sum((r - mean) ** 2 for r in refits)
    assert measured.standard_error == pytest.approx(math.sqrt(variance), rel=1e-8)
    assert measured.low < measured.value < measured.high


def test_a_row_order_changes_nothing() -> None:
    x, y = _normal(30, 8, 14), _normal(24, 8, 15)
    gx, gy = _names(10, 3), _names(8, 3)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = grouped_kid(x[order], y, [gx[i] for i in order], gy)
    torch.testing.assert_close(torch.tensor(shuffled), torch.tensor(grouped_kid(x, y, gx, gy)))


def test_kid_interval_covers_with_many_images_a_patient() -> None:
    """25 patients x 8 images against 25 prompts x 8: nominal 95 %, asked for 93 %; ordinary KID covers ~0."""
    d, groups, each, shift, trials = 32, 25, 8, 0.25, 400
    generator = torch.Generator().manual_seed(16)
    # The truth: both sides normal with variance 2, means 0 and `shift`. E k(a, b) from its binomial
    # expansion; E (a.b)^2 and E (a.b)^3 of independent normals follow from their moments.

    def mean_kernel(ma: Tensor, mb: Tensor) -> float:
        v = 2.0
        first = float(ma @ mb)
        second = first**2 + v * float(ma @ ma) + v * float(mb @ mb) + v * v * d
        # Given b, a.b is normal with mean t = ma.b and variance v |b|^2: E t^3 + 3 v E t |b|^2.
        t_mean, t_var, b_square = first, v * float(ma @ ma), float(mb @ mb) + v * d
        third = t_mean**3 + 3 * t_mean * t_var + 3 * v * (t_mean * b_square + 2 * v * first)
        return 1 + 3 * first / d + 3 * second / d**2 + third / d**3

    zero, moved = torch.zeros(d, dtype=torch.float64), torch.full((d,), shift, dtype=torch.float64)
    truth = mean_kernel(zero, zero) + mean_kernel(moved, moved) - 2 * mean_kernel(zero, moved)
    names, alone = _names(groups, each), [str(i) for i in range(groups * each)]
    covered, naive_covered, values = 0, 0, []
    for _ in range(trials):
        x, y = _clustered(groups, each, d, generator), _clustered(groups, each, d, generator) + moved
        measured, naive = grouped_kid(x, y, names, names), grouped_kid(x, y, alone, alone)
        covered += measured.low <= truth <= measured.high
        naive_covered += naive.low <= truth <= naive.high
        values.append(measured.value)
    spread = torch.tensor(values, dtype=torch.float64)
    # Unbiased: the mean of 400 estimates within four of its standard errors.
    assert abs(float(spread.mean()) - truth) < 4 * float(spread.std()) / math.sqrt(trials)
    assert covered / trials >= 0.93, covered / trials
    assert naive_covered / trials < 0.5, naive_covered / trials


def test_cmmd_interval_covers_with_many_images_a_patient() -> None:
    """As above; the truth from 4,000 patients a side with one image each."""
    d, groups, each, trials = 32, 25, 8, 400
    generator = torch.Generator().manual_seed(24)
    moved = torch.full((d,), 0.25, dtype=torch.float64)
    many = [str(i) for i in range(4000)]
    large = (_clustered(4000, 1, d, generator), _clustered(4000, 1, d, generator) + moved)
    truth, doubt, *_ = grouped_cmmd(*large, many, many)
    names, alone = _names(groups, each), [str(i) for i in range(groups * each)]
    covered, naive_covered, values = 0, 0, []
    for _ in range(trials):
        x, y = _clustered(groups, each, d, generator), _clustered(groups, each, d, generator) + moved
        measured, naive = grouped_cmmd(x, y, names, names), grouped_cmmd(x, y, alone, alone)
        covered += measured.low <= truth <= measured.high
        naive_covered += naive.low <= truth <= naive.high
        values.append(measured.value)
    spread = torch.tensor(values, dtype=torch.float64)
    assert abs(float(spread.mean()) - truth) < 4 * math.hypot(float(spread.std()) / math.sqrt(trials), doubt)
    assert doubt < 0.15 * float(spread.std())  # the truth is known well enough to count by
    assert covered / trials >= 0.93, covered / trials
    assert naive_covered / trials < 0.5, naive_covered / trials


def test_frechet_interval_covers_its_mean_at_this_n() -> None:
    """The interval promises the expected value at this n, bias included."""
    d, groups, each, trials = 40, 30, 2, 150
    generator = torch.Generator().manual_seed(17)
    names = _names(groups, each)
    pairs = [
        (_clustered(groups, each, d, generator), 1.5 * _clustered(groups, each, d, generator))
        for _ in range(trials)
    ]
    results = [grouped_frechet(x, y, names, names) for x, y in pairs]
    expected = sum(r.value for r in results) / trials
    covered = sum(r.low <= expected <= r.high for r in results)
    assert covered / trials >= 0.9, covered / trials


def test_floor_uses_disjoint_patients_and_equal_numbers() -> None:
    reference, patients = _normal(120, 6, 18), _names(40, 3)

    def look(x: Tensor, y: Tensor, gx: object, gy: object) -> tuple[Tensor, Tensor, set[str], set[str]]:
        return x, y, set(gx), set(gy)  # type: ignore[call-overload]

    x, y, gx, gy = floor(reference, patients, "key", 40, look)
    assert len(x) == len(y) == 40
    assert not gx & gy
    again, *_ = floor(reference, patients, "key", 40, look)
    other, *_ = floor(reference, patients, "another key", 40, look)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    with pytest.raises(ValueError, match="fewer than n"):
        floor(reference, patients, "key", 100, look)


def test_equal_n_gives_score_and_floor_the_same_number_and_the_same_half() -> None:
    patients, prompts = _names(60, 3), _names(10, 30, "prompt")
    chosen = equal_n(prompts, patients, "key", minimum=50)
    n = len(chosen.reference)
    assert chosen.has_floor
    assert len(chosen.synthetic) == n >= 50
    assert len(set(chosen.synthetic)) == len(set(chosen.reference)) == n

    rows = torch.arange(180, dtype=torch.float64)[:, None]
    _, half, *_ = floor(rows, patients, "key", n, lambda *arguments: arguments)
    assert half[:, 0].tolist() == chosen.reference
    # Patients stay whole but for the last; prompts lose images evenly, and none disappears.
    assert sum(count < 3 for count in Counter(patients[i] for i in chosen.reference).values()) <= 1
    images = Counter(prompts[i] for i in chosen.synthetic)
    assert len(images) == 10
    assert max(images.values()) - min(images.values()) <= 1

    small = equal_n(prompts, patients[:60], "key", minimum=50)
    assert not small.has_floor
    assert len(small.synthetic) == len(small.reference) == 60


def test_fidelity_tells_a_good_generator_from_a_bad_one() -> None:
    generator = torch.Generator().manual_seed(19)
    reference = _clustered(120, 2, 64, generator)
    good, bad = _clustered(60, 2, 64, generator), _clustered(60, 2, 64, generator) * 0.5 + 0.4
    patients, prompts = _names(120, 2), _names(60, 2, "prompt")
    near = measure_fidelity(good, prompts, reference, patients, "key")
    far = measure_fidelity(bad, prompts, reference, patients, "key")
    assert near.kid.n == near.frechet.n == far.kid.n
    assert near.kid.low is not None
    assert near.kid.low < 0 < near.kid.high  # type: ignore[operator]
    assert near.frechet.ratio == pytest.approx(1.0, abs=0.15)
    assert far.kid.value > near.kid.high  # type: ignore[operator]
    assert far.frechet.ratio > 1.3  # type: ignore[operator]
    # The floor of KID is noise around zero: dividing by it would print any number at all.
    assert near.kid.floor is not None
    assert near.kid.floor_low is not None
    assert near.kid.floor_high is not None
    assert near.kid.floor_low <= 0 < near.kid.floor_high
    assert near.kid.ratio is None
    assert "zero" in near.kid.note
    assert any("500" in w for w in near.warnings)
    assert type(near).model_validate_json(near.model_dump_json()) == near


def test_fidelity_without_room_for_a_floor_says_so() -> None:
    x, y = _normal(60, 8, 20), _normal(60, 8, 21)
    result = measure_fidelity(x, _names(20, 3), y, _names(20, 3), "key")
    assert result.kid.floor is None
    assert result.kid.n == 60
    assert len(result.warnings) == 3


def test_fidelity_refuses_what_it_cannot_measure() -> None:
    x, y, names = _normal(60, 8, 22), _normal(60, 8, 23), _names(20, 3)
    with pytest.raises(BadInput, match="49 synthetic"):
        measure_fidelity(x[:49], names[:49], y, names, "key")
    with pytest.raises(BadInput, match="49 reference"):
        measure_fidelity(x, names, y[:49], names[:49], "key")
    with pytest.raises(BadInput, match="width"):
        measure_fidelity(x[:, :7], names, y, names, "key")
    with pytest.raises(BadInput, match="2 prompts"):
        measure_fidelity(x, _names(2, 30), y, names, "key")
    with pytest.raises(BadInput, match="one group a row"):
        measure_fidelity(x, names[:-1], y, names, "key")
    for value in (math.nan, math.inf):
        broken = y.clone()
        broken[3, 2] = value
        with pytest.raises(BadInput, match="1 of 60 reference"):
            measure_fidelity(x, names, broken, names, "key")
