"""The privacy ledger: one append-only, hash-chained file for a site's whole patient population.

Every line is a JSON object with `sequence`, `previous` (hash of the line before), `salt`, `kind`,
`time`, the kind's own fields, and `hash` (SHA-256 of the canonical JSON of all the rest). Kinds:

* `open`: the ledger's birth: site name, whether it is a simulation's.
* `earmark`: an approval sets a study's whole schedule aside: approval, study, sigma, rate, steps,
  delta, epsilon (the string "inf" where the study is not private).
* `reserve`: before training: approval, round, hash of the incoming state, sigma, rate, steps, tau.
* `settle`: the reply is stored: approval, round, hash of the stored bytes.
* `spent`: the process itself saw its attempt fail; the reservation counts as used.
* `close`: a study ended; what it did not use comes back.

Order of a round: reserve + fsync -> train -> store the reply in one rename -> settle + fsync ->
first byte sent. A second file, `ledger.head`, holds sequence and hash of the last line: an anchor
against lost lines. A torn last line is set aside and named.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.common.files import (
    canonical_json,
    naming_full_disk,
    sync_folder,
    write_atomic,
    write_fully,
    write_json_atomic,
)
from polyclinic.common.privacy.accounting import History, claim
from polyclinic.common.refusals import Refusal

Line = dict[str, Any]
GENESIS = "0" * 64


@dataclass(frozen=True)
class Reservation:
    """A place in the ledger for one round's training.

    Attributes:
        sequence: Number of its line.
        hash: Hash of its line.
        reused: A killed attempt left it; it released nothing, so it is used again.
    """

    sequence: int
    hash: str
    reused: bool


class Ledger:
    """A site's ledger, held under the site's one lock.

    Use `open_ledger`; an instance is only valid inside its `with` block.
    """

    def __init__(self, folder: Path, lines: list[Line]) -> None:
        self.folder, self.lines = folder, lines

    # -- reading ---------------------------------------------------------------------------------

    def of(self, approval: str, kind: str) -> list[Line]:
        """Lines of one kind that belong to an approval, oldest first."""
        return [line for line in self.lines if line["kind"] == kind and line.get("approval") == approval]

    def history(self, approval: str) -> History:
        """Everything reserved under an approval, settled or not, merged by parameters.

        A reservation counts from the moment it is written: never under-report.
        """
        steps: dict[tuple[float, float], int] = {}
        for line in self.of(approval, "reserve"):
            key = (line["sigma"], line["rate"])
            steps[key] = steps.get(key, 0) + line["steps"]
        return tuple((sigma, rate, count) for (sigma, rate), count in steps.items())

    def epsilon(self, approval: str) -> float:
        """Epsilon spent under an approval, at its earmark's delta; infinity where not private."""
        (earmark,) = self.of(approval, "earmark")
        if earmark["epsilon"] == "inf":
            return float("inf")
        return claim(self.history(approval), earmark["delta"])

    def committed(self) -> float:
        """Epsilon set aside for all studies, added up: open ones whole, closed ones as spent."""
        total = 0.0
        for line in self.lines:
            if line["kind"] == "earmark":
                closed = bool(self.of(line["approval"], "close"))
                total += self.epsilon(line["approval"]) if closed else float(line["epsilon"])
        return total

    # -- writing ---------------------------------------------------------------------------------

    def earmark(
        self,
        *,
        approval: str,
        study: str,
        sigma: float,
        rate: float,
        steps: int,
        delta: float,
        epsilon: float,
        cap: float,
    ) -> None:
        """Set a study's whole schedule aside.

        Args:
            approval: Random id of the approval.
            study: Hash of the resolved study.
            sigma: Noise; 0 where not private.
            rate: q.
            steps: Steps of the whole schedule.
            delta: Of the guarantee.
            epsilon: Of the whole schedule; infinity where not private.
            cap: The site's total over all studies.

        Raises:
            Refusal: `budget-exhausted` where the total would pass the cap, or where a private study
                would follow one that was not (PRIVACY.md, rule 11).
        """
        before = self.committed()
        if epsilon != float("inf") and before + epsilon > cap:
            raise Refusal("budget-exhausted", f"{before:.2f} committed, {epsilon:.2f} asked, cap {cap:.2f}")
        text: float | str = "inf" if epsilon == float("inf") else epsilon
        self._append(
            "earmark",
            approval=approval,
            study=study,
            sigma=sigma,
            rate=rate,
            steps=steps,
            delta=delta,
            epsilon=text,
        )

    def stored_reply(self, approval: str, round_number: int, state: str) -> Path | None:
        """Find the reply to a round that was already answered.

        Raises:
            Refusal: `round-already-answered` where the round was reserved for another state.
        """
        for line in self.of(approval, "reserve"):
            if line["round"] == round_number:
                if line["state"] != state:
                    raise Refusal("round-already-answered")
                path = self.reply_path(approval, round_number)
                return path if path.exists() else None
        return None

    def reserve(
        self,
        *,
        approval: str,
        round_number: int,
        state: str,
        sigma: float,
        rate: float,
        steps: int,
        tau: float,
    ) -> Reservation:
        """Spend before touching: reserve a round's steps, fsync'd before this returns.

        Raises:
            Refusal: `budget-exhausted` beyond the earmarked schedule; `round-already-answered` for
                a round that was closed as spent.
        """
        (earmark,) = self.of(approval, "earmark")
        for line in self.of(approval, "reserve"):
            if line["round"] == round_number:
                if any(spent["round"] == round_number for spent in self.of(approval, "spent")):
                    raise Refusal("round-already-answered", "an earlier attempt failed and counts as spent")
                return Reservation(line["sequence"], line["hash"], reused=True)
        used = sum(count for _, _, count in self.history(approval))
        weaker = sigma < earmark["sigma"] or rate > earmark["rate"]
        if used + steps > earmark["steps"] or weaker or self.of(approval, "close"):
            raise Refusal("budget-exhausted", f"{used} of {earmark['steps']} steps used")
        line = self._append(
            "reserve",
            approval=approval,
            round=round_number,
            state=state,
            sigma=sigma,
            rate=rate,
            steps=steps,
            tau=tau,
        )
        return Reservation(line["sequence"], line["hash"], reused=False)

    def settle(self, approval: str, round_number: int, reply: bytes) -> Path:
        """Store the reply whole, then write that it is there. Only the stored file may be sent."""
        path = self.reply_path(approval, round_number)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(path, reply, mode=0o600)
        self.note_settled(approval, round_number, reply)
        return path

    def note_settled(self, approval: str, round_number: int, reply: bytes) -> None:
        """Write the settle line, once: after a crash between store and settle it may be missing."""
        if not any(line["round"] == round_number for line in self.of(approval, "settle")):
            self._append(
                "settle", approval=approval, round=round_number, reply=hashlib.sha256(reply).hexdigest()
            )

    def fail(self, approval: str, round_number: int) -> None:
        """Close a reservation whose attempt this process saw fail: it counts as spent."""
        self._append("spent", approval=approval, round=round_number)

    def close(self, approval: str) -> None:
        """End a study: what it did not use comes back."""
        if not self.of(approval, "close"):
            self._append("close", approval=approval)

    def reply_path(self, approval: str, round_number: int) -> Path:
        """Where a round's reply is stored."""
        return self.folder / "replies" / f"{approval}-{round_number:04d}.safetensors"

    def _append(self, kind: str, **values: Any) -> Line:
        line: Line = {
            "sequence": len(self.lines),
            "previous": self.lines[-1]["hash"] if self.lines else GENESIS,
            "salt": secrets.token_hex(16),
            "kind": kind,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **values,
        }
        line["hash"] = line_hash(line)
        path = self.folder / "ledger.jsonl"
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
        self.lines.append(line)
        write_json_atomic(
            self.folder / "ledger.head", {"sequence": line["sequence"], "hash": line["hash"]}, mode=0o600
        )
        return line


