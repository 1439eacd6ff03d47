"""Progress of long work: a bar with an ETA on a terminal, plain log lines otherwise.

Everything goes to stderr and is flushed, so that stdout stays free for facts (`--json`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 5.0

_lock = threading.RLock()
# One bar display a process: rich cannot animate two at once. Every open track is a row of it.
_display: Progress | None = None
_rows = 0
_open_plain = 0


class Advance(Protocol):
    """What `track` yields."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """Say that n more items are done; note is a few words shown beside the count."""


def say(text: str) -> None:
    """Print one plain line to stderr, above the bars where some are on screen."""
    with _lock:
        if _display is None:
            print(text, file=sys.stderr, flush=True)
        else:
            _display.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def track(label: str, total: int) -> Iterator[Advance]:
    """Show the progress of a piece of work with a known number of items.

    On a terminal every open track is a bar and an inner one vanishes when it ends. Elsewhere an
    outermost track prints its first and last line and at most one every 5 s between; an inner one
    prints only what takes longer than that.

    Args:
        label: What is being done.
        total: Number of items; 0 is allowed.

    Yields:
        `advance(n=1, note="")`, safe to call from several threads.
    """
    on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    with _bar(label, total) if on_terminal else _lines(label, total) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    """Track as one row of the process's display."""
    global _display, _rows
    with _lock:
        if _display is None:
            _display = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(file=sys.stderr),
                redirect_stdout=False,  # facts on stdout must not end up on stderr
            )
            _display.start()
        display = _display
        outermost = _rows == 0
        _rows += 1
        row = display.add_task(label, total=total, note="")

    def advance(n: int = 1, note: str = "") -> None:
        if note:
            display.update(row, advance=n, note=note)
        else:
            display.update(row, advance=n)

    try:
        yield advance
    finally:
        with _lock:
            _rows -= 1
            if not outermost:
                display.remove_task(row)
            if _rows == 0:
                display.stop()
                _display = None


@contextmanager
def _lines(label: str, total: int) -> Iterator[Advance]:
    """Track by plain lines."""
    global _open_plain
    with _lock:
        inner = _open_plain > 0
        _open_plain += 1
    start = time.monotonic()
    done, last_note, last_line, last_done = 0, "", start, -1

    def show(stopped: bool = False) -> None:
        nonlocal last_line, last_done
        last_line, last_done = time.monotonic(), done
        say(progress_line(label, done, total, last_line - start, last_note, stopped))

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last_note
        with _lock:
            done += n
            last_note = note or last_note
            if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                show()

    if not inner:
        show()
    finished = False
    try:
        yield advance
        finished = True
    finally:
        with _lock:
            _open_plain -= 1
            long_enough = time.monotonic() - start >= SECONDS_BETWEEN_LINES
            if (long_enough or not inner) and (done != last_done or not finished):
                show(stopped=not finished)


def progress_line(
    label: str, done: int, total: int, elapsed_s: float, note: str = "", stopped: bool = False
) -> str:
    """Write one plain line such as `label 40/120 (33 %), 2.1 s elapsed, ETA 4 s`.

    Args:
        label: What is being done.
        done: Items done.
        total: Items in all.
        elapsed_s: Seconds since the start.
        note: A few words to end the line with.
        stopped: The work ended by an error or an interruption.
    """
    percent = 100 * done // total if total else 100
    parts = [f"{label} {done}/{total} ({percent} %)", f"{duration(elapsed_s, tenths=True)} elapsed"]
    if stopped:
        parts.append("stopped")
    elif 0 < done < total:
        parts.append(f"ETA {duration(elapsed_s / done * (total - done))}")
    return ", ".join(parts + ([note] if note else []))


def duration(seconds: float, tenths: bool = False) -> str:
    """Write a duration in words: `4 s`, `3 min 05 s`, `2 h 10 min`.

    Args:
        seconds: Length.
        tenths: Show tenths below a minute.
    """
    if tenths and seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
