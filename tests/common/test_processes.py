"""The supervisor, with real processes that are really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polyclinic.common.processes import processes

# Two parts: `one` writes its pid and has a child of its own, `two` notes that `one` was there before it.
SCRIPT = """
import sys
from pathlib import Path
from polyclinic.common.processes import Part, supervise

folder = Path(sys.argv[1])
one = Part(
    "one",
    ["sh", "-c", f"echo hello from one; sleep 600 & echo $! > {folder}/child; echo $$ > {folder}/one; wait"],
    ready=lambda: (folder / "one").exists(),
)
two = Part(
    "two", ["sh", "-c", f"test -e {folder}/one && echo $WORD > {folder}/two; exec sleep 600"], {"WORD": "x"}
)
supervise(folder / "node", [lambda: one, lambda: two], "all is up")
"""


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    # A zombie of somebody else's is as good as dead.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: len(processes(tmp_path / "node")) == 2 and (tmp_path / "two").exists())
        yield process
    finally:
        process.kill()
        process.communicate()


def test_parts_start_in_order_and_stop_together(tmp_path: Path, started: subprocess.Popen[str]) -> None:
    facts = processes(tmp_path / "node")
    assert (tmp_path / "two").read_text() == "x\n"
    pids = [fact["pid"] for fact in facts.values()] + [int((tmp_path / "child").read_text())]
    assert all(alive(pid) for pid in pids)
    assert (tmp_path / "node" / "one.log").read_text() == "hello from one\n"
    assert (tmp_path / "node" / "one.log").stat().st_mode & 0o077 == 0
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=30)
    assert started.returncode == 0
    assert "all is up" in said
    assert not any(alive(pid) for pid in pids)
    assert processes(tmp_path / "node") == {}


def test_a_killed_part_is_started_again(tmp_path: Path, started: subprocess.Popen[str]) -> None:
    before = processes(tmp_path / "node")["one"]
    os.kill(before["pid"], signal.SIGKILL)

    def again() -> bool:
        now = processes(tmp_path / "node").get("one", before)
        return bool(now["pid"] != before["pid"] and now["alive"])

    wait_for(again)
    assert processes(tmp_path / "node")["one"]["restarts"] == 1
    wait_for(lambda: (tmp_path / "node" / "one.log").read_text() == 2 * "hello from one\n")


def test_parts_die_with_a_supervisor_that_is_killed(tmp_path: Path, started: subprocess.Popen[str]) -> None:
    pids = [fact["pid"] for fact in processes(tmp_path / "node").values()]
    started.kill()
    started.wait()  # its lock goes with it, a moment after the pipes by which its parts notice
    wait_for(lambda: not any(alive(pid) for pid in pids))
    assert processes(tmp_path / "node") == {}


def test_a_folder_has_one_supervisor(tmp_path: Path, started: subprocess.Popen[str]) -> None:
    second = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=30, check=False
    )
    assert second.returncode != 0
    assert "already started by another process" in second.stderr
    assert len(processes(tmp_path / "node")) == 2
