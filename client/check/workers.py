"""The workers of a check, from the side of the process that started them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polyclinic.common.refusals import BadInput

PATIENCE_S = 120.0  # for one image; a second or two is long


class Workers:
    """One worker process for each thread that asks; started when first asked, replaced when it dies."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._all: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def look(self, path: Path, part: str) -> dict[str, Any]:
        """Have one image looked at.

        Raises:
            BadInput: The whole source cannot be looked at (a library is missing).
        """
        worker: subprocess.Popen[str] | None = getattr(self._mine, "worker", None)
        if worker is None:
            worker = self._mine.worker = self._start()
        line = ""
        try:
            assert worker.stdin
            assert worker.stdout
            worker.stdin.write(json.dumps([str(path), part]) + "\n")
            worker.stdin.flush()
            ready, _, _ = select.select([worker.stdout], [], [], PATIENCE_S)
            line = worker.stdout.readline() if ready else "hung"
        except BrokenPipeError:
            pass
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            if "stop" in answer:
                raise BadInput(answer["stop"])
            return answer
        self._end(worker)
        self._mine.worker = None
        if line == "hung":
            return {"found": [("decoder-hung", f"no answer within {PATIENCE_S:.0f} s")]}
        return {"found": [("decoder-crashed", f"exit code {worker.returncode}")]}

    def _start(self) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-m", "polyclinic.client.check.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
            # One worker a core is parallel enough.
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONIOENCODING": "utf-8",
            },
        )
        with self._lock:
            self._all.add(worker)
        return worker

    def _end(self, worker: subprocess.Popen[str]) -> None:
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe:
                with suppress(BrokenPipeError):
                    pipe.close()
        with self._lock:
            self._all.discard(worker)

    def end(self) -> None:
        """End all of them."""
        for worker in list(self._all):
            self._end(worker)


@contextmanager
def started() -> Iterator[Workers]:
    """Workers that end with the block."""
    workers = Workers()
    try:
        yield workers
    finally:
        workers.end()
