"""A chained file: what a line is, how one is added, how a whole file is told from a damaged one.

A site's ledger (`ledger.jsonl`) and journal (`journal.jsonl`) are such files, each with a head
(`ledger.head`, `journal.head`) that anchors its last line, so that a cut end is seen. Every line is a JSON
object with `sequence`, `previous` (hash of the line before), `salt`, `kind`, `time`, the kind's own fields,
and `hash` (SHA-256 of the canonical JSON of all the rest).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.common.files import (
    canonical_json,
    naming_full_disk,
    write_atomic,
    write_fully,
    write_json_atomic,
)
from polyclinic.common.refusals import Refusal

Line = dict[str, Any]
GENESIS = "0" * 64


def line_hash(line: Line) -> str:
    """SHA-256 of a line's canonical JSON without its own hash."""
    return hashlib.sha256(canonical_json({k: v for k, v in line.items() if k != "hash"})).hexdigest()


def read_chain(folder: Path, name: str) -> tuple[list[Line], bytes]:
    """Verify `NAME.jsonl` against itself and change nothing; needs no lock.

    Returns:
        The lines, and what follows the last whole one: torn, or being written now.

    Raises:
        Refusal: `NAME-broken` for an edited, reordered or missing line.
    """
    path = folder / f"{name}.jsonl"
    whole, _, torn = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    lines: list[Line] = []
    previous = GENESIS
    for number, text in enumerate(whole.split(b"\n") if whole else []):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise Refusal(f"{name}-broken", f"line {number + 1} is not JSON") from error
        if not _follows(line, text, number, previous):
            raise Refusal(f"{name}-broken", f"line {number + 1} was changed, moved or follows a missing one")
        previous = line["hash"]
        lines.append(line)
    return lines, torn


def read_anchored(folder: Path, name: str, *, headless: bool = False) -> tuple[list[Line], bytes]:
    """Verify `NAME.jsonl` against itself and `NAME.head`; as `read_chain`.

    Args:
        folder: Where both lie.
        name: Of the file.
        headless: A person knows that the head is lost; go by the chain alone.

    Raises:
        Refusal: `NAME-broken`, also for a cut end or a missing head.
    """
    # Before the lines: one may be added while we read, and the head must not be ahead of what we saw.
    path = folder / f"{name}.head"
    head = path.read_bytes() if path.exists() else None
    lines, torn = read_chain(folder, name)
    if head is not None:
        _check_head(head, lines, name)
    elif len(lines) > 1 and not headless:  # only a first line whose writer was killed has no head
        raise Refusal(f"{name}-broken", f"{name}.head is missing beside {len(lines)} lines")
    return lines, torn


def append_anchored(folder: Path, name: str, lines: list[Line], kind: str, values: Line) -> Line:
    """Add a line, then the head that anchors it; each fsync'd."""
    line = append_line(folder, name, lines, kind, values)
    head = {"sequence": line["sequence"], "hash": line["hash"]}
    write_json_atomic(folder / f"{name}.head", head, mode=0o600)
    return line


def append_line(folder: Path, name: str, lines: list[Line], kind: str, values: Line) -> Line:
    """Add a line under the file's lock, fsync'd before this returns; `lines` is what the file holds."""
    line: Line = {
        "sequence": len(lines),
        "previous": lines[-1]["hash"] if lines else GENESIS,
        "salt": secrets.token_hex(16),
        "kind": kind,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **values,
    }
    line["hash"] = line_hash(line)
    path = folder / f"{name}.jsonl"
    with naming_full_disk(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        size = os.fstat(handle).st_size
        try:
            write_fully(handle, canonical_json(line) + b"\n")
            os.fsync(handle)
        except OSError:
            # A full disk must not leave half a line behind.
            os.ftruncate(handle, size)
            raise
        finally:
            os.close(handle)
    lines.append(line)
    return line


def set_aside(folder: Path, name: str, torn: bytes) -> None:
    """Move a torn last line (a crash while it was written) to `NAME.torn`, and say so on the terminal."""
    from polyclinic.common.progress import say

    path = folder / f"{name}.jsonl"
    write_atomic(folder / f"{name}.torn", torn, mode=0o600)
    write_atomic(path, path.read_bytes().removesuffix(torn), mode=0o600)
    say(f"{path}: a torn last line was set aside in {name}.torn")


@contextmanager
def lock(folder: Path, name: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the one lock of a chained file; the kernel frees it when its process ends.

    Raises:
        Refusal: `another-process` holds it, and we do not wait.
    """
    handle = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Refusal("another-process", str(folder)) from error
        yield
    finally:
        os.close(handle)


def _check_head(head: bytes, lines: list[Line], name: str) -> None:
    try:
        values = json.loads(head)
        sequence, anchor = int(values["sequence"]), str(values["hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{name}-broken", f"{name}.head cannot be read") from error
    # The head is written after its line: a crash leaves it behind, never ahead.
    if not 0 <= sequence < len(lines) or lines[sequence]["hash"] != anchor:
        raise Refusal(f"{name}-broken", f"{sequence + 1} lines are anchored, {len(lines)} are there")


def _follows(line: Any, text: bytes, number: int, previous: str) -> bool:
    """Tell whether a line is whole, unchanged and in its place."""
    if not isinstance(line, dict) or line.get("sequence") != number or line.get("previous") != previous:
        return False
    try:
        return bool(line.get("hash") == line_hash(line) and canonical_json(line) == text)
    except ValueError:  # NaN or infinity, which we never write
        return False
