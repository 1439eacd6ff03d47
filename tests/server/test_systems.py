"""The page that compares systems: its table against the metrics that it shows, its verdict, its frontier."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polyclinic.common.study import Study, parse_study
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.report import wording
from polyclinic.server.report.contest import final_faithfulness, final_kid
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.systems import Entry, write_systems
from polyclinic.server.report.systems_chart import Point, unbeaten
from tests.server.report_fakes import fake_run, fidelity
from tests.server.report_page import Page, assert_self_contained

MODES = ("pooled", "federated", "private")


def study_of() -> Study:
    sites = {name: {"declared_patients": 400} for name in ("north", "coast", "valley")}
    values = {
        "name": "wide",
        "cost": {"gpu_flops_per_s": 1e12, "gpu_utilisation": 0.25},
        "evaluation": {"prompts": [{"text": "a polyp"}]},
        "simulation": {"sites": sites},
    }
    return parse_study(values, "wide")


def with_kid(metrics: Metrics, kid: float) -> Metrics:
    last = max((r for r in metrics.rounds if r.fidelity), key=lambda r: r.round)
    rounds = [r.model_copy(update={"fidelity": fidelity(kid)}) if r is last else r for r in metrics.rounds]
    return metrics.model_copy(update={"rounds": rounds})


def entries_of(folder: Path) -> list[Entry]:
    """Two systems by three arms, at images and at hours; every arm ends at a KID of its own."""
    study, found = study_of(), []
    metrics = {private: fake_run(folder, private=private, last=4) for private in (True, False)}
    for number, (system, budget, mode) in enumerate(
        (s, b, m) for s in ("msdm", "kandinsky-2-2") for b in ("images", "hours") for m in MODES
    ):
        arm = with_kid(metrics[mode == "private"], 0.02 + 0.1 * number)
        found.append(Entry(system, mode, (budget,), study, (number + 1) * 10**9, arm, folder))
    return found


def shown(value: Estimate | None, *, share: bool = False) -> str:
    if value is None:
        return wording.DASH
    number = wording.percent(value.value) if share else wording.number(value.value)
    return f"{number} {(wording.percent_interval if share else wording.interval)(value)}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Entry]]:
    folder = tmp_path_factory.mktemp("systems")
    entries = entries_of(folder)
    return write_systems(folder / "systems.html", "Two systems", entries).read_text("utf-8"), entries


def test_the_table_has_every_arm_with_its_own_numbers(made: tuple[str, list[Entry]]) -> None:
    text, entries = made
    assert_self_contained(text)
    table = re.search(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    assert table is not None
    rows = [row for row in re.findall(r"<tr.*?</tr>", table.group(1), re.DOTALL) if "rowgroup" not in row]
    ordered = sorted(entries, key=lambda e: e.budgets != ("images",))
    assert len(rows) == len(ordered)
    for row, entry in zip(rows, ordered, strict=True):
        name, epsilon, kid, faithful, utility, steps, seen, gpu, peak, *_ = (
            " ".join(Page(cell).text.split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)
        )
        assert name == f"{entry.system}, {entry.mode}"
        assert (epsilon == "not private") == (entry.mode != "private")
        assert kid == shown(final_kid(entry.metrics))
        assert faithful == " ".join(shown(final_faithfulness(entry.metrics), share=True).split())
        assert utility == wording.DASH
        training = entry.study.training
        assert steps == f"{training.rounds} × {training.steps_per_round}"
        assert seen == wording.number(
            1200 * entry.study.privacy.sampling_rate * entry.study.privacy.views * entry.study.total_steps
        )
        planned = sum(row.figures["flops"].value for row in entry.metrics.forecast if row.phase == "train")
        assert gpu.startswith(" ".join(wording.gpu_time(planned / 0.25e12).split()))
        assert peak.endswith(" ".join(wording.scaled(entry.memory, "B").split()))


def test_the_verdict_names_the_best_of_each_budget_and_way(made: tuple[str, list[Entry]]) -> None:
    said = Page(made[0]).text
    for words in ("equal images seen", "equal GPU-hours"):
        for mode in MODES:
            assert f"At {words}, {mode}: msdm" in said


def test_the_frontier_is_what_nothing_beats() -> None:
    places = [(1.0, 5.0), (2.0, 6.0), (2.0, 3.0), (3.0, 3.5), (4.0, 1.0), (5.0, 2.0)]
    points = [Point("pooled", str(i), "images", x, y) for i, (x, y) in enumerate(places)]
    beaten = {
        p.system for p in points for q in points
        if q is not p and q.seconds <= p.seconds and q.value <= p.value
    }  # fmt: skip
    assert {p.system for p in unbeaten(points)} == {p.system for p in points} - beaten
