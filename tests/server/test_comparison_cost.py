"""The comparison's prices: what every arm paid before its first round is said, and not taken for learning."""

from pathlib import Path

from polyclinic.server.report import wording
from polyclinic.server.report.comparison import arm_row, write_comparison
from polyclinic.server.report.costs import entry, figure
from polyclinic.server.report.metrics import Metrics
from tests.server.report_fakes import fake_run
from tests.server.report_page import Page

CACHES = 3 * 12.8  # of the made-up run's sites, CPU seconds


def _arm(folder: Path, name: str, public_s: float) -> Metrics:
    folder.mkdir()
    metrics = fake_run(folder, last=4, name=f"demo-{name}", title=f"Phantoms: {name}")
    pretrained = entry("pretrain", "server", cpu_s=figure(public_s, "measured"))
    return metrics.model_copy(update={"cost": [pretrained, *metrics.cost]})


def test_a_level_that_the_start_has_is_priced_at_what_came_before(tmp_path: Path) -> None:
    arm = _arm(tmp_path / "a", "a", 60)
    kids = {r.round: r.fidelity.kid.value for r in arm.rounds if r.fidelity}
    easy = arm_row("", "", arm, "", kids[0])
    assert (easy.price, easy.price_round) == (wording.quantity(60 + CACHES, "s"), "the start has it")
    first = min(number for number, kid in kids.items() if kid <= kids[2])
    assert arm_row("", "", arm, "", kids[2]).price_round == f"round {first}"
    never = arm_row("", "", arm, "", min(kids.values()) / 2)
    assert (never.price, never.price_round) == ("not reached", "")


def test_what_public_parts_took_is_said(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    equal = [_arm(folder, folder.name, 60) for folder in folders]
    text = Page(write_comparison(tmp_path / "x.html", equal, folders).read_text()).text
    assert "CPU time holds what training the public parts took: in every arm, 60 s." in text
    spent = equal[1].cost[0].model_copy(update={"figures": {"cpu_s": figure(90, "measured")}})
    other = equal[1].model_copy(update={"cost": [spent, *equal[1].cost[1:]]})
    text = Page(write_comparison(tmp_path / "y.html", [equal[0], other], folders).read_text()).text
    assert "took: in a 60 s and in b 90 s." in text
