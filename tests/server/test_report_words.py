"""Exact words on the report: how far the audit reached, what a gate said, what stays together."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyclinic.server import cli
from polyclinic.server.evaluation.results import SiteGate
from polyclinic.server.report import wording
from polyclinic.server.report.html import write_report
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.view import epsilon_card
from tests.server.report_fakes import SITES, fake_run, wider
from tests.server.report_page import Page, table

VERDICTS = ("released", "not released", "not asked")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    folder = tmp_path_factory.mktemp("words")
    return folder, wider(fake_run(folder, last=2))


def test_the_card_says_how_many_sites_were_audited_and_whether_coins_are_out(
    run: tuple[Path, Metrics],
) -> None:
    metrics = run[1]

    def said(sites: int, *, revealed: bool) -> list[str]:
        entries = [a.model_copy(update={"revealed": revealed}) for a in metrics.audit[:sites]]
        return epsilon_card(metrics.model_copy(update={"audit": entries})).lines

    assert "audited at 3 of 3 sites: the noise is as claimed" in said(3, revealed=True)
    assert "audited at 1 of 3 sites so far: the noise is as claimed" in said(1, revealed=False)
    assert "not audited" in said(0, revealed=True)


def test_a_release_without_a_count_is_not_called_a_veto(run: tuple[Path, Metrics]) -> None:
    folder, metrics = run
    gates = [SiteGate(site=s, verdict=v) for s, v in zip(SITES, VERDICTS, strict=True)]
    text = write_report(folder, metrics.model_copy(update={"gates": gates})).read_text()
    rows = {row[0]: row[1:3] for row in table(text, "Leakage gates")}
    assert rows == {
        "north": ["released", "– released without a count"],
        "coast": ["veto: not released", "– veto: not released"],
        "valley": ["not asked", "– not asked"],
    }
    assert "veto: not released" in next(row for row in table(text, "Sites") if row[0] == "coast")


def test_a_number_never_parts_from_its_unit(run: tuple[Path, Metrics]) -> None:
    values = (0.0005, 3.2, 95.0, 700.0, 9e4, 4e5, 3.1e13)
    writers = (wording.seconds, wording.gpu_time, wording.energy, lambda v: wording.scaled(v, "B"))
    assert not any(" " in write(value) for write in writers for value in values)
    text = write_report(*run).read_text()
    card = next(c for c in text.split("<article")[1:] if "Cost (" in c)
    assert '<p class="figure">6.26 <small>min</small>' in card
    assert "104 MB" in Page(text).text
    assert "104 MB" not in text


def test_a_page_that_goes_on_and_files_that_do_not_are_two_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", "any", "--watch", "--tensorboard", str(tmp_path)]) == 2
    assert "--tensorboard writes its files once" in capsys.readouterr().err