def line_hash(line: Line) -> str:
    """SHA-256 of a line's canonical JSON without its own hash."""
    return hashlib.sha256(canonical_json({k: v for k, v in line.items() if k != "hash"})).hexdigest()


@contextmanager
def open_ledger(folder: Path) -> Iterator[Ledger]:
    """Hold a site's ledger under its lock.

    Args:
        folder: The site's home.

    Raises:
        Refusal: `another-process` holds it; `ledger-missing`; `ledger-broken` with the line's number.
    """
    if not (folder / "ledger.jsonl").exists():
        raise Refusal("ledger-missing", str(folder / "ledger.jsonl"))
    with _lock(folder):
        yield Ledger(folder, read_lines(folder))


def create_ledger(folder: Path, site: str, *, simulated: bool) -> None:
    """Start a site's ledger. Once only: a site has one ledger for its whole patient population.

    Raises:
        Refusal: `ledger-missing` where the site approved a study before but its ledger is gone.
    """
    with _lock(folder):
        if (folder / "ledger.jsonl").exists():
            return
        if (folder / "ledger.head").exists() or (folder / "approvals").exists():
            raise Refusal("ledger-missing", f"{folder} approved a study before")
        Ledger(folder, [])._append("open", site=site, simulated=simulated)
        sync_folder(folder)


def read_lines(folder: Path) -> list[Line]:
    """Read and verify a ledger.

    A torn last line (a crash while it was written; nothing can have followed it) is moved to
    `ledger.torn` and named on the terminal.

    Raises:
        Refusal: `ledger-broken` for an edited, reordered or missing line.
    """
    path = folder / "ledger.jsonl"
    raw = path.read_bytes()
    whole, _, torn = raw.rpartition(b"\n")
    lines: list[Line] = []
    previous = GENESIS
    for number, text in enumerate(whole.split(b"\n") if whole else []):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise Refusal("ledger-broken", f"line {number + 1} is not JSON") from error
        if not _follows(line, number, previous):
            raise Refusal("ledger-broken", f"line {number + 1} was changed, moved or follows a missing one")
        previous = line["hash"]
        lines.append(line)
    head_path = folder / "ledger.head"
    if head_path.exists():
        try:
            head = json.loads(head_path.read_text())
            sequence, anchor = int(head["sequence"]), str(head["hash"])
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal("ledger-broken", "ledger.head cannot be read") from error
        # The head is written after its line, so it may be one line behind, never ahead.
        if not 0 <= sequence < len(lines) or lines[sequence]["hash"] != anchor:
            raise Refusal("ledger-broken", f"{sequence + 1} lines are anchored, {len(lines)} are there")
    if torn:
        from polyclinic.common.progress import say

        write_atomic(folder / "ledger.torn", torn, mode=0o600)
        write_atomic(path, whole + b"\n" if whole else b"", mode=0o600)
        say(f"{path}: a torn last line was set aside in ledger.torn")
    return lines


def _follows(line: Any, number: int, previous: str) -> bool:
    """Tell whether a line is whole, unchanged and in its place."""
    if not isinstance(line, dict) or line.get("sequence") != number or line.get("previous") != previous:
        return False
    try:
        return bool(line.get("hash") == line_hash(line))
    except ValueError:  # NaN or infinity, which we never write
        return False


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    handle = os.open(folder / "ledger.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refusal("another-process", str(folder)) from error
        yield
    finally:
        os.close(handle)
