"""What others read of a run: the schema of metrics.json and the model card, by their own readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from huggingface_hub import ModelCard

from polyclinic.server.report.html import write_report
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.schema import metrics_schema, schema_text
from tests.server.report_fakes import fake_run, wider

PUBLISHED = Path(__file__).parents[2] / "docs" / "metrics.schema.json"
HOSTILE = 'a\n---\nlicense: mit\n"quoted": {x} # no'


def read_card(folder: Path) -> Any:
    """A run's card as the hub's own reader sees it."""
    return ModelCard((folder / "MODEL_CARD.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    folder = tmp_path_factory.mktemp("run")
    metrics = wider(fake_run(folder, last=4))
    write_report(folder, metrics)
    return folder, metrics


def test_the_published_schema_is_that_of_the_code() -> None:
    wanted = "stale: run python -m polyclinic.server.report.schema docs/metrics.schema.json"
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text(), wanted
    jsonschema.Draft202012Validator.check_schema(metrics_schema())


def test_metrics_of_every_kind_obey_the_schema(run: tuple[Path, Metrics], tmp_path: Path) -> None:
    check = jsonschema.Draft202012Validator(json.loads(PUBLISHED.read_text(encoding="utf-8")))
    full = json.loads((run[0] / "metrics.json").read_text(encoding="utf-8"))
    check.validate(full)
    # Infinite epsilons of a run without privacy are words.
    write_report(tmp_path, fake_run(tmp_path, private=False, last=2))
    bare = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert bare["sites"][0]["epsilon"] == "Infinity"
    check.validate(bare)
    full["cost"][0]["figures"]["cpu_s"]["source"] = "guessed"
    with pytest.raises(jsonschema.ValidationError, match="guessed"):
        check.validate(full)
    bare["patients"] = 397
    with pytest.raises(jsonschema.ValidationError, match="patients"):
        check.validate(bare)


def test_the_hub_reads_the_model_card(run: tuple[Path, Metrics]) -> None:
    card = read_card(run[0])
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("diffusers", "other")
    assert "differential-privacy" in data["tags"]
    assert data["co2_eq_emissions"]["emissions"] > 0
    assert "made-up grid agency" in data["co2_eq_emissions"]["source"]
    results = {result.metric_name: result for result in card.data.eval_results}
    kid = next(result for name, result in results.items() if name.startswith("KID, EfficientNet-Lite0"))
    final = run[1].rounds[-1].fidelity
    assert final is not None
    assert kid.metric_value == final.kid.value
    assert "95 % interval" in kid.metric_name
    assert any(result.metric_type == "epsilon" for result in results.values())
    assert any("microsoft/rad-dino" in name for name in results)
    for section in ("Intended use", "Training data", "Privacy", "Evaluation", "Costs", "Limits"):
        assert f"\n## {section}\n" in card.text
    for said in ("coast", "twice the floor", "reader-study", "Adding the images to real ones"):
        assert said in card.text


def test_without_an_intensity_the_card_states_no_emissions(tmp_path: Path) -> None:
    write_report(tmp_path, fake_run(tmp_path, last=2))
    data = read_card(tmp_path).data.to_dict()
    assert "co2_eq_emissions" not in data


def test_no_name_breaks_out_of_the_front_matter(tmp_path: Path) -> None:
    metrics = fake_run(tmp_path, last=2, name=HOSTILE, title=HOSTILE)
    rounds = [
        r.model_copy(update={"fidelity": r.fidelity and r.fidelity.model_copy(update={"extractor": HOSTILE})})
        for r in metrics.rounds
    ]
    write_report(tmp_path, metrics.model_copy(update={"rounds": rounds}))
    card = read_card(tmp_path)
    assert card.data.license == "other"
    assert card.data.model_name == HOSTILE
