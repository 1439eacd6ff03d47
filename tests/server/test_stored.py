"""Runs that another release wrote end in a working page, or in one sentence with file, field and fix."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyclinic.common.refusals import BadInput
from polyclinic.server import cli
from polyclinic.server.app import load_resolved
from polyclinic.server.checkpoints import Checkpoint, RoundRecord, save_checkpoint
from polyclinic.server.cost_record import cost_lines, gather
from polyclinic.server.evaluation.judge import judgement_path, read_judgement
from polyclinic.server.evaluation.measure import Judgement
from polyclinic.server.plan_cost import kept_speed
from polyclinic.server.report.html import read_metrics, write_report
from polyclinic.server.report.verdict import beside_floor
from tests.conftest import MakeStudy
from tests.server.report_fakes import begun_run, fake_run, wider

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def run_dir(tmp_path: Path, make_study: MakeStudy) -> Path:
    """A run that was only begun."""
    folder = begun_run(tmp_path, make_study(privacy={"enabled": False}))
    save_checkpoint(folder, Checkpoint(RoundRecord(round=0, state_hash="0" * 64), {}, {}))
    return folder


def _change(path: Path, change: Change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("command", ["report", "export"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda v: v["study"]["training"].update(turbo=1),
            "a field `study.training.turbo` that",
        ),
        (lambda v: v.pop("start_hash"), "lacks the field `start_hash`"),
        (
            lambda v: v["study"]["data"].update(image_size="big"),
            "its field `study.data.image_size`",
        ),
    ],
)
def test_a_study_of_another_release_ends_in_a_sentence(
    run_dir: Path, capsys: pytest.CaptureFixture[str], command: str, change: Change, said: str
) -> None:
    _change(run_dir / "study.json", change)
    asked = [command, str(run_dir), "--home", str(run_dir.parent.parent)]
    asked += ["--out", str(run_dir / "out")] * (command == "export")
    assert cli.main(asked) == 2
    error = capsys.readouterr().err
    assert str(run_dir / "study.json") in error
    assert said in error
    assert error.rstrip().endswith("use that release, or run the study anew")
    assert len(error.splitlines()) == 1


def test_a_damaged_file_is_said_to_be_damaged(run_dir: Path) -> None:
    path = judgement_path(run_dir, 0)
    path.parent.mkdir()
    path.write_text('{"round": 0, "col')
    with pytest.raises(BadInput, match=r"round-0000\.json: it is no JSON.*the round is judged again"):
        read_judgement(run_dir, 0)


LINE = {"phase": "evaluate", "round": 1, "wall_s": 1, "cpu_s": 1, "peak_bytes": 9, "energy_j": 2,
        "energy_source": "guess"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"round": None}, r"line 2: a line of evaluate has no `round`"),
        ({"wall_s": -1}, r"line 2: field `wall_s`: input should be greater than or equal to 0, not -1"),
        ({"energy_j": "much"}, r"line 2: field `energy_j`: input should be a valid number"),
        ({"phase": None}, r"line 2: field `phase`"),
    ],
)
def test_a_cost_line_that_lacks_what_a_report_needs_is_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "cost.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (LINE, LINE | change)) + '{"phase": "to')
    with pytest.raises(BadInput, match=rf"cost\.jsonl, {said}.*; restore the file or remove the line"):
        cost_lines(path)
    path.write_text(json.dumps(LINE) + '\n{"phase": "to')  # a crash tore the last one
    assert cost_lines(path) == [LINE]


def test_torn_figures_of_base_and_machine_end_in_a_sentence(run_dir: Path) -> None:
    resolved = load_resolved(run_dir)
    for name, read in (
        ("base_costs.json", lambda: gather(run_dir, resolved, [], 0.0)),
        ("speed.json", lambda: kept_speed(run_dir)),
    ):
        for text, why in (('[{"phase": "pre', "it is no JSON"), ("[1]", "not what this release writes")):
            (run_dir / name).write_text(text)
            with pytest.raises(BadInput, match=rf"{name}: .*{why}.*; remove that file: "):
                read()


def test_what_an_earlier_release_measured_is_shown_as_that(tmp_path: Path) -> None:
    """Near copies were once counted in drawn images; the page must not call those patients."""
    write_report(tmp_path, wider(fake_run(tmp_path, last=4)))

    def forget(values: dict[str, Any]) -> None:
        for facts in values["rounds"]:
            del facts["no_fidelity"]
            for near in facts["near_copies"]:
                del near["images"]
            for fidelity in [facts["fidelity"]] * bool(facts["fidelity"]):
                del fidelity["kid"]["floor_low"], fidelity["kid"]["floor_high"]

    _change(tmp_path / "metrics.json", forget)
    again = read_metrics(tmp_path / "metrics.json")
    final = again.rounds[-1].fidelity
    assert final is not None
    assert (final.kid.floor_low, beside_floor(final.kid)) == (None, "above")  # the floor, as it was told then
    (old,) = {near.images for facts in again.rounds for near in facts.near_copies}
    assert old is None
    write_report(tmp_path, again)
    page = (tmp_path / "report.html").read_text()
    assert "drawn images are nearer to a public image than public patients lie to each other" in page
    assert "public patients whom the start has seen a drawn image comes nearer" not in page
    # A judgement has the same field, and is what a report is written from.
    near = json.loads((tmp_path / "metrics.json").read_text())["rounds"][-1]["near_copies"]
    judged = Judgement.model_validate(
        {"round": 4, "columns": 2, "fidelity": None, "faithfulness": None, "near_copies": near}
    )
    assert judged.near_copies[0].images is None
