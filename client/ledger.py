"""The privacy ledger: one append-only, hash-chained file for a site's whole patient population.

docs/ledger.md has the format, line by line. `round` is a number, or the name of an extra release, which is
answered, once, in the same way. What people do between rounds is in `ledger_books.py`.

Order of a round (PRIVACY.md, rule 9): reserve + fsync -> train -> store the reply in one rename ->
settle + fsync -> first byte sent. A second file, `ledger.head`, holds sequence and hash of the last line: an
anchor against lost lines. A torn last line is set aside and named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.chain import Line, append_anchored, lock
from polyclinic.common.files import sha256_file, sync_folder, write_atomic
from polyclinic.common.refusals import Refusal

if TYPE_CHECKING:
    from polyclinic.common.privacy.accounting import History

# What is answered once: a round, by its number, or an extra release, by its name.
Item = int | str


class Ledger:
    """A site's ledger, held under the site's one lock.

    Use `open_ledger`; an instance may write only inside its `with` block.
    """

    def __init__(self, folder: Path, lines: list[Line]) -> None:
        self.folder, self.lines = folder, lines

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
        from polyclinic.common.privacy.accounting import claim  # torch: seconds that few commands need

        return claim(self.history(approval), earmark["delta"])

    def stored_reply(self, approval: str, item: Item, state: str) -> Path | None:
        """Find the reply to a round that was already answered, and check that it is the settled one.

        Raises:
            Refusal: `round-already-answered` where the round was reserved for another state;
                `reply-broken` where the settled file is gone or changed: it may have been sent, so
                training again would be a second release; `ledger-broken` for a reply never reserved.
        """
        path = self.reply_path(approval, item)
        reserved, settled = (self._line(approval, kind, item) for kind in ("reserve", "settle"))
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

    def answered(self, approval: str, item: Item, state: str) -> bytes | None:
        """Read what was answered, and settle it where a crash came before; None where nothing was."""
        stored = self.stored_reply(approval, item, state)
        if stored is None:
            return None
        reply = stored.read_bytes()
        self.note_settled(approval, item, reply)
        return reply

    def reserve(
        self,
        *,
        approval: str,
        item: Item,
        state: str,
        sigma: float,
        rate: float,
        steps: int,
        tau: float,
    ) -> Line:
        """Spend before touching: reserve a round's steps, fsync'd before this returns its line.

        A line that a killed attempt left is used again: it released nothing.

        Raises:
            Refusal: `budget-exhausted` beyond the earmarked schedule or after the study was closed;
                `round-already-answered` for a round that was settled, closed as spent, or reserved for
                anything else.
        """
        (earmark,) = self.of(approval, "earmark")
        asked = {"state": state, "sigma": sigma, "rate": rate, "steps": steps, "tau": tau}
        release = isinstance(item, str)
        used = sum(line["steps"] for line in self.of(approval, "reserve") if isinstance(line["round"], int))
        if self.of(approval, "close"):
            raise Refusal("budget-exhausted", "the study is closed")
        earlier = self._line(approval, "reserve", item)
        if earlier is not None:
            if self._line(approval, "spent", item):
                raise Refusal("round-already-answered", "an earlier attempt failed and counts as spent")
            if self._line(approval, "settle", item) or any(earlier[k] != v for k, v in asked.items()):
                raise Refusal("round-already-answered")
            return earlier
        noise = earmark.get("releases", {}).get(item, float("inf")) if release else earmark["sigma"]
        if sigma < noise or rate > (1.0 if release else earmark["rate"]):
            raise Refusal("budget-exhausted", "less noise than was set aside, or not set aside")
        if (steps != 1) if release else used + steps > earmark["steps"]:
            raise Refusal("budget-exhausted", f"{used} of {earmark['steps']} steps used")
        return self.append("reserve", approval=approval, round=item, **asked)

    def settle(self, approval: str, item: Item, reply: bytes) -> Path:
        """Store the reply whole, then write that it is there. Only the stored file may be sent."""
        path = self.reply_path(approval, item)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        sync_folder(self.folder)  # or a power cut could leave a settle line without its reply
        write_atomic(path, reply, mode=0o600)
        self.note_settled(approval, item, reply)
        return path

    def note_settled(self, approval: str, item: Item, reply: bytes) -> None:
        """Write the settle line, once: after a crash between store and settle it may be missing."""
        if self._line(approval, "settle", item) is None:
            self.append("settle", approval=approval, round=item, reply=hashlib.sha256(reply).hexdigest())

    def answer(self, approval: str, item: Item, make: Callable[[], bytes]) -> bytes:
        """Make what was reserved, store it whole, settle it; these bytes, and no others, may be sent."""
        try:
            self.settle(approval, item, make())
        except Exception:
            # The attempt is seen to fail here: it counts as spent, unless its reply is already stored.
            # Its text stays at the site.
            if not self.reply_path(approval, item).exists():
                self.fail(approval, item)
            raise
        return self.reply_path(approval, item).read_bytes()

    def fail(self, approval: str, item: Item) -> None:
        """Close a reservation whose attempt this process saw fail: it counts as spent."""
        self.append("spent", approval=approval, round=item)

    def reply_path(self, approval: str, item: Item) -> Path:
        """Where a round's reply is stored."""
        name = item if isinstance(item, str) else f"{item:04d}"
        return self.folder / "replies" / f"{approval}-{name}.safetensors"

    def _line(self, approval: str, kind: str, item: Item) -> Line | None:
        """The line of one kind for a round, if it is there; there is at most one."""
        return next((line for line in self.of(approval, kind) if line["round"] == item), None)

    def append(self, kind: str, **values: Any) -> Line:
        """Add a line, then the head that anchors it; each fsync'd."""
        return append_anchored(self.folder, "ledger", self.lines, kind, values)


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
    with lock(folder, "ledger"):
        yield Ledger(folder, read_lines(folder, headless=headless))
