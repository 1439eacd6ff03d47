"""Averaged adapters against dense matrices: exact products, the best cut, and what it lost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyclinic.common.adapters import A, B, layers, narrow, pad, rank_of, trained
from polyclinic.common.generators.base import Tensors
from polyclinic.common.refusals import Refusal
from polyclinic.common.settings import FederationSettings
from polyclinic.server.aggregation import advance
from polyclinic.server.stacking import refactorise, stack
from tests.server.test_aggregation import spooled

RANK = 4
PLAIN, CONV = "down.0.to_q", "mid.conv"


def adapters(seed: int, size: float = 1.0, rank: int = RANK) -> Tensors:
    """Factors of a linear layer and of a convolution, and a bias that is none."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        PLAIN + A: (rank, 12),
        PLAIN + B: (9, rank),
        CONV + A: (rank, 3, 3, 3),
        CONV + B: (10, rank, 1, 1),
        "norm.bias": (5,),
    }
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def products(state: Tensors) -> dict[str, Tensor]:
    return {
        layer: state[layer + B].double().flatten(1) @ state[layer + A].double().flatten(1)
        for layer in layers(state)
    }


def plus(state: Tensors, difference: Tensors) -> Tensors:
    return {name: tensor + difference[name] for name, tensor in state.items()}


def stacked(folder: Path, state: Tensors, differences: dict[str, Tensors], **federation: object) -> Tensors:
    average = adapters(999)
    weights = dict(zip(sorted(differences), (1.0, 2.0, 3.0), strict=False))
    loss = stack(state, average, spooled(folder, differences), weights, FederationSettings(**federation))  # type: ignore[arg-type]
    assert all(torch.equal(average[name], tensor) for name, tensor in state.items())
    print(loss)
    return state


