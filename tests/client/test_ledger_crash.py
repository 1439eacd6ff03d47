"""PRIVACY.md, rule 9: real processes killed, racing and out of disk; the ledger never under-reports."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.ledger import create_ledger, open_ledger, read_lines
from polyclinic.common.refusals import BadInput, Refusal

STEPS, STATE = 10, "5" * 64


def new(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    create_ledger(folder, "site", simulated=True)
    with open_ledger(folder) as ledger:
        ledger.earmark(
            approval="a", study="s", sigma=1.0, rate=0.1, steps=1000, delta=1e-5, epsilon=5.0, cap=10.0
        )
    return folder


def reserve(ledger: Any, number: int, state: str = STATE) -> Any:
    return ledger.reserve(
        approval="a", round_number=number, state=state, sigma=1.0, rate=0.1, steps=STEPS, tau=1e-4
    )


def kinds(folder: Path) -> list[str]:
    return [line["kind"] for line in read_lines(folder)]


def in_child(work: Callable[[], None]) -> int:
    """Fork a real process; it never returns into pytest."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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


@pytest.mark.parametrize("instant", range(9))
def test_killed_at_every_flush_never_under_reports(tmp_path: Path, instant: int) -> None:
    home = new(tmp_path)

    def work() -> None:
        real, left = os.fsync, [instant]

        def fsync(handle: int) -> None:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            real(handle)

        setattr(os, "fsync", fsync)  # noqa: B010 - a plain assignment has another type
        answer(home, 1)

    code = wait_for(in_child(work))
    assert code == (-signal.SIGKILL if instant < 8 else 0)
    check_after_kill(home)


def test_killed_at_random_instants_never_under_reports(tmp_path: Path) -> None:
    chance = random.Random(0)
    killed = 0
    for attempt in range(15):
        home = new(tmp_path / str(attempt))

        def work(home: Path = home) -> None:
            for number in range(1, 100):
                answer(home, number)

        child = in_child(work)
        time.sleep(chance.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        killed += wait_for(child) == -signal.SIGKILL
        check_after_kill(home)
    assert killed >= 12


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
            assert reserve(ledger, 1).reused  # written, though not returned: charged, and used now
            reserve(ledger, 30)
        assert kinds(home).count("reserve") == before + 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)
