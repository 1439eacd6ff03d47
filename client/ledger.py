"""The privacy ledger: one append-only, hash-chained file for a site's whole patient population.

A line has the fields that `ledger_chain` says, and its kind's own. Kinds:

* `open`: the ledger's birth: site name, whether it is a simulation's.
* `earmark`: an approval sets a study's whole schedule aside: approval, study, sigma, rate, steps,
  delta, epsilon (the string "inf" where the study is not private).
* `tap`: the study's audit tap, which costs nothing: approval, number of coordinates, hash of its coins.
* `reserve`: before training: approval, round, hash of the incoming state, sigma, rate, steps, tau.
* `settle`: the reply is stored: approval, round, hash of the stored bytes.
* `spent`: the process itself saw its attempt fail; the reservation counts as used.
* `close`: a study ended; what it did not use comes back.
* `anchor`: a person accepted a whole chain whose `ledger.head` was lost.

Order of a round: reserve + fsync -> train -> store the reply in one rename -> settle + fsync ->
first byte sent. A second file, `ledger.head`, holds sequence and hash of the last line: an anchor
against lost lines. A torn last line is set aside and named. docs/ledger.md has the format in full.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.client.ledger_chain import GENESIS, Line, inspect, line_hash
from polyclinic.common.files import (
    canonical_json,
    naming_full_disk,
    sha256_file,
    sync_folder,
    write_atomic,
    write_fully,
    write_json_atomic,
)
from polyclinic.common.privacy.accounting import History, claim
from polyclinic.common.refusals import Refusal


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

    Use `open_ledger`; an instance may write only inside its `with` block.
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

    def charge(self, approval: str) -> tuple[float, float]:
        """(epsilon, delta) a study counts under the caps: open, its whole schedule; closed, as spent."""
        (earmark,) = self.of(approval, "earmark")
        if not self.of(approval, "close"):
            return float(earmark["epsilon"]), earmark["delta"]
        if not self.of(approval, "reserve"):
            return 0.0, 0.0
        return self.epsilon(approval), earmark["delta"]

    def committed(self) -> tuple[float, float]:
        """(epsilon, delta) of all studies, each added up: basic composition (PRIVACY.md, rule 5)."""
        charges = [self.charge(line["approval"]) for line in self.lines if line["kind"] == "earmark"]
        return math.fsum(epsilon for epsilon, _ in charges), math.fsum(delta for _, delta in charges)

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
        delta_cap: float,
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
            cap: The site's total epsilon over all studies.
            delta_cap: The site's total delta over all studies.

        Raises:
            Refusal: `budget-exhausted` where a total would pass its cap, or where a private study
                would follow one that was not (PRIVACY.md, rule 11).
        """
        before, delta_before = self.committed()
        # A rounding error of the sum must not refuse the study that fills the cap exactly.
        over = before + epsilon > cap or delta_before + delta > delta_cap * (1 + 1e-9)
        if epsilon != float("inf") and over:
            sums = f"committed {before:.2f}, {delta_before:g}; asked {epsilon:.2f}, {delta:g}"
            raise Refusal("budget-exhausted", f"epsilon, delta: {sums}; caps {cap:.2f}, {delta_cap:g}")
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
        """Find the reply to a round that was already answered, and check that it is the settled one.

        Raises:
            Refusal: `round-already-answered` where the round was reserved for another state;
                `reply-broken` where the settled file is gone or changed: it may have been sent, so
                training again would be a second release; `ledger-broken` for a reply never reserved.
        """
        path = self.reply_path(approval, round_number)
        reserved, settled = (self._line(approval, kind, round_number) for kind in ("reserve", "settle"))
        if reserved is None:
            if path.exists():
                raise Refusal("ledger-broken", f"{path} is there, its reservation is not")
            return None
        if reserved["state"] != state:
            raise Refusal("round-already-answered")
        if settled is None:
            return path if path.exists() else None
        if not path.exists() or sha256_file(path) != settled["reply"]:
            raise Refusal("reply-broken", str(path))
        return path

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
            Refusal: `budget-exhausted` beyond the earmarked schedule or after the study was closed;
                `round-already-answered` for a round that was settled, closed as spent, or reserved for
                anything else.
        """
        (earmark,) = self.of(approval, "earmark")
        asked = {"state": state, "sigma": sigma, "rate": rate, "steps": steps, "tau": tau}
        used = sum(count for _, _, count in self.history(approval))
        if self.of(approval, "close"):
            raise Refusal("budget-exhausted", "the study is closed")
        earlier = self._line(approval, "reserve", round_number)
        if earlier is not None:
            if self._line(approval, "spent", round_number):
                raise Refusal("round-already-answered", "an earlier attempt failed and counts as spent")
            if self._line(approval, "settle", round_number) or any(earlier[k] != v for k, v in asked.items()):
                raise Refusal("round-already-answered")
            return Reservation(earlier["sequence"], earlier["hash"], reused=True)
        weaker = sigma < earmark["sigma"] or rate > earmark["rate"]
        if used + steps > earmark["steps"] or weaker:
            raise Refusal("budget-exhausted", f"{used} of {earmark['steps']} steps used")
        line = self._append("reserve", approval=approval, round=round_number, **asked)
        return Reservation(line["sequence"], line["hash"], reused=False)

    def settle(self, approval: str, round_number: int, reply: bytes) -> Path:
        """Store the reply whole, then write that it is there. Only the stored file may be sent."""
        path = self.reply_path(approval, round_number)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        sync_folder(self.folder)  # or a power cut could leave a settle line without its reply
        write_atomic(path, reply, mode=0o600)
        self.note_settled(approval, round_number, reply)
        return path

    def note_settled(self, approval: str, round_number: int, reply: bytes) -> None:
        """Write the settle line, once: after a crash between store and settle it may be missing."""
        if self._line(approval, "settle", round_number) is None:
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

    def tap(self, approval: str, coins: str) -> None:
        """Commit to an approval's coins before anything of the study is known."""
        commitment = hashlib.sha256(coins.encode()).hexdigest()
        self._append("tap", approval=approval, coordinates=len(coins), coins=commitment)

    def anchor(self) -> None:
        """Write a line, and with it a new head, because a person accepts a chain that had lost its own."""
        self._append("anchor")

    def reply_path(self, approval: str, round_number: int) -> Path:
        """Where a round's reply is stored."""
        return self.folder / "replies" / f"{approval}-{round_number:04d}.safetensors"

    def _line(self, approval: str, kind: str, round_number: int) -> Line | None:
        """The line of one kind for a round, if it is there; there is at most one."""
        return next((line for line in self.of(approval, kind) if line["round"] == round_number), None)

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


