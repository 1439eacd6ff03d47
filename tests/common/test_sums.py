"""PRIVACY.md, rules 2, 3, 15 and 16: one noisy sum over patients, by brute force and against theory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.common.features.fourier import BOUND, CONSTANT, fourier, frequencies
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.sums import TAU, bounded, noisy_sum

KEY = KeyedRandom(bytes(32))


def exact(vectors: list[torch.Tensor], bound: float) -> torch.Tensor:
    """The sum without noise, before it is rounded for the way."""
    return torch.stack([bounded(vector, bound) for vector in vectors]).sum(0)


@pytest.mark.parametrize("bound", [BOUND, 1.0])
def test_adding_or_removing_any_patient_moves_the_sum_by_at_most_the_bound(bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(33, generator=generator) * 10.0**power for power in (-6, -1, 0, 1, 6)] * 4
    whole = exact(vectors, bound)
    for out in range(len(vectors)):
        less = exact([v for i, v in enumerate(vectors) if i != out], bound)
        assert float((whole - less).norm()) <= bound
    more = exact([*vectors, torch.full((33,), 1e30)], bound)
    assert 0.99 * bound < float((more - whole).norm()) <= bound


def test_the_bound_holds_in_the_rounding_of_a_large_sum() -> None:
    # Half a million patients: far more than any hospital has, and every partial sum is rounded.
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(500_000, 8, generator=generator).double(), dim=1)
    rows[1:, 0] = rows[1:, 0].abs()
    kept = rows * (1 / (1 + TAU))
    whole, less = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for part in torch.split(kept, 1000):
        whole += part.cumsum(0)[-1]
    for part in torch.split(torch.cat([torch.zeros(1, 8, dtype=torch.float64), kept[1:]]), 1000):
        less += part.cumsum(0)[-1]
    assert float((whole - less).norm()) <= 1.0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=3, max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_vector_becomes_finite_and_bounded(values: list[float]) -> None:
    found = bounded(torch.tensor(values), 1.0)
    assert bool(torch.isfinite(found).all())
    assert float(found.norm()) <= 1.0
    if not all(map(math.isfinite, values)):
        assert not bool(found.any())


def test_noise_has_deviation_z_times_the_bound_and_the_sum_is_there() -> None:
    vectors = [torch.ones(4000) for _ in range(7)]
    found = noisy_sum(vectors, 4000, bound=2.0, noise=3.0, stream=KEY.stream("n"))
    assert found.dtype == torch.float32
    expected = 7 * 2.0 / math.sqrt(4000) / (1 + TAU)
    assert float(found.double().std()) == pytest.approx(6.0, rel=0.05)
    assert float(found.double().mean()) == pytest.approx(expected, abs=4 * 6 / math.sqrt(4000))
    nobody = noisy_sum([], 4000, bound=2.0, noise=3.0, stream=KEY.stream("m"))
    assert float(nobody.double().std()) == pytest.approx(6.0, rel=0.05)


def test_fourier_features_have_norm_one_and_estimate_the_gaussian_kernel() -> None:
    generator = torch.Generator().manual_seed(2)
    x = 3 * torch.randn(40, 16, generator=generator)
    drawn = frequencies("a study", 16, 8192, 10.0)
    mapped = fourier(x, drawn)
    assert mapped.shape == (40, 8193)
    assert torch.allclose(mapped.norm(dim=1), torch.full((40,), BOUND, dtype=torch.float64), atol=1e-12)
    assert bool((mapped[:, -1] == CONSTANT).all())
    kernel = torch.exp(-torch.cdist(x.double(), x.double()).square() / 200)
    assert float((mapped[:, :-1] @ mapped[:, :-1].T - kernel).abs().max()) < 0.06
    assert torch.equal(drawn, frequencies("a study", 16, 8192, 10.0))
    assert not torch.equal(drawn, frequencies("another", 16, 8192, 10.0))
