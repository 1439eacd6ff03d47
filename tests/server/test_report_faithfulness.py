"""Faithfulness value by value on the page and in the model card: negations apart."""

from __future__ import annotations

import re
from pathlib import Path

from polyclinic.server.evaluation.probe import Faithfulness
from polyclinic.server.report.html import write_report
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.view_faithfulness import value_groups
from tests.server.report_fakes import estimate, faithfulness, fake_run, value_row
from tests.server.report_page import Page, table


def of(metrics: Metrics, found: Faithfulness) -> Metrics:
    last = metrics.rounds[-1].model_copy(update={"faithfulness": found})
    return metrics.model_copy(update={"rounds": [*metrics.rounds[:-1], last]})


def test_every_value_has_its_row_and_negations_stand_apart(tmp_path: Path) -> None:
    found = faithfulness(0.7, 0.7, 0.7)
    # What a constant picture without an instrument looks like: the prompt changes nothing.
    ignored = [
        value_row("no", 1.0).model_copy(update={"otherwise": estimate(1.0, 0.1)}),
        value_row("yes", 0.1).model_copy(update={"shown": None}),
    ]
    one = found.rows[1].model_copy(update={"values": ignored})
    metrics = of(fake_run(tmp_path, last=2), found.model_copy(update={"rows": [found.rows[0], one]}))
    text = write_report(tmp_path, metrics).read_text()
    rows = table(text, "Faithfulness for every value")
    assert [row[0] for row in rows] == [
        "what prompts say is there", "polyp: yes", "instrument: yes", "mean over concepts that can be absent",
        "what prompts say is not there (negations)", "polyp: no", "instrument: no",
        "mean over concepts that can be absent",
    ]  # fmt: skip
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["polyp: yes"] == [
        "100 % 96 to 104 %", "30 % 27 to 33 %", "clear", "94 % 92 to 96 %", "101 % 96 to 106 %",
        "320 images 96 prompts",
    ]  # fmt: skip
    assert by_name["instrument: no"][2] == "not clear"
    assert by_name["instrument: yes"][2:5:2] == ["reversed", "– the probe errs too much"]
    said = "seen in 100 % (95 % interval 95 to 105 %) of the images, and what they say is not there"
    assert said in Page(text).text
    card = (tmp_path / "MODEL_CARD.md").read_text().replace("\u00a0", " ")
    assert "| instrument: no (negation) | 100 % (96 to 104 %) | 100 % (90 to 110 %) |" in card
    assert said in card
    # The concepts' table states its sample size, too.
    assert re.search(r"\| polyp \| 70 % \|.*\| 320 \| 96 \|", card)


def test_many_values_are_folded_and_an_older_run_has_none(tmp_path: Path) -> None:
    found = faithfulness(0.7, 0.7, 0.7)
    many = found.rows[0].model_copy(update={"values": [value_row(f"size {i}", 0.5) for i in range(13)]})
    metrics = fake_run(tmp_path, last=2)
    page = found.model_copy(update={"rows": [many], "presence": None, "absence": None})
    text = write_report(tmp_path, of(metrics, page)).read_text()
    assert "<summary>Every value that prompts ask for</summary>" in text
    assert len(table(text, "Faithfulness for every value")) == 13
    assert "negations" not in text
    older = [row.model_copy(update={"values": []}) for row in found.rows]
    assert value_groups(found.model_copy(update={"rows": older})) == []
