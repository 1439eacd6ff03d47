"""How a whole ledger is told from a damaged one: by its chain (`common/chain.py`) and by its head."""

from __future__ import annotations

from pathlib import Path

from polyclinic.common.chain import Line, read_anchored, set_aside
from polyclinic.common.refusals import Refusal


def inspect(folder: Path, *, headless: bool = False) -> tuple[list[Line], bytes]:
    """Verify a ledger against itself and its head, and change nothing; needs no lock.

    Args:
        folder: The site's home.
        headless: A person knows that `ledger.head` is lost; go by the chain alone.

    Returns:
        As `read_anchored`.

    Raises:
        Refusal: `ledger-missing` where there is no line; `ledger-broken` for an edited, reordered or
            missing line, or a missing head.
    """
    lines, torn = read_anchored(folder, "ledger", headless=headless)
    if not lines:
        raise Refusal("ledger-missing", f"no whole line in {folder / 'ledger.jsonl'}")
    return lines, torn


def read_lines(folder: Path, *, headless: bool = False) -> list[Line]:
    """Read and verify a ledger whose lock is held.

    A torn last line (a crash while it was written; nothing can have followed it) is moved to
    `ledger.torn` and named on the terminal.

    Raises:
        Refusal: As `inspect`.
    """
    lines, torn = inspect(folder, headless=headless)
    if torn:
        set_aside(folder, "ledger", torn)
    return lines
