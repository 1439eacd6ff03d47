"""`kill -9` of every part at two moments each: the study ends as it would have, and nothing is spent twice.

A calm run first, without privacy and with the test key, which also gives the figures; then the same
training as another study, with a kill or two a round.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import pytest
from safetensors.torch import load_file, save_file

from polyclinic.client.ledger_view import verify
from polyclinic.common.cost import read_costs
from tests.e2e.federation import PATIENTS, SITES, Federation, call, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

A, B = SITES
ROUNDS = 6
POLICY = f"declared_patients = {PATIENTS}\nallow_not_private = true\nallow_test_randomness = true\n"


@pytest.fixture(scope="module")
def calm(federation: Federation) -> Path:
    """The undisturbed run."""
    study = open_study(federation, "calm")
    for who in ("server", *SITES):
        federation.start(who)
    with peaks(federation) as peak:
        federation.run(study)
    figures = {
        "seconds a round outside training": outside_training(federation, study),
        "bytes a round": bytes_of_a_round(federation, study),
        "peak memory, MB": {name: round(peak[name] / 1e6) for name in sorted(peak)},
    }
    print(json.dumps(figures, indent=1))
    if path := os.environ.get("E2E_FIGURES"):
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")
    return study


def open_study(federation: Federation, name: str) -> Path:
    study = federation.write_study(name, private=False, rounds=ROUNDS, steps=10)
    resolved = federation.resolved(study)
    for site in SITES:
        (federation.home(site) / "policy.toml").write_text(POLICY)
        federation.approve(site, resolved)
    return study


# -- figures -------------------------------------------------------------------------------------


def outside_training(federation: Federation, study: Path) -> float:
    """Mean seconds of a round less the slower site's training."""
    costs = [row for site in SITES for row in read_costs(federation.home(site) / "cost.jsonl")]
    overhead = [
        federation.record(study, number)["seconds"]
        - max(row["wall_s"] for row in costs if row["phase"] == "train" and row["round"] == number)
        for number in range(1, ROUNDS + 1)
    ]
    return float(mean(overhead))


def bytes_of_a_round(federation: Federation, study: Path) -> dict[str, float]:
    found = [federation.record(study, number) for number in range(1, ROUNDS + 1)]
    return {way: mean(record[f"bytes_{way}"] for record in found) for way in ("down", "up")}


