"""What people read from a site's journal."""

from __future__ import annotations

from pathlib import Path

from polyclinic.client.journal import NAME
from polyclinic.common.chain import Line, read_anchored

HIDDEN = {"sequence", "previous", "salt", "kind", "time", "hash"}


def read_journal(home: Path) -> tuple[list[Line], bool]:
    """Verify a journal and change nothing; needs no lock.

    Returns:
        Its lines, none where nothing has been noted yet, and whether an unfinished one follows: torn, or
        being written now.

    Raises:
        Refusal: `journal-broken` with the number of the first line that does not fit, or of lines that are
            anchored and gone.
    """
    lines, torn = read_anchored(home, NAME)
    return lines, bool(torn)


def words(lines: list[Line]) -> str:
    """Lay a journal out for a terminal, a line each."""
    return "\n".join(
        f"{line['time']}  {line['kind']:8}"
        + " ".join(f"{key}={_short(value)}" for key, value in line.items() if key not in HIDDEN)
        for line in lines
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
