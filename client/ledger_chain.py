"""The ledger's chain: what a line is, and how a whole file is told from a damaged one.

Every line is a JSON object with `sequence`, `previous` (hash of the line before), `salt`, `kind`,
`time`, the kind's own fields, and `hash` (SHA-256 of the canonical JSON of all the rest).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from polyclinic.common.files import canonical_json
from polyclinic.common.refusals import Refusal

Line = dict[str, Any]
GENESIS = "0" * 64


def line_hash(line: Line) -> str:
    """SHA-256 of a line's canonical JSON without its own hash."""
    return hashlib.sha256(canonical_json({k: v for k, v in line.items() if k != "hash"})).hexdigest()


def inspect(folder: Path, *, headless: bool = False) -> tuple[list[Line], bytes]:
    """Verify a ledger and change nothing; needs no lock.

    Args:
        folder: The site's home.
        headless: A person knows that `ledger.head` is lost; go by the chain alone.

    Returns:
        The lines, and what follows the last whole one: torn, or being written now.

    Raises:
        Refusal: `ledger-missing` where there is no line; `ledger-broken` for an edited, reordered or
            missing line, or a missing head.
    """
    # Before the lines: one may be added while we read, and the head must not be ahead of what we saw.
    head_path = folder / "ledger.head"
    head = head_path.read_bytes() if head_path.exists() else None
    path = folder / "ledger.jsonl"
    whole, _, torn = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    lines: list[Line] = []
    previous = GENESIS
    for number, text in enumerate(whole.split(b"\n") if whole else []):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise Refusal("ledger-broken", f"line {number + 1} is not JSON") from error
        if not _follows(line, text, number, previous):
            raise Refusal("ledger-broken", f"line {number + 1} was changed, moved or follows a missing one")
        previous = line["hash"]
        lines.append(line)
    if head is not None:
        _check_head(head, lines)
    elif len(lines) > 1 and not headless:  # only a creation that was killed leaves a line without a head
        raise Refusal("ledger-broken", f"ledger.head is missing beside {len(lines)} lines")
    if not lines:
        raise Refusal("ledger-missing", f"no whole line in {path}")
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


def _follows(line: Any, text: bytes, number: int, previous: str) -> bool:
    """Tell whether a line is whole, unchanged and in its place."""
    if not isinstance(line, dict) or line.get("sequence") != number or line.get("previous") != previous:
        return False
    try:
        return bool(line.get("hash") == line_hash(line) and canonical_json(line) == text)
    except ValueError:  # NaN or infinity, which we never write
        return False
