"""Metrics answer to known damage of real chest X-rays, the more the stronger it is (docs/evaluation.md)."""

import importlib.util
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from polyclinic.common.evaluation_settings import ExtractorSettings
from polyclinic.common.features.load import load_extractor
from polyclinic.server.evaluation.features import FeatureStore
from tests.common.test_near import XRAYS, needs_xrays

# EfficientNet sees that there is colour, hardly how much: its answer is full at a tenth.
SATURATES = {("package:efficientnet-lite0", "colour"): 3}


def load_benchmark(name: str) -> ModuleType:
    """Load a script of `benchmarks/` by its path: an installed package has that folder's name."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_grows(ladder: list[Any], number: Callable[[Any], float], what: str) -> None:
    values = [number(response) for response in ladder]
    told = ", ".join(f"{r.damage} {r.level}: {v:.3g}" for r, v in zip(ladder, values, strict=True))
    print(f"{what}: {told}")
    assert all(before < after for before, after in pairwise(values)), f"{what}: {told}"


@needs_xrays
@pytest.mark.parametrize("n", [100, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
@pytest.mark.parametrize("source", ["package:efficientnet-lite0", "radiomic"])
def test_damage_is_answered_the_more_the_stronger(source: str, n: int, tmp_path: Path) -> None:
    benchmark = load_benchmark("evaluation_response")
    generator, reference = benchmark.halves(XRAYS)
    extractor = load_extractor(ExtractorSettings(source=source))
    store = FeatureStore(tmp_path, 64, "crop")
    found = [*benchmark.responses(extractor, generator, reference[: 3 * n], store, n, ("view", "AP"))]
    none = next(r for r in found if r.damage == "none")
    by_kind = {
        kind: [none, *(r for r in found if r.damage == kind)] for kind in (*benchmark.LADDERS, "missing")
    }

    for kind in benchmark.LADDERS:
        ladder = by_kind[kind][: 1 + SATURATES.get((source, kind), len(benchmark.LADDERS[kind]))]
        assert_grows(ladder, lambda r: r.metrics["kid"].value, f"kid, {kind}")
    collapse = by_kind["collapse"]
    assert_grows(collapse, lambda r: -r.metrics["vendi"].value, "loss of vendi")
    assert_grows(collapse, lambda r: -r.metrics["coverage"].value, "loss of coverage")
    assert_grows(collapse, lambda r: r.metrics["ms_ssim"].value, "ms_ssim")

    def unseen(response: Any) -> float:
        return -float(response.seen.value)

    assert_grows(by_kind["missing"], unseen, "prompted films not seen")
    # Saturated is not blind: the strongest is far from none.
    for kind in benchmark.LADDERS:
        strongest = by_kind[kind][-1].metrics["kid"]
        assert strongest.low > none.metrics["kid"].high
