"""Where this user's ledgers lie: a list in the user's state folder, by which one finds another (rule 8)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polyclinic.common.chain import lock
from polyclinic.common.files import write_atomic
from polyclinic.common.progress import say

LEDGERS = "ledgers"


def register(home: Path) -> None:
    """Note that a ledger lies in a home; asked for again, nothing happens."""
    try:
        with locked():
            homes = registered()
            if home.resolve() not in homes:
                text = "".join(f"{path}\n" for path in [*homes, home.resolve()])
                write_atomic(_state() / LEDGERS, os.fsencode(text), mode=0o600)
    except OSError as error:
        say(f"cannot note this ledger in {error.filename}: another one of this hospital would not notice it")


def _state() -> Path:
    if named := os.environ.get("XDG_STATE_HOME"):
        return Path(named) / "polyclinic"
    try:
        return Path.home() / ".local" / "state" / "polyclinic"
    except RuntimeError:  # a user without a home, as containers have them
        return Path(os.devnull) / "polyclinic"


@contextmanager
def locked() -> Iterator[None]:
    """Hold the list; raises OSError where this user may not write it."""
    _state().mkdir(parents=True, exist_ok=True, mode=0o700)
    with lock(_state(), LEDGERS, wait=True):
        yield


def registered() -> list[Path]:
    """Homes in the list, whether or not a ledger is still there."""
    path = _state() / LEDGERS
    return [Path(line) for line in os.fsdecode(path.read_bytes()).splitlines()] if path.exists() else []
