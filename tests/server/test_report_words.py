"""Exact words on the report: how far the audit reached, what a gate said, what was resampled, every hash."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polyclinic.server import cli
from polyclinic.server.evaluation.results import SiteGate
from polyclinic.server.report import wording
from polyclinic.server.report.card import front_matter
from polyclinic.server.report.html import write_report
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.view import epsilon_card
from tests.server.report_fakes import SITES, estimate, fake_run, wider
from tests.server.report_page import Page, table

VERDICTS = ("released", "not released", "not asked")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    """An adapter's run: gates without counts, a Vendi score over prompts, an earlier release's MS-SSIM."""
    folder = tmp_path_factory.mktemp("words")
    metrics = wider(fake_run(folder, last=2))
    last = metrics.rounds[-1]
    assert last.fidelity is not None
    vendi = estimate(9.0, 1.0).model_copy(update={"resampled": {"prompts": 40}, "interval": "over prompts"})
    others = {"vendi": vendi, "ms_ssim": estimate(0.3, 0.1).model_copy(update={"resampled": {}})}
    found = last.fidelity.model_copy(update={"others": last.fidelity.others | others})
    metrics = metrics.model_copy(
        update={
            "rounds": [*metrics.rounds[:-1], last.model_copy(update={"fidelity": found})],
            "gates": [SiteGate(site=s, verdict=v) for s, v in zip(SITES, VERDICTS, strict=True)],
            "study_json": {"study": {"generator": {"base": "somebody/base", "base_sha256": "ba5e" * 16}}},
        }
    )
    write_report(folder, metrics)
    return folder, metrics


@pytest.fixture(scope="module")
def text(run: tuple[Path, Metrics]) -> str:
    return (run[0] / "report.html").read_text()


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


def test_a_release_without_a_count_is_not_called_a_veto(text: str) -> None:
    assert {row[0]: row[1:3] for row in table(text, "Leakage gates")} == {
        "north": ["released", "– released without a count"],
        "coast": ["veto: not released", "– no count after a veto"],
        "valley": ["not asked", "– not asked"],
    }
    assert "veto: not released" in next(row for row in table(text, "Sites") if row[0] == "coast")


def test_every_public_hash_is_on_the_page_and_in_the_card(run: tuple[Path, Metrics], text: str) -> None:
    folder, metrics = run
    page, card = Page(text).text, (folder / "MODEL_CARD.md").read_text()
    hashes = set(re.findall(r'"([0-9a-f]{64})"', (folder / "metrics.json").read_text()))
    assert {f * 16 for f in ("c11b", "fbd0", "e1fe", "d170", "ba5e", "6f3a")} <= hashes
    listed = page.partition("Public hashes (SHA-256)")[2].partition("The resolved study, in full")[0]
    assert all(found in listed for found in hashes)
    # States before the last stand on the page alone, behind a fold.
    assert all(found in card for found in hashes - {r.state_hash for r in metrics.rounds[:-1]})


def test_an_adapters_card_names_its_base(run: tuple[Path, Metrics]) -> None:
    card = (run[0] / "MODEL_CARD.md").read_text().split("---")[1]
    assert 'base_model: "somebody/base"\nbase_model_relation: "adapter"' in card
    assert '"lora"' in card
    own = front_matter(run[1].model_copy(update={"study_json": {}}))
    assert "base_model" not in own
    assert "lora" not in own


def test_a_metric_says_what_its_interval_resampled(run: tuple[Path, Metrics], text: str) -> None:
    rows = {row[0]: row[-1] for row in reversed(table(text, "Every metric and extractor"))}
    assert rows["KID"] == "96 patients 40 prompts"
    assert rows["Vendi score"] == "40 prompts"
    assert rows["MS-SSIM within a prompt"] == "96"
    assert "Vendi score: over prompts" in Page(text).text
    assert "| 320 | 40 prompts |" in (run[0] / "MODEL_CARD.md").read_text()


def test_a_number_never_parts_from_its_unit(text: str) -> None:
    values = (0.0005, 3.2, 95.0, 700.0, 9e4, 4e5, 3.1e13)
    writers = (wording.seconds, wording.gpu_time, wording.energy, lambda v: wording.scaled(v, "B"))
    assert not any(" " in write(value) for write in writers for value in values)
    card = next(c for c in text.split("<article")[1:] if "Cost (" in c)
    assert '<p class="figure">6.26 <small>min</small>' in card
    assert "104 MB" in Page(text).text
    assert "104 MB" not in text


def test_a_page_that_goes_on_and_files_that_do_not_are_two_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", "any", "--watch", "--tensorboard", str(tmp_path)]) == 2
    assert "--tensorboard writes its files once" in capsys.readouterr().err