@contextmanager
def peaks(federation: Federation) -> Iterator[dict[str, int]]:
    """Watch the highest resident memory of each kind of process while a block runs."""
    peak: dict[str, int] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            found = {f"coordinator {name}": fact["pid"] for name, fact in federation.parts("server").items()}
            found["coordinator ServerApp"] = federation.task("server")
            for name, fact in federation.parts(A).items():
                found[f"site {name}"] = fact["pid"]
            found["site ClientApp"] = federation.task(A)
            for name, pid in found.items():
                with suppress(OSError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    high = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
                    peak[name] = max([peak.get(name, 0), *(1024 * int(kib) for kib in high)])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


# -- blows ---------------------------------------------------------------------------------------


@dataclass
class Storm:
    """A study that is run, and run on with `--resume` whenever its ServerApp was lost.

    Attributes:
        study: The study.
        running: The command that runs it now.
        since: When it began.
        resumes: Rounds that were open when it had to be resumed.
    """

    federation: Federation
    study: Path
    running: subprocess.Popen[bytes]
    since: float = field(default_factory=time.time)
    resumes: list[int] = field(default_factory=list)

    def reserved(self, site: str, number: int) -> bool:
        return any(x["round"] == number for x in self.federation.lines(site, self.study, "reserve"))

    def settled(self, site: str, number: int) -> bool:
        return any(x["round"] == number for x in self.federation.lines(site, self.study, "settle"))

    def training(self, site: str, number: int) -> bool:
        return self.reserved(site, number) and not self.settled(site, number)

    def taken(self, site: str, number: int) -> bool:
        """The message is there, the reservation is not yet."""
        asked = [x for x in self.federation.journal(site, "in") if float(x["created_at"]) > self.since]
        return any(x["round"] == str(number) for x in asked) and not self.reserved(site, number)

    def replied(self, site: str, number: int) -> bool:
        """The coordinator has the reply; the round may wait for others."""
        progress = self.federation.progress(self.study)
        here = progress.get("round") == number and progress["sites"].get(site) == "replied"
        return here or self.federation.released(self.study) >= number

    def kill(self, who: str, part: str) -> Callable[[], None]:
        return lambda: self.federation.kill(who, part)

    def kill_task(self, who: str) -> Callable[[], None]:
        def blow() -> None:
            task = self.federation.task(who)
            assert task, f"{who} runs no task"  # process 0 would mean all of us
            os.kill(task, signal.SIGKILL)

        return blow

    def strike(self, *blows: tuple[Callable[[], bool], Callable[[], None]], seconds: float = 240) -> None:
        """Wait for each blow's moment and strike."""
        left, end = list(blows), time.monotonic() + seconds
        while left:
            for blow in [blow for blow in left if blow[0]()]:
                blow[1]()
                left.remove(blow)
            self.tend()
            assert time.monotonic() < end, f"{len(left)} moments never came"
            time.sleep(0.02)

    def tend(self) -> None:
        """Resume the run where its command says that it ended before its time."""
        code = self.running.poll()
        if code not in (None, 0):
            assert code == 3
            self.resumes.append(self.federation.released(self.study) + 1)
            assert len(self.resumes) < 10
            self.running = self.federation.run_in_background(self.study, "--resume")

    def end(self, seconds: float = 400) -> None:
        def over() -> bool:
            self.tend()
            return self.running.poll() == 0

        wait_for(over, "the study is over", seconds)


@pytest.fixture(scope="module")
def storm(federation: Federation, calm: Path) -> Storm:
    study = open_study(federation, "storm")
    storm = Storm(federation, study, federation.run_in_background(study))
    storm.strike(
        (lambda: storm.training(A, 1), storm.kill_task(A)),
        (lambda: storm.training(B, 1), storm.kill(B, "supernode")),
    )
    storm.strike(
        (lambda: storm.taken(B, 2), storm.kill_task(B)),
        (lambda: storm.replied(A, 2), storm.kill(A, "supernode")),
    )
    storm.strike((lambda: storm.training(A, 3), storm.kill("server", "gateway")))
    storm.strike((lambda: storm.replied(A, 3) or storm.replied(B, 3), storm.kill("server", "superlink")))
    storm.strike((lambda: storm.training(A, 4), storm.kill("server", "superexec")))
    storm.strike((lambda: storm.replied(B, 4), storm.kill("server", "gateway")))
    # The ServerApp is the one part that a person has to start again: once here, while it waits or combines.
    storm.strike((lambda: storm.replied(A, 4) and bool(federation.task("server")), storm.kill_task("server")))
    storm.strike(
        (lambda: storm.training(A, 5), storm.kill("server", "superlink")),
        (lambda: storm.replied(A, 5), storm.kill(A, "superexec")),
    )

    def lose_a_round() -> None:
        """The ServerApp dies, superexec as well before it can start another, and the last release is lost."""
        storm.kill_task("server")()
        storm.kill("server", "superexec")()
        shutil.rmtree(federation.run_dir(study) / "checkpoints" / "round-0005")

    storm.strike((lambda: storm.training(A, 6), lose_a_round))
    storm.end()
    return storm


# -- what came of it -----------------------------------------------------------------------------


def test_every_round_ends_as_it_would_have(federation: Federation, calm: Path, storm: Storm) -> None:
    for number in range(1, ROUNDS + 1):
        found = federation.record(storm.study, number)
        assert found["state_hash"] == federation.record(calm, number)["state_hash"]
        assert sorted(found["replied"]) == sorted(SITES)
        assert [found["refused"], found["rejected"], found["absent"]] == [{}, {}, []]
    assert (federation.run_dir(storm.study) / "report.html").stat().st_size > 10_000
    # Only a killed ServerApp needs a person, and then one command.
    print(f"resumed in rounds {storm.resumes}")


def test_no_budget_is_spent_twice(federation: Federation, storm: Storm) -> None:
    for site in SITES:
        for kind in ("reserve", "settle"):
            lines = federation.lines(site, storm.study, kind)
            assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
        assert not federation.lines(site, storm.study, "spent")
        verify(federation.home(site), [])
        call("client", "journal", "verify", "--home", federation.home(site))


def test_what_was_killed_runs_again(federation: Federation, storm: Storm) -> None:
    for who, part in (
        ("server", "superlink"),
        ("server", "superexec"),
        ("server", "gateway"),
        (A, "supernode"),
        (A, "superexec"),
        (B, "supernode"),
    ):
        assert federation.parts(who)[part]["restarts"] >= 1, (who, part)
    call("server", "health", "--home", federation.server)


def test_the_same_state_again_is_answered_from_the_store(federation: Federation, storm: Storm) -> None:
    """Round 5 was lost by the coordinator after it was released, and asked again."""
    for site in SITES:
        asked = {
            line["message"]
            for line in federation.journal(site, "in")
            if line["round"] == "5" and float(line["created_at"]) > storm.since
        }
        said = [line for line in federation.journal(site, "out") if line["reply_to"] in asked]
        assert "answered again" in [line["outcome"] for line in said]
        assert len({line["sha256"] for line in said if line["outcome"].startswith("answered")}) == 1


def test_another_state_is_refused(federation: Federation, storm: Storm) -> None:
    before = {site: (federation.home(site) / "ledger.jsonl").read_bytes() for site in SITES}
    checkpoints = federation.run_dir(storm.study) / "checkpoints"
    shutil.rmtree(checkpoints / "round-0006")
    path = checkpoints / "round-0005" / "state.safetensors"
    state = load_file(path)
    state[min(state)] += 0.5
    save_file(state, path)
    said = federation.run(storm.study, "--resume", code=3).stderr
    assert "1020 run-unfinished" in said
    phase = federation.progress(storm.study)["phase"]
    assert phase.startswith("failed: ")
    for site in SITES:
        assert f"'{site}': '1007 round-already-answered'" in phase
        assert federation.journal(site, "out")[-1]["outcome"] == "1007 round-already-answered"
        assert (federation.home(site) / "ledger.jsonl").read_bytes() == before[site]


def test_figures_of_the_calm_run(federation: Federation, calm: Path) -> None:
    """What the closing note quotes; bounds that only a blunder passes."""
    assert 0 < outside_training(federation, calm) < 120
    assert bytes_of_a_round(federation, calm)["up"] < 2.1 * 8.4e6
