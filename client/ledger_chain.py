"""How a whole ledger is told from a damaged one: by its chain (`common/chain.py`) and by its head."""

from __future__ import annotations

import json
from pathlib import Path

from polyclinic.common.chain import Line, read_chain
from polyclinic.common.refusals import Refusal


def inspect(folder: Path, *, headless: bool = False) -> tuple[list[Line], bytes]:
    """Verify a ledger against itself and its head, and change nothing; needs no lock.

    Args:
        folder: The site's home.
        headless: A person knows that `ledger.head` is lost; go by the chain alone.

    Returns:
        As `read_chain`.

    Raises:
        Refusal: `ledger-missing` where there is no line; `ledger-broken` for an edited, reordered or
            missing line, or a missing head.
    """
    # Before the lines: one may be added while we read, and the head must not be ahead of what we saw.
    head_path = folder / "ledger.head"
    head = head_path.read_bytes() if head_path.exists() else None
    lines, torn = read_chain(folder, "ledger")
    if head is not None:
        _check_head(head, lines)
    elif len(lines) > 1 and not headless:  # only a creation that was killed leaves a line without a head
        raise Refusal("ledger-broken", f"ledger.head is missing beside {len(lines)} lines")
    if not lines:
        raise Refusal("ledger-missing", f"no whole line in {folder / 'ledger.jsonl'}")
    return lines, torn


def _check_head(head: bytes, lines: list[Line]) -> None:
    try:
        values = json.loads(head)
        sequence, anchor = int(values["sequence"]), str(values["hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal("ledger-broken", "ledger.head cannot be read") from error
    # The head is written after its line: a crash leaves it behind, never ahead.
    if not 0 <= sequence < len(lines) or lines[sequence]["hash"] != anchor:
        raise Refusal("ledger-broken", f"{sequence + 1} lines are anchored, {len(lines)} are there")
