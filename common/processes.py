"""Keep a handful of programs running: start in order, restart what dies, stop all together.

Both the coordinator's and the hospital's `start` are such a supervisor in the foreground, so that
systemd, a container or a person's terminal sees one process.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import Any

from polyclinic.common.files import write_json_atomic
from polyclinic.common.progress import say
from polyclinic.common.refusals import BadInput

POLL_S = 0.2
READY_S = 60.0  # a part that is not ready by then is started again
CALM_S = 60.0  # a part that ran this long is restarted at once when it dies
LONGEST_PAUSE_S = 5.0
STOP_S = 10.0  # between a polite stop and a kill
LOG_BYTES, LOG_FILES = 10 * 2**20, 5
STATE = "processes.json"


@dataclass(frozen=True)
class Part:
    """One program.

    Attributes:
        name: Of its log file and in `status`.
        argv: Program and arguments.
        env: Beside the supervisor's own environment.
        ready: Asked until it is true before the next part starts.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] = lambda: True


class Running:
    """A part that was started, with its log and how often it had to be started."""

    def __init__(self, part: Part, folder: Path) -> None:
        self.part, self.restarts, self.pause, self.groups = part, -1, 0.0, list[int]()
        self.due = 0.0
        handler = RotatingFileHandler(folder / f"{part.name}.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES)
        (folder / f"{part.name}.log").chmod(0o600)
        self.log = logging.Logger(part.name)
        self.log.addHandler(handler)
        self.start()

    def start(self) -> None:
        """Start the program in a session of its own, its output in its log."""
        self.restarts += 1
        self.started = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "polyclinic.common.tether", str(os.getpid()), *self.part.argv],
            env={**os.environ, **self.part.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.groups = [group for group in self.groups if _alive(-group)] + [self.process.pid]
        threading.Thread(target=self._copy, args=(self.process,), daemon=True).start()

    def _copy(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.log.info(line.decode("utf-8", "replace").rstrip())

    def wait_ready(self, stopping: threading.Event) -> None:
        """Wait until the part answers, is dead, or takes too long."""
        end = time.monotonic() + READY_S
        while self.process.poll() is None and not stopping.is_set() and not self.part.ready():
            if time.monotonic() > end:
                self.process.terminate()
                return
            time.sleep(POLL_S)

    def tend(self) -> bool:
        """Restart the part if it died and its pause is over; tells whether anything changed."""
        if self.process.poll() is None:
            return False
        if not self.due:
            calm = time.time() - self.started > CALM_S
            self.pause = 0.0 if calm else min(LONGEST_PAUSE_S, max(1.0, 2 * self.pause))
            self.due = time.monotonic() + self.pause
            say(f"{self.part.name} ended with {self.process.returncode}; again in {self.pause:.0f} s")
            return True
        if time.monotonic() < self.due:
            return False
        self.due = 0.0
        self.start()
        return True

    def stop(self, number: int) -> None:
        """Signal the program and whatever it started."""
        for group in self.groups:
            with suppress(ProcessLookupError):
                os.killpg(group, number)

    def facts(self) -> dict[str, Any]:
        """What `status` shows."""
        alive = self.process.poll() is None
        return {"pid": self.process.pid, "alive": alive, "restarts": self.restarts, "started": self.started}


def supervise(folder: Path, parts: Sequence[Callable[[], Part]], ready: str) -> None:
    """Run parts until SIGTERM or Ctrl-C, in the foreground.

    Args:
        folder: For logs, `processes.json` and the lock; made with mode 0700.
        parts: Called in order, each when the one before is ready: a part may need what that one wrote.
        ready: Said once all are up.

    Raises:
        BadInput: Another supervisor works in this folder.
    """
    os.umask(0o077)  # logs, updates and caches of whatever is started are for this user alone
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    with _only_one(folder):
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        running: list[Running] = []
        try:
            for make in parts:
                if stopping.is_set():
                    break
                running.append(Running(make(), folder))
                running[-1].wait_ready(stopping)
                _record(folder, running)
            if not stopping.is_set():
                say(ready)
            while not stopping.wait(POLL_S):
                if any([one.tend() for one in running]):
                    _record(folder, running)
        finally:
            _stop(running)
            (folder / STATE).unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)


def processes(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what a supervisor in this folder keeps running; empty where none does."""
    try:
        # The lock, not a process number, which may be another's by now.
        with (folder / "lock").open() as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return {}
        facts: dict[str, dict[str, Any]] = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        return {}
    return {name: {**fact, "alive": _alive(fact["pid"])} for name, fact in facts.items()}


def free_port() -> int:
    """Ask the operating system for a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Tell whether anything accepts connections on a loopback port."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        for last in (False, False, False, True):  # `status` holds it for a moment when it looks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if last:
                    raise BadInput(f"{folder}: already started by another process; stop that one") from error
                time.sleep(POLL_S)
        yield


def _record(folder: Path, running: list[Running]) -> None:
    facts = {one.part.name: one.facts() for one in running}
    # A full disk must not stop what runs.
    with suppress(BadInput, OSError):
        write_json_atomic(folder / STATE, facts)


def _stop(running: list[Running]) -> None:
    # One after the other, the last first: a part may want to sign off by way of one that came before it.
    for one in reversed(running):
        one.stop(signal.SIGTERM)
        end = time.monotonic() + STOP_S
        while time.monotonic() < end and any(_alive(-group) for group in one.groups):
            one.process.poll()
            time.sleep(POLL_S)
        one.stop(signal.SIGKILL)
        one.process.wait()


def _alive(pid: int) -> bool:
    """Tell whether a process, or with a negative number a process group, exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
