"""The verdict where little is known: a floor that may be zero, and no fidelity at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyclinic.server.evaluation.estimate import too_few_images
from polyclinic.server.report.html import write_report
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.verdict import headline, verdict
from tests.server.report_fakes import fake_run
from tests.server.report_page import Page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    folder = tmp_path_factory.mktemp("run")
    return folder, fake_run(folder, last=2)


def test_verdict_beside_a_floor_that_may_be_zero(run: tuple[Path, Metrics]) -> None:
    metrics = run[1]
    last = metrics.rounds[-1]
    assert last.fidelity is not None
    clear = [headline(metrics), *verdict(metrics)]
    assert any("Real images are closer to each other than these are to them" in said for said in clear)
    noise = {"floor": 0.00768, "floor_low": -0.0216, "floor_high": 0.037, "ratio": None}

    def said_of(**changes: float) -> tuple[str, str]:
        assert last.fidelity is not None
        kid = last.fidelity.kid.model_copy(update=noise | changes)
        noisy = last.model_copy(update={"fidelity": last.fidelity.model_copy(update={"kid": kid})})
        changed = metrics.model_copy(update={"rounds": [*metrics.rounds[:-1], noisy]})
        return headline(changed), " ".join(verdict(changed))

    # 0.034 to 0.052 lies above zero, yet not above what the floor may be.
    opening, said = said_of()
    assert "whether by more than real ones do among themselves cannot be told with this reference" in said
    assert "0.00768 (95 % interval −0.0216 to 0.037, which cannot be told from zero)" in said
    assert "can still be told apart from them" in opening
    opening, said = said_of(low=-0.01)
    assert "the images cannot be told apart from real ones at this sample size: two patient-disjoint" in said
    assert "cannot be told apart from them at this sample size" in opening
    assert "Real images are closer to each other" in said_of(low=0.0371)[1]


def test_why_there_is_no_fidelity_is_said_in_verdict_limits_and_card(run: tuple[Path, Metrics]) -> None:
    why = too_few_images(30, 400)
    rounds = [
        r.model_copy(update={"fidelity": None, "no_fidelity": why * r.evaluated}) for r in run[1].rounds
    ]
    metrics = run[1].model_copy(update={"rounds": rounds})
    page = Page(write_report(run[0], metrics).read_text())
    assert page.text.count("there are 30 drawn in one evaluation") >= 2
    assert why in (run[0] / "MODEL_CARD.md").read_text()
    assert "How close the images are to real ones was not measured; they follow" in headline(metrics)
    assert "balanced accuracy" in " ".join(verdict(metrics))  # what was measured is still told
