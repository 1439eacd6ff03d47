"""PRIVACY.md, rules 8 to 11: spend before touching, never twice for one release, never under-report."""

import hashlib
import os
from pathlib import Path

import pytest

from polyclinic.client.ledger_books import open_books
from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.refusals import Refusal
from tests.client.ledger_home import RATE, SIGMA, STATE, STEPS, answer, earmark, kinds, new, reserve


def test_order_is_reserve_then_store_then_settle(tmp_path: Path) -> None:
    home = new(tmp_path)
    with open_books(home) as ledger:
        place = reserve(ledger, 1)
        assert kinds(home) == ["open", "earmark", "reserve"]
        assert not ledger.reply_path("a", 1).exists()
        path = ledger.settle("a", 1, b"reply")
    lines = read_lines(home)
    assert [line["kind"] for line in lines] == ["open", "earmark", "reserve", "settle"]
    assert lines[2]["tau"] == 1e-4
    assert place == lines[2]
    assert place["sequence"] == 2
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
    with open_books(home) as ledger:
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
    with open_books(home) as ledger:
        reserve(ledger, 2)
        reserve(ledger, 3)
        ledger.fail("a", 3)
        assert ledger.history("a") == ((SIGMA, RATE, 3 * STEPS),)
        assert ledger.epsilon("a") == claim(((SIGMA, RATE, 3 * STEPS),), 1e-5)


def test_failed_attempt_stays_spent_and_killed_one_is_reused(tmp_path: Path) -> None:
    home = new(tmp_path)
    with open_books(home) as ledger:
        first = reserve(ledger, 1)
    with open_books(home) as ledger:
        again = reserve(ledger, 1)
        assert again == first
        assert kinds(home).count("reserve") == 1
        ledger.fail("a", 1)
        with pytest.raises(Refusal, match="round-already-answered"):
            reserve(ledger, 1)
        assert ledger.history("a") == ((SIGMA, RATE, STEPS),)


def test_schedule_noise_and_rate_of_the_approval_cannot_be_left(tmp_path: Path) -> None:
    home = new(tmp_path, total=25)
    with open_books(home) as ledger:
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
    with open_books(home) as ledger:
        with pytest.raises(Refusal, match="budget-exhausted"):
            earmark(ledger, "b", 4.1)
        reserve(ledger, 1)
        ledger.close("a")
        spent = claim(((SIGMA, RATE, STEPS),), 1e-5)
        assert ledger.committed() == (spent, 1e-5)
        with pytest.raises(Refusal, match="budget-exhausted"):
            earmark(ledger, "b", 10.001 - spent)
        earmark(ledger, "b", 9.999 - spent)
    assert kinds(home) == ["open", "earmark", "reserve", "close", "earmark"]


def test_deltas_add_up_under_their_own_cap(tmp_path: Path) -> None:
    home = new(tmp_path, ("a", "b"), epsilon=1.0)
    with open_books(home) as ledger:
        assert ledger.committed() == (2.0, 2e-5)
        with pytest.raises(
            Refusal, match=r"1003 budget.*committed 2\.00, 2e-05; asked 1\.00, 1e-05; caps 10\.00, 2\.9e-05"
        ):
            earmark(ledger, "c", 1.0, delta_cap=2.9e-5)
        earmark(ledger, "c", 1.0, delta_cap=3e-5)  # the sum is 3.0000000000000004e-05
        ledger.close("c")
        assert ledger.committed() == (2.0, 2e-5)  # nothing was reserved, so nothing was released
        reserve(ledger, 1)
        ledger.close("a")
        # A released study keeps its whole delta, however few of its rounds ran.
        assert ledger.committed() == (1.0 + claim(((SIGMA, RATE, STEPS),), 1e-5), 2e-5)
    assert kinds(home).count("earmark") == 3


def test_a_reservation_serves_only_what_it_was_made_for(tmp_path: Path) -> None:
    home = new(tmp_path)
    with open_books(home) as ledger:
        first = reserve(ledger, 1)
        for change in ({"state": "6" * 64}, {"sigma": 2.0}, {"rate": 0.05}, {"steps": 9}, {"tau": 0.0}):
            with pytest.raises(Refusal, match="round-already-answered"):
                reserve(ledger, 1, **change)
        assert reserve(ledger, 1) == first
        ledger.settle("a", 1, b"reply")
        with pytest.raises(Refusal, match="round-already-answered"):
            reserve(ledger, 1)
        reserve(ledger, 2)
        ledger.close("a")
        with pytest.raises(Refusal, match=r"budget-exhausted.*closed"):
            reserve(ledger, 2)  # though a killed attempt had reserved it
    assert kinds(home).count("reserve") == 2


@pytest.mark.parametrize("damage", ["changed", "shortened", "gone", "folder gone"])
def test_a_settled_reply_that_is_not_the_one_is_never_sent_nor_made_again(
    tmp_path: Path, damage: str
) -> None:
    home = new(tmp_path)
    whole = answer(home, 1)
    path = home / "replies" / "a-0001.safetensors"
    if damage == "changed":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "shortened":
        path.write_bytes(whole[:-1])
    else:
        path.unlink()
    if damage == "folder gone":
        path.parent.rmdir()
    before = (home / "ledger.jsonl").read_bytes()
    with pytest.raises(Refusal, match=r"1019 reply-broken.*a-0001\.safetensors"):
        answer(home, 1)
    assert (home / "ledger.jsonl").read_bytes() == before
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(whole)  # restored from a backup
    assert answer(home, 1) == whole


def test_a_reply_that_was_never_reserved_is_named(tmp_path: Path) -> None:
    home = new(tmp_path)
    with open_books(home) as ledger:
        (home / "replies").mkdir()
        ledger.reply_path("a", 1).write_bytes(b"reply")
        with pytest.raises(Refusal, match=r"ledger-broken.*a-0001\.safetensors"):
            ledger.stored_reply("a", 1, STATE)


@pytest.mark.parametrize("closed", [False, True])
def test_no_private_study_after_one_that_was_not(tmp_path: Path, closed: bool) -> None:
    home = new(tmp_path, epsilon=float("inf"))
    assert read_lines(home)[1]["epsilon"] == "inf"
    with open_books(home) as ledger:
        reserve(ledger, 1)
        assert ledger.epsilon("a") == float("inf")
        if closed:
            ledger.close("a")
        with pytest.raises(Refusal, match="budget-exhausted"):
            earmark(ledger, "b", 0.1, cap=1e9)
        earmark(ledger, "c", float("inf"), delta_cap=0.0)