def test_stacking_is_the_mean_of_the_products_where_the_rank_suffices(tmp_path: Path) -> None:
    """Three sites that each move along one component: the mean has rank 4 and loses nothing."""
    start = adapters(0)
    differences = {f"s{i}": {n: torch.zeros_like(t) for n, t in start.items()} for i in range(3)}
    for i in range(3):
        differences[f"s{i}"]["norm.bias"] += i
        for layer in (PLAIN, CONV):
            differences[f"s{i}"][layer + B][:, i] = 1.0 + i
    want = {
        layer: sum(
            w / 6 * products(plus(start, differences[f"s{i}"]))[layer] for i, w in enumerate((1.0, 2.0, 3.0))
        )
        for layer in (PLAIN, CONV)
    }
    state = stacked(tmp_path, {n: t.clone() for n, t in start.items()}, differences)
    for layer, product in products(state).items():
        assert torch.allclose(product, torch.as_tensor(want[layer]), atol=1e-5), layer
    assert torch.allclose(state["norm.bias"], start["norm.bias"] + (0 + 2 + 6) / 6)
    # And a mean of factors is not: the cross terms are missing.
    averaged, average = {n: t.clone() for n, t in start.items()}, adapters(999)
    for i in range(3):
        differences[f"s{i}"][PLAIN + A] += i
    advance(averaged, average, spooled(tmp_path / "f", differences), FederationSettings())
    exact = sum(products(plus(start, differences[f"s{i}"]))[PLAIN] for i in range(3)) / 3
    assert float((products(averaged)[PLAIN] - exact).norm() / torch.as_tensor(exact).norm()) > 0.05


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_the_cut_is_the_best_and_its_loss_is_told(tmp_path: Path, rate: float) -> None:
    start = adapters(0)
    differences = {f"s{i}": adapters(i + 1, 0.5) for i in range(3)}
    weights = (1 / 6, 2 / 6, 3 / 6)
    ends = [products(plus(start, differences[f"s{i}"])) for i in range(3)]
    dense = {
        layer: (1 - rate) * products(start)[layer]
        + rate * sum(w * e[layer] for w, e in zip(weights, ends, strict=True))
        for layer in (PLAIN, CONV)
    }
    state, average = {n: t.clone() for n, t in start.items()}, adapters(999)
    loss = stack(
        state,
        average,
        spooled(tmp_path, differences),
        {"s0": 1.0, "s1": 2.0, "s2": 3.0},
        FederationSettings(server_learning_rate=rate),
    )
    lost = 0.0
    for layer, product in products(state).items():
        u, s, vh = torch.linalg.svd(dense[layer])
        best = u[:, :RANK] * s[:RANK] @ vh[:RANK]
        assert torch.allclose(product, best, atol=1e-5), layer
        lost += float((dense[layer] - best).square().sum())
    whole = math.sqrt(sum(float(m.square().sum()) for m in dense.values()))
    moved = math.sqrt(sum(float((m - products(start)[layer]).square().sum()) for layer, m in dense.items()))
    assert loss.of_product == pytest.approx(math.sqrt(lost) / whole, rel=1e-6)
    assert loss.of_update == pytest.approx(math.sqrt(lost) / moved, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_any_shapes_and_ranks(terms: int, width: int, height: int, rank: int, seed: int) -> None:
    """Also layers narrower than the rank, and terms of rank one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ranks = [rank, *(1 + (seed + i) % rank for i in range(terms))]
    rows, columns = [draw(r, width) for r in ranks], [draw(height, r) for r in ranks]
    weights = [float(w) for w in torch.rand(len(ranks), generator=generator)]
    a, b, tail = refactorise(rows, columns, weights, rank)
    dense = torch.zeros(height, width, dtype=torch.float64)
    for weight, column, row in zip(weights, columns, rows, strict=True):
        dense += weight * column @ row
    sizes = torch.linalg.svdvals(dense)
    assert (a.shape, b.shape) == ((rank, width), (height, rank))
    assert tail == pytest.approx(float(sizes[rank:].norm()), abs=1e-9)
    assert float((b @ a - dense).norm()) == pytest.approx(tail, abs=1e-9)
    kept = min(rank, len(sizes))
    gram = a[:kept] @ a[:kept].T
    assert torch.allclose(gram, torch.eye(kept, dtype=torch.float64) * gram[0, 0], atol=1e-9)


def test_a_site_of_smaller_rank_leaves_the_rest_where_it_was(tmp_path: Path) -> None:
    """Ranks 1, 2 and 4: exact sum of what each moved, with the components it never held unmoved."""
    start, differences = adapters(0), {}
    exact = {layer: torch.tensor(0.0) for layer in (PLAIN, CONV)}
    for i, rank in enumerate((1, 2, 4)):
        own = narrow(start, rank)
        assert rank_of(own) == rank
        moved = adapters(i + 1, 0.3, rank)
        differences[f"s{i}"] = {name: pad(name, moved[name], start[name]) for name in start}
        for layer in exact:
            change = products(plus(own, moved))[layer] - products(own)[layer]
            exact[layer] = exact[layer] + change / 3
    state, average = {n: t.clone() for n, t in start.items()}, adapters(999)
    wide = {n: pad(n, t, torch.zeros_like(adapters(0, rank=12)[n])) for n, t in state.items()}
    widened = {s: {n: pad(n, t, wide[n]) for n, t in d.items()} for s, d in differences.items()}
    # At rank 12 the sum fits whole: nothing is lost, so it must be exact.
    stack(
        wide,
        adapters(999, rank=12),
        spooled(tmp_path, widened),
        dict.fromkeys(widened, 1.0),
        FederationSettings(),
    )
    for layer, product in products(wide).items():
        assert torch.allclose(product, products(start)[layer] + exact[layer], atol=1e-5), layer
    # With A frozen and shared, padded B's average exactly, too.
    fixed = {s: {n: t * (not n.endswith(A)) for n, t in d.items()} for s, d in differences.items()}
    advance(state, average, spooled(tmp_path / "b", fixed), FederationSettings())
    for layer, product in products(state).items():
        mean = sum(products(plus(start, d))[layer] for d in fixed.values()) / 3
        assert torch.allclose(product, torch.as_tensor(mean), atol=1e-5)


def test_what_a_round_trains(tmp_path: Path) -> None:
    state = adapters(0)
    assert {n for n in trained(state, "freeze-a", 1) if n.endswith(A)} == set()
    assert trained(state, "stack", 2).keys() == trained(state, "factors", 2).keys() == state.keys()
    odd, even = trained(state, "alternate", 1), trained(state, "alternate", 2)
    assert odd.keys() & even.keys() == {"norm.bias"}
    assert {n[-len(B) :] for n in odd.keys() - even.keys()} == {B}
    # With one factor fixed, the mean of the other's differences is exact.
    differences = {f"s{i}": {n: t for n, t in adapters(i + 1).items() if n in even} for i in range(3)}
    exact = {
        layer: sum(products({**state, **plus(even, d)})[layer] for d in differences.values()) / 3
        for layer in (PLAIN, CONV)
    }
    moved = {n: t.clone() for n, t in state.items()}
    advance(moved, adapters(999), spooled(tmp_path, differences), FederationSettings())
    for layer, product in products(moved).items():
        assert torch.allclose(product, torch.as_tensor(exact[layer]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"), [(PLAIN + A, (5, 12)), (PLAIN + A, (4, 11)), (CONV + B, (10, 4)), ("norm.bias", (4,))]
)
def test_odd_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(Refusal, match="bad-state"):
        pad(name, torch.zeros(shape), adapters(0)[name])
