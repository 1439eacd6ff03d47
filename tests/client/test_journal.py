"""The journal: every message in and out, chained; a site that cannot write it begins no round."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from polyclinic.client import readiness, training
from polyclinic.client.app import app
from polyclinic.client.cli import main
from polyclinic.client.journal import note
from polyclinic.client.journal_view import read_journal
from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.refusals import REASONS, Refusal
from polyclinic.common.wire_reading import order_records
from tests.client.ledger_home import in_child, kill_at_flush, wait_for

PLAIN = {"privacy": {"enabled": False}}
ALLOW = "allow_not_private = true\n"
SECRET = "patient-07 has a polyp"


@pytest.fixture(autouse=True)
def _identity() -> None:
    """Say which task this is, as Flower does."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 2, 1, 2


@pytest.fixture
def site(make_site: Any) -> Any:
    made = make_site(ALLOW, **PLAIN)
    made.approve()
    return made


def send(site: Any, number: int = 1, *, ahead: float = 0.0, ttl: float = 60.0) -> Message:
    content = order_records(site.order(number), site.state)
    message = Message(content, dst_node_id=2, message_type="train", group_id=str(number), ttl=ttl)
    message.metadata.__dict__["_message_id"] = f"m{number}"
    message.metadata.created_at += ahead
    config = {"home": str(site.home)}
    return app(message, Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={}))


def outcomes(site: Any) -> list[str]:
    return [line["outcome"] for line in read_journal(site.home)[0] if line["kind"] == "out"]


def spent(site: Any) -> list[str]:
    return [line["kind"] for line in read_lines(site.home) if line["kind"] not in ("open", "earmark", "tap")]


def content_bytes(content: RecordDict) -> int:
    values = [value for record in content.values() for value in record.values()]
    return sum(len(v.data) if isinstance(v, Array) else len(repr(v)) for v in values)


