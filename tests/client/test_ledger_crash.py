"""PRIVACY.md, rule 9: real processes killed, racing and out of disk; the ledger never under-reports."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from polyclinic.client.ledger import open_ledger
from polyclinic.client.ledger_books import create_ledger
from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.refusals import BadInput, Refusal
from tests.client.ledger_home import STEPS, answer, in_child, kill_at_flush, kinds, new, reserve, wait_for


def test_second_process_is_refused_while_the_first_holds_the_ledger(tmp_path: Path) -> None:
    home = new(tmp_path)
    ready, go = os.pipe(), os.pipe()

    def hold() -> None:
        with open_ledger(home) as ledger:
            reserve(ledger, 1)
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            ledger.settle("a", 1, b"reply")

    child = in_child(hold)
    os.read(ready[0], 1)
    for act in (lambda: answer(home, 1), lambda: create_ledger(home, "site", simulated=True)):
        with pytest.raises(Refusal, match="another-process"):
            act()
    os.write(go[1], b"x")
    assert wait_for(child) == 0
    assert answer(home, 1) == b"reply"
    assert kinds(home).count("reserve") == 1


def check_after_kill(home: Path) -> None:
    """What must hold whenever a process was killed."""
    with open_ledger(home) as ledger:
        reserved = {line["round"] for line in ledger.of("a", "reserve")}
        replies = {int(path.stem.split("-")[1]) for path in (home / "replies").glob("a-*.safetensors")}
        assert replies <= reserved  # whatever may be sent is charged
        assert {line["round"] for line in ledger.of("a", "settle")} <= replies
        assert sum(steps for *_, steps in ledger.history("a")) == STEPS * len(reserved)
        assert all(
            (home / "replies" / f"a-{number:04d}.safetensors").stat().st_size == 3000 for number in replies
        )
    last = max(reserved, default=1)
    first = answer(home, last)
    assert answer(home, last) == first
    assert kinds(home).count("reserve") == max(len(reserved), 1)  # reused, not charged again
    assert kinds(home).count("settle") <= len(reserved) or not reserved


@pytest.mark.parametrize("instant", range(10))
def test_killed_at_every_flush_never_under_reports(tmp_path: Path, instant: int) -> None:
    home = new(tmp_path)

    def work() -> None:
        kill_at_flush(instant)
        answer(home, 1)

    code = wait_for(in_child(work))
    assert code == (-signal.SIGKILL if instant < 9 else 0)
    check_after_kill(home)


def test_full_disk_leaves_a_whole_ledger(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root with the right to mount")
    try:
        home = new(disk / "home")
        ballast = disk / "ballast"
        with suppress(OSError):
            ballast.write_bytes(bytes(1 << 20))
        sizes = set()
        for number in range(1, 30):
            with open_ledger(home) as ledger, pytest.raises(BadInput, match="free space"):
                reserve(ledger, number)
            raw = (home / "ledger.jsonl").read_bytes()
            assert raw.endswith(b"\n")
            assert len(read_lines(home)) == raw.count(b"\n")
            sizes.add(len(raw))
        assert len(sizes) < 29  # in the end the line itself no longer fitted
        ballast.unlink()
        before = kinds(home).count("reserve")
        with open_ledger(home) as ledger:
            reserve(ledger, 1)  # written, though not returned: charged, and used now
            reserve(ledger, 30)
        assert kinds(home).count("reserve") == before + 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)
