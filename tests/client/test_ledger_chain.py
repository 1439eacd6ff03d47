"""PRIVACY.md, rules 8 and 10: what was edited, moved, lost or torn is detected and named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.ledger import open_ledger
from polyclinic.client.ledger_books import create_ledger
from polyclinic.client.ledger_chain import read_lines
from polyclinic.client.ledger_view import rewrite_head
from polyclinic.common.chain import line_hash
from polyclinic.common.files import canonical_json
from polyclinic.common.refusals import Refusal
from tests.client.ledger_home import answer, answered, kinds, new, reserve


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


@pytest.mark.parametrize("left", [b"", b'{"approv'])
def test_a_creation_that_was_killed_is_done_again_and_an_emptied_ledger_is_not(
    tmp_path: Path, left: bytes
) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(left)
    with pytest.raises(Refusal, match="ledger-missing"), open_ledger(tmp_path):
        pass
    home = new(tmp_path)
    assert kinds(home) == ["open", "earmark"]
    answer(home, 1)
    (home / "ledger.jsonl").write_bytes(left)
    (home / "ledger.head").unlink()
    for act in (lambda: create_ledger(home, "site", simulated=True), lambda: answer(home, 2)):
        with pytest.raises(Refusal, match="ledger-missing"):
            act()


def test_a_lost_head_is_named_and_only_a_person_replaces_it(tmp_path: Path) -> None:
    home = new(tmp_path)
    answered(home, range(1, 2))
    first = answer(home, 1)
    head = home / "ledger.head"
    with pytest.raises(Refusal, match=r"ledger-broken.*ledger\.head is there"):
        rewrite_head(home)
    head.unlink()
    for act in (lambda: answer(home, 1), lambda: answer(home, 2), lambda: read_lines(home)):
        with pytest.raises(Refusal, match=r"ledger-broken.*ledger\.head is missing beside 4 lines"):
            act()
    assert not head.exists()
    head.with_name("replies").rename(head.with_name("kept"))
    with pytest.raises(Refusal, match="reply-broken"):  # all else must hold before a person may vouch for it
        rewrite_head(home)
    head.with_name("kept").rename(head.with_name("replies"))
    rewrite_head(home)
    assert json.loads(head.read_text()) == {"sequence": 4, "hash": read_lines(home)[4]["hash"]}
    assert answer(home, 1) == first
    assert kinds(home) == ["open", "earmark", "reserve", "settle", "anchor"]


def test_a_first_line_without_a_head_is_a_killed_creation(tmp_path: Path) -> None:
    create_ledger(tmp_path, "site", simulated=True)
    (tmp_path / "ledger.head").unlink()
    home = new(tmp_path)
    assert json.loads((home / "ledger.head").read_text())["sequence"] == 1


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
        # Equal to a parser that takes the last of two like keys, another line to one that takes the first.
        (lambda lines: [*lines[:2], b'{"steps":1,' + lines[2][1:], *lines[3:]], "line 3"),
        (lambda lines: [*lines[:2], lines[2].replace(b":", b": "), *lines[3:]], "line 3"),
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