def test_every_message_in_and_out_is_noted_and_nothing_private(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = send(site)
    again = send(site)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train", lambda *_: (_ for _ in ()).throw(RuntimeError(SECRET)))
        send(site, 2)
    send(site, 99)
    lines, unfinished = read_journal(site.home)
    assert not unfinished
    assert [line["kind"] for line in lines] == ["in", "out"] * 4
    assert outcomes(site) == ["answered", "answered again", "fault", "1011 bad-message"]
    assert [line["round"] for line in lines[::2]] == ["1", "1", "2", "99"]
    assert {line["reply_to"] for line in lines[1:4:2]} == {"m1"}
    assert lines[0]["sha256"] == lines[2]["sha256"] != lines[4]["sha256"]
    assert lines[1]["sha256"] == lines[3]["sha256"]  # the same bytes again
    assert lines[1]["bytes"] == content_bytes(first.content) == content_bytes(again.content) > 100_000
    assert abs(float(lines[0]["created_at"]) - time.time()) < 60
    text = (site.home / "journal.jsonl").read_text()
    assert not any(word in text for word in ("patient", "polyp", str(site.home), "RuntimeError"))
    assert (site.home / "journal.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("changed", ["fp", "round", "type", "name"])
def test_the_noted_hash_covers_bytes_names_and_types(site: Any, changed: str) -> None:
    def noted(content: RecordDict) -> str:
        message = Message(content, dst_node_id=2, message_type="train", group_id="1", ttl=0.0001)
        message.metadata.__dict__["_message_id"] = "m"
        config = {"home": str(site.home)}
        app(message, Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={}))
        return str(read_journal(site.home)[0][-2]["sha256"])

    content, other = (order_records(site.order(), site.state) for _ in range(2))
    name = sorted(other["state"])[0]
    array = other["state"][name]
    if changed == "fp":
        other["state"][name] = Array(array.dtype, array.shape, array.stype, array.data[:-1] + b"\x01")
    elif changed == "round":
        other["round"]["round"] = 2
    elif changed == "type":
        other["state"][name] = Array("float16", array.shape, array.stype, array.data)
    else:
        other["extra"] = ConfigRecord({})
        other["extra"]["a"] = 1
    assert noted(content) == noted(order_records(site.order(), site.state)) != noted(other)


def unwritable(home: Path) -> Callable[[], None]:
    (home / "journal.jsonl").rename(home / "kept")
    (home / "journal.jsonl").mkdir()

    def back() -> None:
        (home / "journal.jsonl").rmdir()
        (home / "kept").rename(home / "journal.jsonl")

    return back


def edited(home: Path) -> Callable[[], None]:
    path = home / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"answered"', b'"denied"', 1))
    return lambda: (path.write_bytes(whole), None)[1]


@pytest.mark.parametrize(("damage", "code"), [(unwritable, "journal-unwritable"), (edited, "journal-broken")])
def test_without_a_journal_no_round_is_begun_and_a_stored_reply_is_still_sent(
    site: Any, damage: Callable[[Path], Callable[[], None]], code: str
) -> None:
    first = send(site)
    before = spent(site)
    back = damage(site.home)
    refused = send(site, 2)
    assert (refused.error.code, refused.error.reason) == (
        REASONS[code].code,
        f"{code}: {REASONS[code].cause}",
    )
    assert spent(site) == before == ["reserve", "settle"]
    again = send(site)
    assert {k: bytes(a.data) for k, a in again.content["difference"].items()} == {
        k: bytes(a.data) for k, a in first.content["difference"].items()
    }
    back()
    assert not send(site, 2).has_error()
    (site.home / "journal.jsonl").unlink()
    assert main(["journal", "verify", "--home", str(site.home)]) == 3  # the ledger knows of rounds


def test_a_full_disk_refuses_before_anything_is_spent_and_loses_nothing(site: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root with the right to mount")
    try:
        subprocess.run(["cp", "-a", f"{site.home}/.", str(disk)], check=True)
        site.home = disk
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        assert send(site).error.code == REASONS["journal-unwritable"].code
        (disk / "ballast").write_bytes(bytes((disk / "ballast").stat().st_size - 300_000))
        assert send(site).error.code == REASONS["disk-full"].code
        assert spent(site) == []
        (disk / "ballast").unlink()
        assert not send(site).has_error()
        assert outcomes(site) == ["1066 disk-full", "answered"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_message_from_the_future_or_past_its_deadline_spends_nothing(site: Any) -> None:
    assert send(site, ahead=readiness.CLOCK_S + 300).error.code == REASONS["clock-off"].code == 1061
    assert send(site, ahead=-600.0).error.code == REASONS["round-too-late"].code
    assert spent(site) == []
    assert "+600 s from this site's clock" in (site.home / "site.log").read_text()
    first = send(site, ahead=readiness.CLOCK_S - 5)
    assert not first.has_error()
    # Replayed, however old or new it says it is: the stored bytes.
    for ahead in (3600.0, -3600.0, 0.0):
        assert content_bytes(send(site, ahead=ahead).content) == content_bytes(first.content)
    assert spent(site) == ["reserve", "settle"]
    assert outcomes(site)[-4:] == ["answered"] + ["answered again"] * 3


def test_a_round_outside_the_sites_hours_spends_nothing(site: Any) -> None:
    now = time.localtime()
    hours = f"{(now.tm_hour + 2) % 24:02d}:00-{(now.tm_hour + 3) % 24:02d}:00"
    policy = site.home / "policy.toml"
    policy.write_text(policy.read_text() + f'allowed_hours = "{hours}"\n')
    path = site.home / "approvals" / f"{site.resolved.hash}.json"
    path.unlink()
    site.approve()
    assert send(site).error.code == REASONS["outside-hours"].code == 1062
    assert "reserve" not in spent(site)


def test_many_processes_write_one_chain(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(15):
            note(tmp_path, "start", process=number)

    children = [in_child(partial(write, number)) for number in range(4)]
    assert [wait_for(child) for child in children] == [0] * 4
    lines, _ = read_journal(tmp_path)
    assert len(lines) == 60
    assert {line["process"] for line in lines} == {0, 1, 2, 3}


def test_a_killed_writer_leaves_a_whole_journal(tmp_path: Path) -> None:
    note(tmp_path, "start")

    def work() -> None:
        kill_at_flush(0)
        note(tmp_path, "stop")

    assert wait_for(in_child(work)) == -9
    path = tmp_path / "journal.jsonl"
    assert len(read_journal(tmp_path)[0]) == 2  # written, though not flushed, and not anchored yet
    torn = path.read_bytes()[:-7]
    path.write_bytes(torn)
    assert read_journal(tmp_path) == (read_journal(tmp_path)[0], True)
    note(tmp_path, "start")
    assert [line["kind"] for line in read_journal(tmp_path)[0]] == ["start", "start"]
    assert torn.endswith((tmp_path / "journal.torn").read_bytes())


def test_verify_and_show_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path)]
    assert main(["journal", "verify", *home]) == 0
    assert "0 lines" in capsys.readouterr().out
    for number in range(3):
        note(tmp_path, "approve", study="5" * 64, approval=f"a{number}")
    assert main(["journal", "verify", "--json", *home]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["lines"], facts["unfinished_line"]) == (3, False)
    assert main(["journal", "show", *home]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3
    assert "approve" in shown[1]
    assert "approval=a1" in shown[1]
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged, named in (
        ([lines[0], lines[1].replace(b"a1", b"a9"), lines[2]], "line 2"),
        ([lines[0], lines[2]], "line 2"),
        ([lines[1], lines[0], lines[2]], "line 1"),
        ([lines[0], b"{}\n"], "line 2"),
        (lines[:2], "3 lines are anchored, 2 are there"),
        ([], "3 lines are anchored, 0 are there"),
    ):
        path.write_bytes(b"".join(damaged))
        assert main(["journal", "verify", *home]) == 3
        assert f"1064 journal-broken]: the site's journal is not whole ({named}" in capsys.readouterr().err
        with pytest.raises(Refusal, match="journal-broken"):
            note(tmp_path, "start")
    path.write_bytes(b"".join(lines))
    (tmp_path / "journal.head").unlink()
    with pytest.raises(Refusal, match=r"journal.head is missing beside 3 lines"):
        note(tmp_path, "start")
    path.rename(tmp_path / "journal.aside")  # as the refusal says
    note(tmp_path, "start")
    assert len(read_journal(tmp_path)[0]) == 1
