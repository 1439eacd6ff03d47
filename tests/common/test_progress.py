import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest

from polyclinic.common.progress import duration, progress_line, say, track

Captured = pytest.CaptureFixture[str]


def _lines(captured: Captured) -> list[str]:
    out, err = captured.readouterr()
    assert out == ""
    assert err == "" or err.endswith("\n")
    return err.splitlines()


class _Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("label", 40, 120, 2.1), "label 40/120 (33 %), 2.1 s elapsed, ETA 4 s"),
        (("label", 0, 120, 2.1), "label 0/120 (0 %), 2.1 s elapsed"),
        (("label", 119, 120, 1190.0), "label 119/120 (99 %), 19 min 50 s elapsed, ETA 10 s"),
        (("label", 120, 120, 59.97), "label 120/120 (100 %), 1 min 00 s elapsed"),
        (("label", 0, 0, 0.0), "label 0/0 (100 %), 0.0 s elapsed"),
        (("label", 1, 4, 3600.0, "round 1"), "label 1/4 (25 %), 1 h 00 min elapsed, ETA 3 h 00 min, round 1"),
        (("label", 1, 4, 1.0, "", True), "label 1/4 (25 %), 1.0 s elapsed, stopped"),
    ],
)
def test_line(args: tuple[str, int, int, float], line: str) -> None:
    assert progress_line(*args) == line


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (7799, "2 h 09 min")],
)
def test_duration_never_shows_sixty(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_plain_lines_are_first_last_and_one_every_five_seconds(capsys: Captured, clock: _Clock) -> None:
    with track("caching", 48) as advance:
        for step in range(48):
            clock.now += 0.25
            advance(note=f"image {step}")
    assert _lines(capsys) == [
        "caching 0/48 (0 %), 0.0 s elapsed",
        "caching 20/48 (41 %), 5.0 s elapsed, ETA 7 s, image 19",
        "caching 40/48 (83 %), 10.0 s elapsed, ETA 2 s, image 39",
        "caching 48/48 (100 %), 12.0 s elapsed, image 47",
    ]


def test_last_line_is_not_said_twice(capsys: Captured, clock: _Clock) -> None:
    with track("a", 2) as advance:
        clock.now += 9
        advance(2)
    assert [line.split(",")[0] for line in _lines(capsys)] == ["a 0/2 (0 %)", "a 2/2 (100 %)"]


def test_failed_work_says_stopped_and_the_error_passes(capsys: Captured) -> None:
    def fail() -> None:
        with track("a", 3) as advance:
            advance()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert _lines(capsys)[-1].endswith("stopped")


def test_inner_track_speaks_only_when_it_is_slow(capsys: Captured, clock: _Clock) -> None:
    with track("outer", 2) as advance:
        for pause in (1, 3):
            with track("inner", 2) as advance_inner:
                for _ in range(2):
                    clock.now += pause
                    advance_inner()
            advance()
    assert [line.split(",")[0] for line in _lines(capsys)] == [
        "outer 0/2 (0 %)",
        "inner 2/2 (100 %)",
        "outer 2/2 (100 %)",
    ]
    with track("next", 1):  # the inner ones left the books balanced
        pass
    assert _lines(capsys) != []


def test_threads_lose_no_step(capsys: Captured) -> None:
    with track("a", 4000) as advance:

        def work() -> None:
            for _ in range(1000):
                advance()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert _lines(capsys)[-1].startswith("a 4000/4000 (100 %)")


def test_say_goes_to_stderr(capsys: Captured) -> None:
    say("hello [bold]you[/bold]")
    assert _lines(capsys) == ["hello [bold]you[/bold]"]


_NESTED = """
import sys, threading
from polyclinic.common.progress import say, track
with track("outer [x]", 2) as advance:
    with track("inner", 3) as inner:
        inner(3, note="three")
        other = threading.Thread(target=lambda: track("thread", 1).__enter__()(1))
        other.start(); other.join()
    say("above [bold]the bar")
    print("fact")
    advance(2)
with track("again", 1) as advance:
    advance()
"""


def test_on_a_terminal_nested_bars_run_and_stdout_stays_clean() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _NESTED],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass  # a terminal whose other side is closed ends so
    finally:
        os.close(ours)
    facts, _ = process.communicate(timeout=60)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.returncode == 0, text
    assert facts == b"fact\n"
    assert "Traceback" not in text
    for piece in ("outer [x]", "2/2", "above [bold]the bar", "ETA", "again", "1/1", "━"):
        assert piece in text