@contextmanager
def open_ledger(folder: Path, *, headless: bool = False) -> Iterator[Ledger]:
    """Hold a site's ledger under its lock.

    Args:
        folder: The site's home.
        headless: As in `inspect`.

    Raises:
        Refusal: `another-process` holds it; `ledger-missing`; `ledger-broken` with the line's number.
    """
    if not (folder / "ledger.jsonl").exists():
        raise Refusal("ledger-missing", str(folder / "ledger.jsonl"))
    with _lock(folder):
        yield Ledger(folder, read_lines(folder, headless=headless))


def create_ledger(folder: Path, site: str, *, simulated: bool) -> None:
    """Start a site's ledger. Once only: a site has one ledger for its whole patient population.

    Raises:
        Refusal: `ledger-missing` where the site approved a study before but its ledger is gone.
    """
    path = folder / "ledger.jsonl"
    with _lock(folder):
        if path.exists() and b"\n" in path.read_bytes():
            return
        if any((folder / name).exists() for name in ("ledger.head", "approvals", "replies")):
            raise Refusal("ledger-missing", f"{folder} approved a study before")
        path.unlink(missing_ok=True)  # no whole line: a creation that was killed
        Ledger(folder, [])._append("open", site=site, simulated=simulated)
        sync_folder(folder)


def read_lines(folder: Path, *, headless: bool = False) -> list[Line]:
    """Read and verify a ledger whose lock is held.

    A torn last line (a crash while it was written; nothing can have followed it) is moved to
    `ledger.torn` and named on the terminal.

    Raises:
        Refusal: As `inspect`.
    """
    lines, torn = inspect(folder, headless=headless)
    if torn:
        from polyclinic.common.progress import say

        path = folder / "ledger.jsonl"
        write_atomic(folder / "ledger.torn", torn, mode=0o600)
        write_atomic(path, path.read_bytes().removesuffix(torn), mode=0o600)
        say(f"{path}: a torn last line was set aside in ledger.torn")
    return lines


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
