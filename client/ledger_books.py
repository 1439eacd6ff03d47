"""What people do with a ledger between rounds: start it, set a budget aside, close it, accept a lost head.

No round calls any of this; `ledger.py` is all that a round needs. The kinds of lines written here:

* `earmark`: an approval sets a study's whole schedule aside: approval, study, sigma, rate, steps,
  delta, epsilon (the string "inf" where the study is not private), and `releases`, the noise of each
  extra release, where there are any.
* `tap`: the study's audit tap, which costs nothing: approval, number of coordinates, hash of its coins.
* `close`: a study ended; what it did not use comes back.
* `anchor`: a person accepted a whole chain whose `ledger.head` was lost.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polyclinic.client.ledger import Ledger, open_ledger
from polyclinic.common.chain import lock
from polyclinic.common.files import sync_folder
from polyclinic.common.refusals import Refusal


class Books(Ledger):
    """A ledger with what only an approval, its end, or a repair may write. Use `open_books`."""

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
        releases: dict[str, float] | None = None,
    ) -> None:
        """Set a study's whole schedule aside.

        Args:
            approval: Random id of the approval.
            study: Hash of the resolved study.
            sigma: Noise; 0 where not private.
            rate: q.
            steps: Steps of the whole schedule.
            delta: Of the guarantee.
            epsilon: Of the whole schedule, extra releases included; infinity where not private.
            cap: The site's total epsilon over all studies.
            delta_cap: The site's total delta over all studies.
            releases: Name of each extra release to its noise.

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
        self.append(
            "earmark",
            approval=approval,
            study=study,
            sigma=sigma,
            rate=rate,
            steps=steps,
            delta=delta,
            epsilon=text,
            **({"releases": releases} if releases else {}),
        )

    def close(self, approval: str) -> None:
        """End a study: what it did not use comes back."""
        if not self.of(approval, "close"):
            self.append("close", approval=approval)

    def tap(self, approval: str, coins: str) -> None:
        """Commit to an approval's coins before anything of the study is known."""
        commitment = hashlib.sha256(coins.encode()).hexdigest()
        self.append("tap", approval=approval, coordinates=len(coins), coins=commitment)

    def anchor(self) -> None:
        """Write a line, and with it a new head, because a person accepts a chain that had lost its own."""
        self.append("anchor")


def create_ledger(folder: Path, site: str, *, simulated: bool) -> None:
    """Start a site's ledger. Once only: a site has one ledger for its whole patient population.

    Raises:
        Refusal: `ledger-missing` where the site approved a study before but its ledger is gone.
    """
    path = folder / "ledger.jsonl"
    with lock(folder, "ledger"):
        if path.exists() and b"\n" in path.read_bytes():
            return
        if any((folder / name).exists() for name in ("ledger.head", "approvals", "replies")):
            raise Refusal("ledger-missing", f"{folder} approved a study before")
        path.unlink(missing_ok=True)  # no whole line: a creation that was killed
        Ledger(folder, []).append("open", site=site, simulated=simulated)
        sync_folder(folder)


@contextmanager
def open_books(folder: Path, *, headless: bool = False) -> Iterator[Books]:
    """Hold a site's ledger under its lock, as `open_ledger`."""
    with open_ledger(folder, headless=headless) as ledger:
        yield Books(ledger.folder, ledger.lines)
