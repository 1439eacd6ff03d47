"""Exact words on the report: how far the audit reached, what a gate said, what stays together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polyclinic.server import cli
from polyclinic.server.evaluation.results import SiteGate
from polyclinic.server.report import wording
from polyclinic.server.report.html import write_report
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.view import epsilon_card
from tests.server.report_fakes import SITES, estimate, fake_run, wider
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


def test_every_public_hash_is_on_the_page_and_in_the_card(run: tuple[Path, Metrics]) -> None:
    folder, metrics = run
    adapted = {"study": {"generator": {"base": "somebody/base", "base_sha256": "ba5e" * 16}}}
    page = Page(write_report(folder, metrics.model_copy(update={"study_json": adapted})).read_text()).text
    card = (folder / "MODEL_CARD.md").read_text()
    hashes = set(re.findall(r'"([0-9a-f]{64})"', (folder / "metrics.json").read_text()))
    assert {f * 16 for f in ("c11b", "fbd0", "e1fe", "d170", "ba5e", "6f3a")} <= hashes
    assert all(found in page for found in hashes)
    # States before the last stand on the page, behind a fold.
    assert all(found in card for found in hashes - {r.state_hash for r in metrics.rounds[:-1]})
    assert 'base_model: "somebody/base"\nbase_model_relation: "adapter"' in card
    assert '"lora"' in card.split("---")[1]
    write_report(*run)
    assert "base_model" not in (folder / "MODEL_CARD.md").read_text()


def test_a_metric_says_what_its_interval_resampled(run: tuple[Path, Metrics]) -> None:
    folder, metrics = run
    last = metrics.rounds[-1]
    assert last.fidelity is not None
    vendi = estimate(9.0, 1.0).model_copy(update={"resampled": {"prompts": 40}, "interval": "over prompts"})
    old = estimate(0.3, 0.1).model_copy(update={"resampled": {}})
    others = last.fidelity.others | {"vendi": vendi, "ms_ssim": old}
    changed = last.model_copy(update={"fidelity": last.fidelity.model_copy(update={"others": others})})
    rounds = [*metrics.rounds[:-1], changed]
    text = write_report(folder, metrics.model_copy(update={"rounds": rounds})).read_text()
    rows = {row[0]: row[-1] for row in reversed(table(text, "Every metric and extractor"))}
    assert rows["KID"] == "96 patients 40 prompts"
    assert rows["Vendi score"] == "40 prompts"
    assert rows["MS-SSIM within a prompt"] == "96"
    assert "Vendi score: over prompts" in Page(text).text
    assert "| 40 prompts |" in (folder / "MODEL_CARD.md").read_text()


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
