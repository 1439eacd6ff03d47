"""The model card's front matter, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
import math
from typing import Any

from markupsafe import Markup

from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.report import wording
from polyclinic.server.report.metrics import Metrics, first_and_last, worst_epsilon
from polyclinic.server.report.view_metrics import TITLES, extractors, latest, measures


def front_matter(metrics: Metrics) -> Markup:
    """Write the front matter, one key a line: JSON is YAML, so no name can break out of its place."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=True)}" for key, value in facts(metrics).items()]
    return Markup("\n".join(["---", *lines, "---"]))


def facts(metrics: Metrics) -> dict[str, Any]:
    """What the front matter says. The weights' licence is for those to set who release them."""
    found: dict[str, Any] = {
        "license": "other",
        "license_name": "to-be-set-at-release",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "language": ["en"],
        "tags": [
            "medical",
            "text-to-image",
            "federated-learning",
            "differential-privacy" if metrics.private else "not-private",
            *(["simulated"] if metrics.simulated else []),
        ],
    }
    base = metrics.study_json.get("study", {}).get("generator", {}).get("base")
    if base:
        found |= {"base_model": base, "base_model_relation": "adapter"}
        found["tags"].append("lora")
    summary = metrics.cost_summary
    if summary is not None and summary.co2_g is not None:
        found["co2_eq_emissions"] = {
            "emissions": round(summary.co2_g, 6),
            "source": f"Polyclinic's cost ledger: energy of {summary.co2_covers}; {summary.grid_source}",
            "training_type": "fine-tuning",
        }
    scores = results(metrics)
    if scores:
        found["metrics"] = sorted({score["type"] for score in scores})
        found["model-index"] = [
            {
                "name": metrics.study.name,
                "results": [
                    {
                        "task": {"type": "text-to-image", "name": "Text to image"},
                        "dataset": {
                            "type": "public-reference",
                            "name": f"the coordinator's reference, {metrics.study.reference_hash[:12]}",
                        },
                        "metrics": scores,
                    }
                ],
            }
        ]
    return found


def results(metrics: Metrics) -> list[dict[str, Any]]:
    """Scores of the last judged round, and the epsilon they were bought with."""
    ends = first_and_last(metrics)
    if ends is None:
        return []
    found = []
    for extractor, fidelity in extractors(ends[1]).items():
        for name, estimate in measures(fidelity).items():
            title = TITLES.get(name, (name, ""))[0]
            found.append(_score(name.replace("_", "-"), f"{title}, {extractor}", estimate))
    faithfulness = latest(metrics, "faithfulness")
    if faithfulness is not None and faithfulness.faithfulness is not None:
        overall = faithfulness.faithfulness.overall.accuracy
        found.append(_score("balanced-accuracy", "faithfulness to the prompt", overall))
    epsilon = worst_epsilon(metrics)
    if epsilon is not None and math.isfinite(epsilon):
        found.append({"type": "epsilon", "value": epsilon, "name": "privacy loss of a patient, claimed"})
    return [score for score in found if math.isfinite(score["value"])]


def _score(kind: str, name: str, estimate: Estimate) -> dict[str, Any]:
    interval = wording.interval(estimate)
    said = f"{name} (95 % interval {interval})" if interval else f"{name} (no interval)"
    return {"type": kind, "value": estimate.value, "name": said}
