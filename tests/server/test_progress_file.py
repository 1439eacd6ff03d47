"""`progress.json`, as somebody sees it who looks while a run goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from polyclinic.common.wire import pack_reply, reply_records
from polyclinic.server.checkpoints import (
    load_record,
    save_checkpoint,
)
from polyclinic.server.progress_file import read_progress
from polyclinic.server.rounds import run_rounds
from tests.server.rounds_home import (
    Sites,
    decoded,
    facts_for,
    hurry,
    moves_by,
    resolved,
    start,
)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def test_progress_says_where_a_run_stands(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, start())
    pages = []

    def looks(message: Message) -> Message:
        pages.append(read_progress(tmp_path))
        return moves_by(1.0)(message)

    def no_end(message: Message) -> Message:
        difference = {name: torch.ones_like(tensor) for name, tensor in decoded(message).items()}
        facts = facts_for(message, epsilon=float("inf"))
        return Message(reply_records(pack_reply(difference, facts)), reply_to=message)

    assert read_progress(tmp_path) is None
    grid = Sites({"x": no_end, "y": looks})
    run_rounds(grid, resolved(quorum=2), tmp_path, expected=["x", "y"])
    first, second, third = pages
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.run, first.round, first.rounds, first.phase) == (tmp_path.name, 1, 3, "training")
    assert (first.quorum, first.min_sites) == (2, 2)
    assert first.sites == {"x": "replied", "y": "asked"}
    assert first.epsilon == {"x": float("inf")}
    assert first.deadline is not None
    assert first.round_started is not None
    assert first.round_started <= first.deadline
    assert (first.seconds_per_round, first.eta_s) == (None, None)
    assert second.epsilon == {"x": float("inf"), "y": 1.5}
    assert second.seconds_per_round is not None
    assert third.eta_s is not None
    assert 0 <= third.eta_s <= 2 * second.seconds_per_round
    last = read_progress(tmp_path)
    assert last is not None
    records = [load_record(tmp_path, number) for number in (1, 2, 3)]
    assert (last.phase, last.round, last.eta_s) == ("finished", 3, 0.0)
    assert last.bytes_down == sum(record.bytes_down for record in records) > first.bytes_down > 0
    assert last.bytes_up == sum(record.bytes_up for record in records)
    assert last.seconds_per_round == pytest.approx(sum(record.seconds for record in records) / 3)
    # A server that goes on counts what was before.
    run_rounds(grid, resolved(quorum=2), tmp_path)
    again = read_progress(tmp_path)
    assert again is not None
    assert (again.bytes_up, again.epsilon) == (last.bytes_up, last.epsilon)


def test_a_server_that_is_told_to_stop_says_so(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, start())

    def told_to_stop(message: Message) -> Message:
        sys.exit(0)

    with pytest.raises(SystemExit):
        run_rounds(Sites({"x": told_to_stop, "y": moves_by(1.0)}), resolved(), tmp_path, expected=["x", "y"])
    last = read_progress(tmp_path)
    assert last is not None
    assert last.phase == "failed: it was stopped"
