"""PRIVACY.md, rules 8 to 11: spend before touching, never twice for one release, never under-report."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.ledger import Ledger, create_ledger, line_hash, open_ledger, read_lines
from polyclinic.common.files import canonical_json
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.refusals import Refusal

SIGMA, RATE, STEPS = 1.0, 0.1, 10
STATE = "5" * 64


def new(
    folder: Path, approvals: tuple[str, ...] = ("a",), *, epsilon: float = 5.0, total: int = 1000
) -> Path:
    folder.mkdir(exist_ok=True)
    create_ledger(folder, "site", simulated=True)
    with open_ledger(folder) as ledger:
        for approval in approvals:
            earmark(ledger, approval, epsilon, total)
    return folder


def earmark(ledger: Ledger, approval: str, epsilon: float, total: int = 1000, cap: float = 10.0) -> None:
    ledger.earmark(
        approval=approval,
        study="s",
        sigma=SIGMA,
        rate=RATE,
        steps=total,
        delta=1e-5,
        epsilon=epsilon,
        cap=cap,
    )


def reserve(ledger: Ledger, number: int, **changes: Any) -> Any:
    values = {"approval": "a", "round_number": number, "state": STATE, "sigma": SIGMA, "rate": RATE}
    return ledger.reserve(**{**values, "steps": STEPS, "tau": 1e-4, **changes})


def kinds(folder: Path) -> list[str]:
    return [line["kind"] for line in read_lines(folder)]


def answer(folder: Path, number: int, state: str = STATE) -> bytes:
    """A round as `client/training.py` does it, with random bytes for a reply."""
    with open_ledger(folder) as ledger:
        stored = ledger.stored_reply("a", number, state)
        if stored is not None:
            reply = stored.read_bytes()
            ledger.note_settled("a", number, reply)
            return reply
        reserve(ledger, number, state=state)
        ledger.settle("a", number, os.urandom(3000))
        return ledger.reply_path("a", number).read_bytes()


def test_order_is_reserve_then_store_then_settle(tmp_path: Path) -> None:
    home = new(tmp_path)
    with open_ledger(home) as ledger:
        place = reserve(ledger, 1)
        assert kinds(home) == ["open", "earmark", "reserve"]
        assert not ledger.reply_path("a", 1).exists()
        path = ledger.settle("a", 1, b"reply")
    lines = read_lines(home)
    assert [line["kind"] for line in lines] == ["open", "earmark", "reserve", "settle"]
    assert lines[2]["tau"] == 1e-4
    assert (place.sequence, place.hash, place.reused) == (2, lines[2]["hash"], False)
    assert lines[3]["reply"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o600


def test_reservation_is_on_disk_before_it_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = new(tmp_path)
    real, synced = os.fsync, []

    def fsync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with open_ledger(home) as ledger:
        reserve(ledger, 1)
    assert synced[0] == "ledger.jsonl"


def test_asked_again_gives_the_stored_bytes_and_costs_nothing(tmp_path: Path) -> None:
    home = new(tmp_path)
    first = answer(home, 1)
    before = (home / "ledger.jsonl").read_bytes()
    assert answer(home, 1) == first
    assert (home / "ledger.jsonl").read_bytes() == before


def test_other_state_is_refused_and_not_charged(tmp_path: Path) -> None:
    home = new(tmp_path)
    answer(home, 1)
    before = (home / "ledger.jsonl").read_bytes()
    with pytest.raises(Refusal, match="round-already-answered"):
        answer(home, 1, "6" * 64)
    assert (home / "ledger.jsonl").read_bytes() == before


def test_epsilon_is_that_of_everything_reserved_settled_or_not(tmp_path: Path) -> None:
    home = new(tmp_path)
    answer(home, 1)
    with open_ledger(home) as ledger:
        reserve(ledger, 2)
        reserve(ledger, 3)
        ledger.fail("a", 3)
        assert ledger.history("a") == ((SIGMA, RATE, 3 * STEPS),)
        assert ledger.epsilon("a") == claim(((SIGMA, RATE, 3 * STEPS),), 1e-5)


def test_failed_attempt_stays_spent_and_killed_one_is_reused(tmp_path: Path) -> None:
    home = new(tmp_path)
    with open_ledger(home) as ledger:
        first = reserve(ledger, 1)
    with open_ledger(home) as ledger:
        again = reserve(ledger, 1)
        assert (again.reused, again.sequence, again.hash) == (True, first.sequence, first.hash)
        ledger.fail("a", 1)
        with pytest.raises(Refusal, match="round-already-answered"):
            reserve(ledger, 1)
        assert ledger.history("a") == ((SIGMA, RATE, STEPS),)


def test_schedule_noise_and_rate_of_the_approval_cannot_be_left(tmp_path: Path) -> None:
    home = new(tmp_path, total=25)
    with open_ledger(home) as ledger:
        for change in ({"sigma": 0.99}, {"rate": 0.11}, {"steps": 26}):
            with pytest.raises(Refusal, match="budget-exhausted"):
                reserve(ledger, 1, **change)
        reserve(ledger, 1)
        reserve(ledger, 2)
        with pytest.raises(Refusal, match="budget-exhausted"):
            reserve(ledger, 3)
        ledger.close("a")
        ledger.close("a")
        with pytest.raises(Refusal, match="budget-exhausted"):
            reserve(ledger, 3, steps=1)
    assert kinds(home) == ["open", "earmark", "reserve", "reserve", "close"]


def test_cap_counts_open_studies_whole_and_closed_ones_as_spent(tmp_path: Path) -> None:
    home = new(tmp_path, epsilon=6.0)
    with open_ledger(home) as ledger:
        with pytest.raises(Refusal, match="budget-exhausted"):
            earmark(ledger, "b", 4.1)
        reserve(ledger, 1)
        ledger.close("a")
        spent = claim(((SIGMA, RATE, STEPS),), 1e-5)
        assert ledger.committed() == spent
        with pytest.raises(Refusal, match="budget-exhausted"):
            earmark(ledger, "b", 10.001 - spent)
        earmark(ledger, "b", 9.999 - spent)
    assert kinds(home) == ["open", "earmark", "reserve", "close", "earmark"]


@pytest.mark.parametrize("closed", [False, True])
def test_no_private_study_after_one_that_was_not(tmp_path: Path, closed: bool) -> None:
    home = new(tmp_path, epsilon=float("inf"))
    assert read_lines(home)[1]["epsilon"] == "inf"
    with open_ledger(home) as ledger:
        reserve(ledger, 1)
        assert ledger.epsilon("a") == float("inf")
        if closed:
            ledger.close("a")
        with pytest.raises(Refusal, match="budget-exhausted"):
            earmark(ledger, "b", 0.1, cap=1e9)
        earmark(ledger, "c", float("inf"))


def test_missing_ledger_is_refused_never_started_afresh(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="ledger-missing"), open_ledger(tmp_path):
        pass
    home = new(tmp_path / "home")
    (home / "ledger.jsonl").unlink()
    for act in (lambda: create_ledger(home, "site", simulated=True), lambda: answer(home, 1)):
        with pytest.raises(Refusal, match="ledger-missing"):
            act()
    (home / "ledger.head").unlink()
    (home / "approvals").mkdir()
    with pytest.raises(Refusal, match="ledger-missing"):
        create_ledger(home, "site", simulated=True)


def test_creating_twice_changes_nothing(tmp_path: Path) -> None:
    home = new(tmp_path)
    before = (home / "ledger.jsonl").read_bytes()
    create_ledger(home, "site", simulated=True)
    assert (home / "ledger.jsonl").read_bytes() == before


def edit(number: int, **values: Any) -> Callable[[list[bytes]], list[bytes]]:
    def change(lines: list[bytes]) -> list[bytes]:
        lines[number] = canonical_json({**json.loads(lines[number]), **values})
        return lines

    return change


def rehash(lines: list[bytes]) -> list[bytes]:
    line = {**json.loads(lines[2]), "steps": 1}
    lines[2] = canonical_json({**line, "hash": line_hash(line)})
    return lines


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (edit(2, steps=1), "line 3"),
        (edit(1, epsilon=0.1), "line 2"),
        (edit(3, time="2020"), "line 4"),
        (edit(2, steps=float("1e300")), "line 3"),
        (rehash, "line 4"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "line 2"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3"),
        (lambda lines: lines[1:], "line 1"),
        (lambda lines: lines[:-1], "5 lines are anchored, 4 are there"),
        (lambda lines: lines[:1], "5 lines are anchored, 1 are there"),
        (lambda lines: [*lines[:3], b"", *lines[3:]], "line 4"),
        (lambda lines: [*lines[:3], b"[1]", *lines[3:]], "line 4"),
        (lambda lines: [*lines[:3], lines[3].replace(b'"round":1', b'"round":NaN'), lines[4]], "line 4"),
        (lambda lines: [*lines[:3], b"\xff\xfe", *lines[3:]], "line 4"),
    ],
)
def test_edited_reordered_and_shortened_ledgers_are_named(tmp_path: Path, change: Any, named: str) -> None:
    home = new(tmp_path)
    answer(home, 1)
    with open_ledger(home) as ledger:
        reserve(ledger, 2)
    path = home / "ledger.jsonl"
    lines = path.read_bytes().splitlines()
    assert len(lines) == 5
    path.write_bytes(b"".join(line + b"\n" for line in change(lines)))
    damaged = path.read_bytes()
    with pytest.raises(Refusal, match=rf"ledger-broken.*{named}"), open_ledger(home):
        pass
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "head", ["", "{}", "[]", '{"sequence": -1, "hash": "x"}', '{"sequence": 99, "hash": "x"}']
)
def test_damaged_head_is_a_refusal(tmp_path: Path, head: str) -> None:
    home = new(tmp_path)
    (home / "ledger.head").write_text(head)
    with pytest.raises(Refusal, match="ledger-broken"), open_ledger(home):
        pass


@pytest.mark.parametrize("kept", [1, 60, -1])
def test_torn_last_line_is_set_aside_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: int
) -> None:
    home = new(tmp_path)
    path = home / "ledger.jsonl"
    whole, head = path.read_bytes(), (home / "ledger.head").read_bytes()
    with open_ledger(home) as ledger:
        reserve(ledger, 1)
    torn = path.read_bytes()[len(whole) :][:kept]
    # A crash while the line was written: its head was not.
    path.write_bytes(whole + torn)
    (home / "ledger.head").write_bytes(head)
    answer(home, 1)
    assert (home / "ledger.torn").read_bytes() == torn
    assert "ledger.torn" in capsys.readouterr().err
    assert kinds(home) == ["open", "earmark", "reserve", "settle"]


def test_a_torn_line_that_was_anchored_is_no_crash(tmp_path: Path) -> None:
    home = new(tmp_path)
    path = home / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Refusal, match="ledger-broken"), open_ledger(home):
        pass
