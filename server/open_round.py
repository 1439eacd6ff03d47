"""A round while it is open: who was asked when, who has answered, what is still out."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from polyclinic.common.generators.base import Tensors
from polyclinic.common.progress import duration, say
from polyclinic.common.study import Resolved
from polyclinic.common.wire import ReplyFacts
from polyclinic.server.progress_file import Board
from polyclinic.server.spool import Spooled

# Seconds before a site is asked again (doubled each time).
ASK_AGAIN_S, SLOWEST_ASK_AGAIN_S = 5.0, 60.0
TELL_S = 30.0  # after the last reply, before it is said who is waited for
REASONS_S = 15.0  # for which reasons are heard, where too few sites are left for a release
WAITING = {False: "not here", True: "asked"}


@dataclass
class OpenRound:
    """A round while it is open.

    Attributes:
        like: Names and shapes of a difference.
        content: What every site is sent, a Flower RecordDict.
        tap: Names and shapes of the tap's tensors in this round.
        longest: A longer difference is thrown away.
        end: When it ends at the latest, on the monotonic clock.
        everyone: Sites that should take part or were asked.
        usual: Seconds in which a site should have answered, as far as nothing else is known.
        asked: How often each site was asked.
        since: When it was asked last, on the monotonic clock.
        took: Seconds from then to its reply.
        down: Site to the bytes it was sent.
        up: Site to the bytes of its reply.
        pending: Message to site; a site that was asked again may have several.
        again: Site to when it may be asked again.
        questions: Question whether it is at work (silence.py) to the site that was asked it.
        questioned: How often it was.
        grace: The quorum has answered.
        lost: Too few sites are left for a release.
        withdrawn: Sites that were put out while they were waited for.
        told: It was said who is missing.
    """

    number: int
    resolved: Resolved
    board: Board
    like: Tensors
    content: Any
    tap: Tensors
    longest: float
    end: float
    everyone: set[str]
    usual: float
    asked: dict[str, int] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)
    again: dict[str, float] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)
    questioned: dict[str, int] = field(default_factory=dict)
    differences: dict[str, Spooled] = field(default_factory=dict)
    facts: dict[str, ReplyFacts] = field(default_factory=dict)
    taps: dict[str, Tensors] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    grace: bool = False
    lost: bool = False
    withdrawn: set[str] = field(default_factory=set)
    told: bool = False

    def outstanding(self) -> set[str]:
        """Sites that may still answer."""
        over = self.differences.keys() | self.rejected.keys() | (self.refused.keys() - self.again.keys())
        return self.everyone - over - self.withdrawn

    def withdraw(self, sites: Collection[str]) -> None:
        """Wait no longer for sites that were put out of the federation."""
        for site in sorted(self.outstanding().intersection(sites)):
            say(f"round {self.number}: {site} was revoked and is not waited for")
            self.withdrawn.add(site)
            self.settle(site)

    def say_who_is_missing(self) -> None:
        """Where a release is certain and a site holds it up, say which, and what can be done, once."""
        settings, left = self.resolved.study.federation, self.end - time.monotonic()
        last = max((self.since[site] + took for site, took in self.took.items()), default=math.inf)
        if self.told or self.grace or len(self.took) < settings.min_sites or time.monotonic() - last < TELL_S:
            return
        self.told = True
        names = ", ".join(f"{site} ({WAITING[site in self.asked]})" for site in sorted(self.outstanding()))
        say(
            f"round {self.number}: replies of {len(self.took)} sites are here; waiting at most "
            f"{duration(left)} for {names}. If a site will not come: `polyclinic-server revoke SITE` lets "
            "this round and the later ones go on without it (`reissue` takes it in again)"
        )

    def begin_grace(self) -> None:
        """Where the quorum has answered, let the round end soon."""
        settings = self.resolved.study.federation
        there = len(self.everyone - self.withdrawn)
        quorum = min(settings.quorum or there, there)
        if not self.grace and len(self.differences) >= quorum:
            self.grace = True
            self.end = min(self.end, time.monotonic() + settings.grace_s)
            self.board.phase("training", self.end - time.monotonic())

    def begin_loss(self) -> None:
        """Where a release is out of reach, let the round end soon: not at once, to hear every reason."""
        if not self.lost:
            self.lost, self.end = True, min(self.end, time.monotonic() + REASONS_S)

    def waiting(self, site: str) -> list[str]:
        """Messages that a site may still answer."""
        return [message for message, other in self.pending.items() if other == site]

    def ask_later(self, site: str) -> None:
        """Ask a site again after a pause, which doubles: it may be down for hours."""
        pause = min(ASK_AGAIN_S * 2.0 ** (self.asked[site] - 1), SLOWEST_ASK_AGAIN_S)
        self.again[site] = time.monotonic() + pause

    def settle(self, site: str) -> None:
        """Wait for nothing more from a site: it has answered for good."""
        self.again.pop(site, None)
        for message in self.waiting(site):
            del self.pending[message]
