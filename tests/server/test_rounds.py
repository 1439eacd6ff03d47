"""The round loop against sites that refuse, break, send nonsense, come late or never answer."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.common.constant import ErrorCode
from safetensors.torch import load_file

from polyclinic.common.generators.public import hash_state
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.wire import pack_reply, reply_records
from polyclinic.common.wire_reading import read_order
from polyclinic.server.checkpoints import (
    Checkpoint,
    RoundRecord,
    load_checkpoint,
    rounds_done,
    save_checkpoint,
)
from polyclinic.server.progress_file import read_progress
from polyclinic.server.rounds import run_rounds
from polyclinic.server.spool import spool_path
from tests.server.rounds_home import (
    FACTS,
    Sites,
    facts_for,
    fails,
    hurry,
    moves_by,
    one_round,
    refuses,
    resolved,
    sends_other_shapes,
    start,
    start_state,
)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def test_the_state_moves_by_the_mean_difference(tmp_path: Path) -> None:
    after = one_round(tmp_path, Sites({"x": moves_by(1.0), "y": moves_by(3.0)}))
    assert torch.equal(after.state["a"], torch.full((3,), 2.0))
    assert sorted(after.record.replied) == ["x", "y"]
    assert after.record.replied["x"]["epsilon"] == 1.5
    assert after.record.bytes_up > 2 * 7 * 2
    assert after.record.state_hash == hash_state(after.state)


@pytest.mark.parametrize("transport", ["bf16", "fp32", "int8"])
def test_the_server_keeps_fp32_whatever_travels(tmp_path: Path, transport: Any) -> None:
    """What bf16 cannot write stays in the server's own state; both sides name what was sent alike."""
    seen: set[str] = set()

    def still(message: Message) -> Message:
        state = read_order(message.content)[1](transport)
        seen.add(hash_state(state))
        difference = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        return Message(
            reply_records(pack_reply(difference, facts_for(message), transport=transport)), reply_to=message
        )

    fine = {"a": torch.full((3,), 0.1), "b": torch.full((2, 2), 1e-3)}
    save_checkpoint(tmp_path, Checkpoint(RoundRecord(round=0, state_hash=hash_state(fine)), fine, fine))
    run_rounds(Sites({"x": still, "y": still}), resolved(transport=transport), tmp_path)
    after = load_checkpoint(tmp_path, 3)
    assert all(torch.equal(after.state[name], tensor) for name, tensor in fine.items())
    assert seen == {after.record.sent_hash}
    assert (after.record.sent_hash == after.record.state_hash) == (transport == "fp32")


def test_refusals_and_nonsense_are_recorded_by_site_and_code(tmp_path: Path) -> None:
    def lies_about_a_hash(message: Message) -> Message:
        reply = moves_by(1.0)(message)
        reply.content["hashes"]["b"] = "0" * 64
        return reply

    def invents_names(message: Message) -> Message:
        difference = {**start_state(), "<b>\n" + 1000 * "é": torch.zeros(1)}
        return Message(reply_records(pack_reply(difference, facts_for(message))), reply_to=message)

    def of_another_study(message: Message) -> Message:
        facts = dataclasses.replace(facts_for(message), study_hash="c" * 64)
        return Message(reply_records(pack_reply(start_state(), facts)), reply_to=message)

    grid = Sites(
        {
            "good": moves_by(1.0),
            "fine": moves_by(1.0),
            "spent": refuses,
            "broken": fails(ErrorCode.CLIENT_APP_RAISED_EXCEPTION),
            "nan": moves_by(float("nan")),
            "shape": sends_other_shapes,
            "huge": moves_by(1e3),
            "changed": lies_about_a_hash,
            "names": invents_names,
            "other": of_another_study,
        }
    )
    after = one_round(tmp_path, grid)
    record = after.record
    assert torch.equal(after.state["a"], torch.ones(3))
    assert record.refused == {"spent": "1003 budget-exhausted", "broken": "1014 site-fault"}
    names = record.rejected.pop("names")
    assert names.startswith("1012 bad-state: names differ")
    assert names.isascii()
    assert len(names) < 250
    assert "\n" not in names
    assert record.rejected.pop("huge").startswith("1050 implausible-norm: 2.65e+03, at most ")
    assert record.rejected == {
        "nan": "1012 bad-state: a is not finite",
        "shape": "1012 bad-state: a has shape (4,)",
        "changed": "1051 hash-mismatch: b",
        "other": "1011 bad-message: its study_hash is not this round's",
    }
    assert "private" not in record.model_dump_json()
    assert set(record.refusals) == {"spent", "broken", "nan", "shape", "changed", "other"}
    progress = read_progress(tmp_path)
    assert progress is not None
    assert progress.sites["spent"] == "refused: 1003 budget-exhausted"
    assert progress.sites["nan"] == "rejected: 1012 bad-state: a is not finite"
    # A site's own no is final: nobody is asked twice.
    assert sorted(site for site, _ in grid.asked) == sorted({site for site, _ in grid.asked})


def test_one_hospital_alone_is_never_released(tmp_path: Path) -> None:
    grid = Sites({"only": moves_by(1.0), "spent": refuses})
    with pytest.raises(Refusal, match="too-few-replies") as caught:
        one_round(tmp_path, grid, resolved(min_sites=2, deadline_s=3600.0))
    assert "spent" in str(caught.value)
    progress = read_progress(tmp_path)
    assert progress is not None
    assert progress.phase.startswith("failed: refused [1018 too-few-replies]")


