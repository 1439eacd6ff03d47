"""The coordinator asks for extra releases over a real grid: who sent, who refused, who never came."""

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from polyclinic.client.app import app
from polyclinic.client.ledger_books import create_ledger
from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.wire import ReleaseFacts
from polyclinic.server import collect as collecting
from polyclinic.server.collect import collect, missing, read_collected, read_sums
from polyclinic.server.progress_file import Board, read_progress
from polyclinic.simulation.grid import InProcessGrid, _identify

ASKS = {"fidelity_epsilon": 1.0, "fourier_features": 64}


@pytest.fixture
def site(make_site: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(collecting, "NAMES_S", 0.02)
    monkeypatch.setattr(collecting, "ASK_AGAIN_S", 0.05)
    return make_site(releases=ASKS, privacy={"canaries": 0}, federation={"deadline_s": 60.0, "grace_s": 0.1})


def test_releases_refusals_and_absences_are_kept_by_name(site: Any, tmp_path: Path) -> None:
    site.approve()
    stranger = tmp_path / "site-b"
    stranger.mkdir()
    (stranger / "policy.toml").write_text((site.home / "policy.toml").read_text())
    create_ledger(stranger, "site-b", simulated=True)
    run_dir, expected = tmp_path / "run", ["site-a", "site-b", "site-c"]
    run_dir.mkdir()

    def run(client: Any = app) -> None:
        _identify(1)
        grid = InProcessGrid([site.home, stranger], client)
        with Board(run_dir, site.resolved) as board:
            collect(grid, site.resolved, run_dir, board, expected=expected)

    run()
    found = read_collected(run_dir, "fidelity")
    assert list(found.replied) == ["site-a"]
    assert found.refused == {"site-b": "1001 not-approved"}
    assert found.absent == ["site-c"]
    ((total, facts),) = read_sums(run_dir, "fidelity").values()
    assert total.shape == (65,)
    assert isinstance(facts, ReleaseFacts)
    assert facts.study_hash == site.resolved.hash
    progress = read_progress(run_dir)
    assert progress is not None
    assert progress.phase == "finished"
    assert progress.sites["site-c"] == "absent"
    assert missing(site.resolved, run_dir, expected) == ["fidelity"]
    assert missing(site.resolved, run_dir, ["site-a"]) == []

    # Again, after a crash of the server: who has answered is not asked, and nothing is spent twice.
    before, asked = (site.home / "ledger.jsonl").read_bytes(), []

    def listening(message: Message, context: Context) -> Message:
        asked.append(Path(str(context.node_config["home"])).name)
        return app(message, context)

    run(listening)
    assert asked == ["site-b"]
    assert (site.home / "ledger.jsonl").read_bytes() == before
    assert list(read_sums(run_dir, "fidelity")) == ["site-a"]
    (run_dir / "releases" / "fidelity.json").unlink()
    (run_dir / "releases" / "fidelity.safetensors").unlink()
    run()
    assert json.loads((run_dir / "releases" / "fidelity.json").read_text())["replied"]["site-a"]
    assert bool((read_sums(run_dir, "fidelity")["site-a"][0] == total).all())  # the stored bytes
    assert [line["kind"] for line in read_lines(site.home)][2:] == ["reserve", "settle"]


def test_what_is_no_answer_is_thrown_away_by_name(site: Any, tmp_path: Path) -> None:
    site.approve()

    def liar(message: Message, context: Context) -> Message:
        reply = app(message, context)
        reply.content["facts"]["study_hash"] = "0" * 64
        return reply

    _identify(1)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Board(run_dir, site.resolved) as board:
        collect(InProcessGrid([site.home], liar), site.resolved, run_dir, board, expected=["site-a"])  # type: ignore[arg-type]
    found = read_collected(run_dir, "fidelity")
    assert not found.replied
    assert found.refused["site-a"].startswith("thrown away: 1011 bad-message")
