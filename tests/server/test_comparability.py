"""What is unequal between arms is said before who won, on both pages that compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from polyclinic.server.report.comparability import comparability
from polyclinic.server.report.comparison import write_comparison
from polyclinic.server.report.contest import comparison_verdict, privacy
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.systems import write_systems
from tests.server.report_fakes import fake_run
from tests.server.report_page import Page
from tests.server.test_report_browser import entries


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    folder = tmp_path_factory.mktemp("arm")
    return folder, fake_run(folder, last=2)


def judged(metrics: Metrics, **update: Any) -> Metrics:
    """The arm, with something else told of its last judgement; `n` is that of the KID."""
    last = metrics.rounds[-1]
    assert last.fidelity is not None
    n = update.pop("n", None)
    kid = last.fidelity.kid.model_copy(update={"n": n} if n else {})
    found = last.fidelity.model_copy(update={"kid": kid, **update})
    return metrics.model_copy(
        update={"rounds": [*metrics.rounds[:-1], last.model_copy(update={"fidelity": found})]}
    )


def study(metrics: Metrics, **update: Any) -> Metrics:
    return metrics.model_copy(update={"study": metrics.study.model_copy(update=update)})


def test_every_way_of_being_judged_unlike_is_named_with_its_arms(arm: tuple[Path, Metrics]) -> None:
    metrics = arm[1]
    assert comparability(["a", "b"], [metrics, metrics]) == []
    # Another generator, title or cost is what a comparison is about.
    assert comparability(["a", "b"], [metrics, study(metrics, generator="flux", base="x")]) == []
    split = {"study": {"reference": {"key": "other", "evaluate": 0.4}}}
    cases = [
        (study(metrics, image_size=128), "draw images of different sizes: 64\u00a0px for a and c; 128"),
        (
            study(metrics, reference_hash="5eed" * 16),
            "different references: one not stated for a and c; 5eed5",
        ),
        (
            metrics.model_copy(update={"study_json": split}),
            'concepts differently: one not stated for a and c; {"key',
        ),
        (
            judged(metrics, weights="0f" * 32),
            "e1fee1fee1fe, polyclinic-fidelity-1 for a and c",
        ),
        (judged(metrics, protocol="polyclinic-fidelity-9"), "polyclinic-fidelity-9 for b"),
        (
            judged(metrics, preprocessing="padded to 128 px; x"),
            "differently: resized to 128 px, bicubic for",
        ),
        (judged(metrics, n=100), "unequal numbers: 320 images a side for a and c; 100 images a side for b"),
    ]
    for other, wanted in cases:
        said = comparability(["a", "b", "c"], [metrics, other, metrics])
        assert len(said) == 1, wanted
        assert wanted in said[0]
    # An arm that was never judged is told as such, and not as judged otherwise.
    nothing = {"fidelity": None, "faithfulness": None, "evaluated": False}
    bare = metrics.model_copy(update={"rounds": [r.model_copy(update=nothing) for r in metrics.rounds]})
    assert comparability(["a", "b"], [metrics, bare]) == []
    assert any(s.startswith("Not judged: ") for s in comparison_verdict([metrics, bare]))


def test_no_arm_of_a_tie_is_called_the_most_private(arm: tuple[Path, Metrics]) -> None:
    metrics = arm[1]
    less = metrics.model_copy(
        update={"sites": [s.model_copy(update={"epsilon": 1.0}) for s in metrics.sites]}
    )
    assert privacy(["a", "b"], [metrics, metrics]).endswith("protect their patients, alike.")
    assert privacy(["a", "b", "c"], [metrics, less, metrics]).endswith("protect their patients; b most.")
    assert privacy(["a", "b", "c"], [less, less, metrics]).endswith("protect their patients.")


def test_both_pages_say_it_first(arm: tuple[Path, Metrics]) -> None:
    folder, metrics = arm
    other = judged(study(metrics, reference_hash="5eed" * 16, name="phantom-other"), n=100)
    page = write_comparison(folder / "compare.html", [metrics, other], [folder, folder]).read_text()
    systems = entries(metrics, folder)
    changed = [e if e.system != "msdm" else dataclasses.replace(e, metrics=other) for e in systems]
    for text in (page, write_systems(folder / "systems.html", "Two", changed).read_text()):
        verdict = text.partition('<ul class="verdict')[2].partition("</ul>")[0]
        lines = verdict.split("<li")[1:]
        assert "different references" in lines[0]
        assert "unequal numbers" in lines[1]
        assert all('class="none"' in line for line in lines[:2])
        assert "best value" in verdict
        assert "Every arm has the same" not in Page(text).text
    alike = write_systems(folder / "systems.html", "Two", systems).read_text()
    assert "Not a fair comparison" not in alike
    assert "Every arm has the same patients, sites, prompts and reference." in Page(alike).text