def test_sites_that_never_answer_or_never_come_are_absent_by_name(tmp_path: Path) -> None:
    grid = Sites({"x": moves_by(1.0), "y": moves_by(1.0), "gone": moves_by(9.0)})
    grid.lost = {"gone"}
    after = one_round(tmp_path, grid, resolved(deadline_s=0.5), expected=["gone", "never", "x", "y"])
    assert after.record.absent == ["gone", "never"]
    assert torch.equal(after.state["a"], torch.ones(3))
    progress = read_progress(tmp_path)
    assert progress is not None
    assert progress.sites == {"gone": "absent", "never": "absent", "x": "replied", "y": "replied"}


def test_a_quorum_starts_the_grace_period(tmp_path: Path) -> None:
    grid = Sites({"x": moves_by(1.0), "y": moves_by(1.0), "gone": moves_by(9.0)})
    grid.lost = {"gone"}
    # With a deadline of an hour, only the quorum can end this round.
    study = resolved(deadline_s=3600.0, quorum=2, grace_s=0.3)
    after = one_round(tmp_path, grid, study, expected=["gone", "never", "x", "y"])
    assert after.record.absent == ["gone", "never"]
    assert 0.3 <= after.record.seconds < 60


def test_a_run_goes_on_after_its_last_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, start())
    kept = (tmp_path / "checkpoints" / "round-0000" / "state.safetensors").read_bytes()
    seen: list[int] = []

    def stop_after_two(checkpoint: Checkpoint) -> None:
        seen.append(checkpoint.record.round)
        if seen == [1, 2]:
            raise KeyboardInterrupt

    grid = Sites({"x": moves_by(1.0), "y": moves_by(1.0)})
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, resolved(), tmp_path, after_round=stop_after_two)
    spool_path(tmp_path, 3, "left by a killed server").write_bytes(b"half")
    run_rounds(grid, resolved(), tmp_path, after_round=stop_after_two)
    assert seen == [1, 2, 3]
    assert rounds_done(tmp_path) == [0, 1, 2, 3]
    assert not (tmp_path / "spool").exists()
    assert torch.equal(load_checkpoint(tmp_path, 3).state["a"], torch.full((3,), 3.0))
    # Working in place never writes into the file that a state was read from.
    assert (tmp_path / "checkpoints" / "round-0000" / "state.safetensors").read_bytes() == kept


def test_a_full_disk_ends_the_round_and_loses_nothing(tmp_path: Path) -> None:
    spool = tmp_path / "spool" / "round-0001"
    spool.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(spool)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root with the right to mount")
    large = {"a": torch.zeros(100_000)}
    save_checkpoint(tmp_path, Checkpoint(RoundRecord(round=0, state_hash=hash_state(large)), large, large))
    grid = Sites({"x": moves_by(1.0), "y": moves_by(1.0)})
    try:
        with pytest.raises(BadInput, match=r"spool/round-0001/x\.safetensors.*free space"):
            run_rounds(grid, resolved(), tmp_path)
        assert list(spool.iterdir()) == []
    finally:
        subprocess.run(["umount", spool], check=True)
    progress = read_progress(tmp_path)
    assert progress is not None
    assert progress.phase.startswith("failed: cannot write")
    assert rounds_done(tmp_path) == [0]
    run_rounds(grid, resolved(), tmp_path)
    assert rounds_done(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("transport", "rule"),
    [("bf16", "median"), pytest.param("fp32", "mean", marks=pytest.mark.long)],
)
def test_memory_does_not_grow_with_the_sites(tmp_path: Path, transport: str, rule: str) -> None:
    """16 sites and a state of 50 MB: three fp32 states and one serialized reply, and 12 MB beside them.

    glibc is told to give freed arrays back: else the peak counts what it keeps, now more, now less.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.rounds_memory", tmp_path, transport, rule],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    state, reply, peak = (float(word) for word in done.stdout.split())
    print(f"{transport} {rule}: {(peak - reply) / state:.2f} states and a reply of {reply / state:.2f}")
    assert peak < 3 * state + reply + 12e6


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path) -> None:
    """A write that fails half-way leaves no round behind."""
    save_checkpoint(tmp_path, start())
    torn = Checkpoint(RoundRecord(round=1, state_hash="x"), start_state(), {"a": torch.zeros(3).to_sparse()})
    with pytest.raises(Exception, match=r"sparse|contiguous|layout"):
        save_checkpoint(tmp_path, torn)
    assert rounds_done(tmp_path) == [0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-0000"]


def test_a_checkpoint_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    state = {"z": torch.randn(3, 4), "a": torch.tensor(0.3), "m": torch.randn(2_000_001)}
    save_checkpoint(tmp_path, Checkpoint(RoundRecord(round=0, state_hash="x"), state, state))
    read = load_file(tmp_path / "checkpoints" / "round-0000" / "average.safetensors")
    assert hash_state(read) == hash_state(state)


def test_a_private_reply_survives_the_record(tmp_path: Path) -> None:
    facts = dataclasses.asdict(dataclasses.replace(FACTS, epsilon=float("inf"), clip=float("inf")))
    record = RoundRecord(round=0, state_hash="x", replied={"a": facts})
    save_checkpoint(tmp_path, Checkpoint(record, start_state(), start_state()))
    assert float(load_checkpoint(tmp_path, 0).record.replied["a"]["epsilon"]) == float("inf")


def test_a_record_of_an_older_run_can_be_read() -> None:
    record = RoundRecord.model_validate({"round": 1, "state_hash": "x", "refused": {"a": "1003"}})
    assert (record.rejected, record.sent_hash, record.refusals) == ({}, "", {"a": "1003"})
