"""`progress.json` of a run: where it stands, for whoever looks; the run itself never reads it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict

from polyclinic.common.files import write_atomic
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Resolved
from polyclinic.server.checkpoints import RoundRecord, load_record, rounds_done

NAME = "progress.json"
NOT_HERE, ASKED, REPLIED, ABSENT = "not here yet", "asked", "replied", "absent"


class Progress(BaseModel):
    """Where a run stands. Infinite epsilon (not private) is written as the string "Infinity".

    Attributes:
        run: Name of the run's folder.
        round: Round that is open, or the last one where none is.
        rounds: Rounds of the study.
        phase: `waiting for sites`, `training`, `combining`, `finished`, or `failed: ` and why.
        sites: Name to `not here yet`, `asked`, `replied`, `refused: ...`, `rejected: ...` or `absent`.
        quorum: Replies after which the grace period starts.
        min_sites: Fewer replies are never released.
        deadline: When the round (or the waiting for its sites) ends at the latest, UTC, ISO 8601.
        round_started: When the round began, or the waiting for its sites, UTC.
        epsilon: Site to what it reported with its last reply.
        bytes_down: Payload to all sites, all rounds.
        bytes_up: Payload from all sites, all rounds.
        seconds_per_round: Mean of the finished rounds.
        eta_s: Seconds the open and later rounds would take at that pace, less what the open one took.
        updated: When this was written, UTC.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    run: str
    round: int = 0
    rounds: int
    phase: str = "waiting for sites"
    sites: dict[str, str] = {}
    quorum: int = 0
    min_sites: int
    deadline: str | None = None
    round_started: str | None = None
    epsilon: dict[str, float] = {}
    bytes_down: int = 0
    bytes_up: int = 0
    seconds_per_round: float | None = None
    eta_s: float | None = None
    updated: str = ""


def read_progress(run_dir: Path) -> Progress | None:
    """Read where a run stands; None before its first line was written."""
    try:
        text = (run_dir / NAME).read_bytes()
    except FileNotFoundError:
        return None
    return Progress.model_validate_json(text)


class Board:
    """Keeps `progress.json` up to date; a `with` block around the run writes how it ended.

    Args:
        run_dir: The run.
        resolved: Its study.
    """

    def __init__(self, run_dir: Path, resolved: Resolved) -> None:
        self.run_dir = run_dir
        self._rounds: list[RoundRecord] = []
        self._began = time.monotonic()
        federation = resolved.study.federation
        self.progress = Progress(
            run=run_dir.name, rounds=resolved.study.training.rounds, min_sites=federation.min_sites
        )
        for number in rounds_done(run_dir):
            self._count(load_record(run_dir, number))

    def __enter__(self) -> Board:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.phase("finished")
        else:
            with suppress(BadInput):  # a full disk must not hide what ended the run: it may be the same disk
                # A signal that ends the ServerApp carries an exit code for a text: "failed: 0" says nothing.
                stopped = isinstance(error, SystemExit | KeyboardInterrupt)
                self.phase(f"failed: {'it was stopped' if stopped else str(error) or kind.__name__}")

    def open(self, number: int, sites: Iterable[str], quorum: int, seconds: float) -> None:
        """Say that a round waits for its sites.

        Args:
            number: Round.
            sites: Who should take part, as far as it is known.
            quorum: Replies that start the grace period.
            seconds: Until the waiting ends.
        """
        self.progress.round, self.progress.quorum = number, quorum
        self.progress.sites = dict.fromkeys(sorted(sites), NOT_HERE)
        self.progress.round_started = _utc(0)
        self._began = time.monotonic()
        self.phase("waiting for sites", seconds)

    def phase(self, phase: str, seconds: float | None = None) -> None:
        """Say what the run does now, and when that ends at the latest."""
        self.progress.phase = phase
        self.progress.deadline = None if seconds is None else _utc(seconds)
        self._write()

    def site(
        self, name: str, state: str, *, down: int = 0, up: int = 0, epsilon: float | None = None
    ) -> None:
        """Say where a site stands, and what its last message weighed and reported."""
        self.progress.sites[name] = state
        self.progress.bytes_down += down
        self.progress.bytes_up += up
        if epsilon is not None:
            self.progress.epsilon[name] = epsilon
        self._write()

    def close(self, record: RoundRecord) -> None:
        """Say that a round is released."""
        self.progress.bytes_down -= record.bytes_down  # counted message by message while it was open
        self.progress.bytes_up -= record.bytes_up
        self._count(record)
        self._write()

    def _count(self, record: RoundRecord) -> None:
        progress = self.progress
        progress.round = record.round
        progress.bytes_down += record.bytes_down
        progress.bytes_up += record.bytes_up
        for site, facts in record.replied.items():
            progress.epsilon[site] = float(facts["epsilon"])
        if record.round:
            self._rounds.append(record)
            self._began = time.monotonic()

    def _write(self) -> None:
        done, progress = self._rounds, self.progress
        if done:
            pace = sum(record.seconds for record in done) / len(done)
            left = pace * (progress.rounds - done[-1].round)
            progress.seconds_per_round = pace
            progress.eta_s = max(0.0, left - (time.monotonic() - self._began)) if left else 0.0
        progress.updated = _utc(0)
        write_atomic(self.run_dir / NAME, progress.model_dump_json(indent=1).encode())


def _utc(seconds: float) -> str:
    """The time so many seconds from now; a deadline beyond the calendar is its end."""
    try:
        when = datetime.now(UTC) + timedelta(seconds=seconds)
    except OverflowError:
        when = datetime.max.replace(tzinfo=UTC)
    return when.isoformat(timespec="seconds")
