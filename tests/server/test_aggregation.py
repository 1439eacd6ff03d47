"""Every rule against brute force over whole tensors, read from disk piece by piece in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from polyclinic.common.generators.base import Tensors
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import FederationSettings
from polyclinic.common.study import parse_study
from polyclinic.server import aggregation
from polyclinic.server.aggregation import advance, clip_factors
from polyclinic.server.spool import Spooled, spool_path, write_tensors

SHAPES: dict[str, tuple[int, ...]] = {"conv": (7, 3, 2), "bias": (11,), "scale": ()}


def tensors(seed: int, size: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def spooled(folder: Path, differences: dict[str, Tensors]) -> dict[str, Spooled]:
    return {
        site: write_tensors(spool_path(folder, 1, site), sorted(difference.items()), difference)
        for site, difference in differences.items()
    }


def flat(difference: Tensors) -> np.ndarray[Any, Any]:
    return np.concatenate([difference[name].numpy().ravel() for name in sorted(difference)])


def brute(differences: dict[str, Tensors], settings: FederationSettings) -> np.ndarray[Any, Any]:
    """The rule over one matrix of sites by coordinates, in float64."""
    sites = sorted(differences)
    rows = np.stack([flat(differences[site]).astype(np.float64) for site in sites])
    if settings.aggregation == "median":
        return np.asarray(np.median(rows, axis=0))
    if settings.aggregation == "trimmed-mean":
        cut = int(settings.trim * len(rows))
        return np.asarray(np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0))
    norms = np.linalg.norm(rows, axis=1)
    if settings.aggregation == "clipped-mean":
        bound = settings.clip_norm or np.median(norms)
        rows *= np.minimum(1, bound / np.where(norms > 0, norms, 1))[:, None]
    weights = [1.0 if settings.weights == "equal" else settings.weights[site] for site in sites]
    return np.asarray(np.average(rows, axis=0, weights=weights))


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("piece", [4, 1 << 20])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"weights": {f"s{i}": 1.0 + i for i in range(6)}},
        {"aggregation": "clipped-mean"},
        {"aggregation": "clipped-mean", "clip_norm": 3.0, "weights": {f"s{i}": 0.5 + i for i in range(6)}},
        {"aggregation": "trimmed-mean"},
        {"aggregation": "trimmed-mean", "trim": 0.4},
        {"aggregation": "median"},
    ],
)
def test_every_rule_is_the_brute_force_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any], piece: int, count: int
) -> None:
    monkeypatch.setattr(aggregation, "PIECE", piece)
    settings = FederationSettings(**rule, server_learning_rate=0.5, ema=0.75)
    differences = {f"s{i}": tensors(i, 1.0 + i) for i in range(count)}
    state, average = tensors(100), tensors(101)
    before, mean_before = flat(state).copy(), flat(average).copy()
    places = {name: tensor.data_ptr() for name, tensor in (state | average).items()}
    advance(state, average, spooled(tmp_path, differences), settings)
    want = before + 0.5 * brute(differences, settings)
    assert np.allclose(flat(state), want, rtol=1e-5, atol=1e-6)
    assert np.allclose(flat(average), 0.75 * mean_before + 0.25 * want, rtol=1e-5, atol=1e-6)
    assert {name: tensor.data_ptr() for name, tensor in (state | average).items()} == places


@pytest.mark.parametrize("rule", ["mean", "clipped-mean", "trimmed-mean", "median"])
def test_the_order_of_arrival_changes_no_bit(tmp_path: Path, rule: str) -> None:
    settings = FederationSettings(aggregation=rule)  # type: ignore[arg-type]
    differences = {f"s{i}": tensors(i, 10.0**i) for i in range(5)}
    results = []
    for number, order in enumerate((sorted(differences), sorted(differences, reverse=True))):
        state, average = tensors(100), tensors(101)
        replies = spooled(tmp_path / str(number), {site: differences[site] for site in order})
        advance(state, average, replies, settings)
        results.append(flat(state).tobytes() + flat(average).tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("rule", ["clipped-mean", "trimmed-mean", "median"])
def test_a_robust_rule_bounds_what_one_site_can_do(tmp_path: Path, rule: str) -> None:
    settings = FederationSettings(aggregation=rule)  # type: ignore[arg-type]
    honest = {f"s{i}": tensors(i) for i in range(4)}
    moved = {}
    for size in (1e3, 1e6):
        state, average = tensors(100), tensors(101)
        replies = spooled(tmp_path / str(size), honest | {"z": tensors(9, size)})
        advance(state, average, replies, settings)
        moved[size] = float(np.linalg.norm(flat(state) - flat(tensors(100))))
    longest = max(float(np.linalg.norm(flat(difference))) for difference in honest.values())
    assert moved[1e3] <= longest
    assert moved[1e6] == pytest.approx(moved[1e3], rel=1e-3)


def test_differences_of_no_length_stay_so() -> None:
    settings = FederationSettings(aggregation="clipped-mean")
    assert clip_factors({"a": 0.0, "b": 0.0}, settings) == {"a": 1.0, "b": 1.0}
    assert clip_factors({"a": 0.0, "b": 2.0, "c": 8.0}, settings) == {"a": 1.0, "b": 1.0, "c": 0.25}
    assert clip_factors({"a": 5.0}, FederationSettings()) == {"a": 1.0}


@pytest.mark.parametrize(
    ("federation", "told"),
    [
        ({"aggregation": "median", "weights": {"a": 1.0}}, "weights mean nothing"),
        ({"aggregation": "trimmed-mean", "weights": {"a": 1.0}}, "weights mean nothing"),
        ({"clip_norm": 1.0}, "clip_norm belongs to"),
        ({"aggregation": "median", "clip_norm": 1.0}, "clip_norm belongs to"),
        ({"aggregation": "clipped-mean", "clip_norm": 0.0}, "federation.clip_norm"),
        ({"aggregation": "trimmed-mean", "trim": 0.5}, "federation.trim"),
        ({"aggregation": "mode"}, "federation.aggregation"),
        ({"transport": "fp16"}, "federation.transport"),
    ],
)
def test_settings_that_mean_nothing_are_refused(federation: dict[str, Any], told: str) -> None:
    values = {"name": "x", "evaluation": {"prompts": [{"text": "a"}]}, "federation": federation}
    with pytest.raises(BadInput, match=told):
        parse_study(values, "x.toml")
    values["federation"] = {"aggregation": "clipped-mean", "clip_norm": 1.0, "weights": {"a": 2.0}}
    assert parse_study(values, "x.toml").federation.transport == "bf16"


def test_a_spooled_reply_is_a_whole_safetensors_file(tmp_path: Path) -> None:
    difference = {**tensors(1), "long": torch.randn(3_000_001)}
    path = spool_path(tmp_path, 7, "quiet/ward é")
    kept = write_tensors(path, sorted(difference.items()), difference)
    read = load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in difference.items())
    assert path.parent == tmp_path / "spool" / "round-0007"
    assert torch.equal(kept.read("long", 5, 1_500_000), difference["long"][5:1_500_000])
    assert kept.norm == pytest.approx(float(np.linalg.norm(flat(difference).astype(np.float64))))
    with pytest.raises(ValueError, match="where bias should be"):
        write_tensors(path.with_name("x"), [("conv", difference["conv"])], difference)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
