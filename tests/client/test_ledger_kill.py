"""PRIVACY.md, rule 9: kill -9 at random instants, and processes that race for the last of the budget.

A site's home lives through process after process, each killed, until its rounds are answered. Every
process is a fork of this one, so torch is imported once. What a process released it writes to a pipe,
as it would to the network: what the ledger says must hold against that.
"""

import hashlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from polyclinic.client.approval import prepare_and_approve
from polyclinic.client.ledger_books import open_books
from polyclinic.client.ledger_chain import read_lines
from polyclinic.client.training import answer_round
from polyclinic.common.generators.base import BaseFiles, trainable_state
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.generators.public import hash_base, resolve
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.refusals import Refusal
from tests.client.ledger_home import STATE, STEPS, earmark, in_child, kill_at_flush, new, reserve, wait_for

ROUNDS = 4

Answer = Callable[[Path, int], bytes]
Fresh = Callable[[int], Path]
Real = tuple[Answer, Fresh]


def one_life(
    answer: Answer, home: Path, seconds: float | None, rounds: int = ROUNDS
) -> list[tuple[int, str]]:
    """Answer every round from the first on, in a process of its own that is killed after so many seconds.

    Returns:
        What it released: number of the round and hash of the bytes, in order.
    """
    out, into = os.pipe()

    def work() -> None:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for number in range(1, rounds + 1):
            os.write(into, f"{number} {hashlib.sha256(answer(home, number)).hexdigest()}\n".encode())

    child = in_child(work)
    os.close(into)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # where it has ended, it still waits for us: its id is no other's
    assert wait_for(child) in (0, -signal.SIGKILL)
    with os.fdopen(out) as pipe:
        released = [line.split() for line in pipe]
    return [(int(number), digest) for number, digest in released]


def check(home: Path, released: dict[int, set[str]]) -> str:
    """Assert what must hold whenever a process was killed; say where it was."""
    with open_books(home) as ledger:  # the next start is never blocked
        earmark = ledger.lines[1]
        approval, per_round = earmark["approval"], earmark["steps"] // ROUNDS
        reserved = Counter(line["round"] for line in ledger.of(approval, "reserve"))
        settled = {line["round"]: line["reply"] for line in ledger.of(approval, "settle")}
        paths = {number: ledger.reply_path(approval, number) for number in reserved}
        stored = {number: path.read_bytes() for number, path in paths.items() if path.exists()}
        assert set(reserved.values()) <= {1}  # charged once, however often it was begun
        assert set((home / "replies").glob("*.safetensors")) <= set(paths.values())  # nothing uncharged
        assert all(hashlib.sha256(stored[number]).hexdigest() == digest for number, digest in settled.items())
        # Released once: the same bytes whenever it was asked for, and only after they were settled.
        assert all(seen == {settled[number]} for number, seen in released.items())
        assert not ledger.of(approval, "spent")
        assert sum(steps for *_, steps in ledger.history(approval)) == per_round * len(reserved)
        really = ((earmark["sigma"], earmark["rate"], per_round * len(released)),) if released else ()
        assert ledger.epsilon(approval) >= claim(really, earmark["delta"])
    if len(stored) > len(settled):
        return "between store and settle"
    return "in training" if len(reserved) > len(stored) else "between rounds"


def kill_again_and_again(answer: Answer, fresh: Fresh, instants: int) -> Counter[str]:
    """Kill at so many random instants, each somewhere in the time that a round and a half take."""
    chance = random.Random(instants)
    home, released, homes = fresh(0), dict[int, set[str]](), 1
    start = time.monotonic()
    one_life(answer, home, None)
    span = 1.5 * (time.monotonic() - start) / ROUNDS
    home = fresh(1)
    where: Counter[str] = Counter()
    for _ in range(instants):
        for number, digest in one_life(answer, home, chance.uniform(0, span)):
            released.setdefault(number, set()).add(digest)
        where[check(home, released)] += 1
        if len(released) == ROUNDS:
            homes += 1
            home, released = fresh(homes), {}
    print(f"{instants} kills on {homes} homes, {dict(where)}, {1000 * span:.0f} ms wide")
    return where


@pytest.mark.parametrize("instants", [40, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_instants_of_the_ledgers_own_work(tmp_path: Path, instants: int) -> None:
    matrix = torch.randn(300, 300)

    def answer(home: Path, number: int) -> bytes:
        # The order of client/training.py around a training of a few milliseconds.
        with open_books(home) as ledger:
            stored = ledger.stored_reply("a", number, STATE)
            if stored is None:
                reserve(ledger, number)
                for _ in range(3):
                    matrix @ matrix
                stored = ledger.settle("a", number, os.urandom(30_000))
            reply = stored.read_bytes()
            ledger.note_settled("a", number, reply)
            return reply

    def fresh(number: int) -> Path:
        return new(tmp_path / str(number), total=STEPS * ROUNDS)

    where = kill_again_and_again(answer, fresh, instants)
    assert where["in training"] > 0
    assert where["between rounds"] > 0


@pytest.fixture
def real(tmp_path: Path, tiny_vae: Path, make_site: Any) -> Real:
    """What answers a round of a real private study, and copies of the home of a site that approved it."""
    # Only the text path trains: its noise is made in milliseconds, and the order is that of any round.
    site = make_site(
        generator={"train": "conditioning", "warm_start": "moved.safetensors"},
        privacy={"views": 1, "sampling_rate": 0.1, "epsilon": 20.0},
        training={"rounds": ROUNDS, "steps_per_round": 1},
    )
    settings = site.resolved.study.generator
    whole = Msdm(settings, 32, tiny_vae, encoders=False).module
    frozen = tmp_path / "moved.safetensors"
    generator = torch.Generator().manual_seed(1)
    save_file(
        {
            name: t + 0.03 * torch.randn(t.shape, generator=generator)
            for name, t in whole.state_dict().items()
        },
        frozen,
    )
    text = resolve(settings.text_encoder, None, "generator.text_encoder")
    base = hash_base(tiny_vae, text, settings.max_tokens, frozen)
    resolved = site.resolved.model_copy(update={"base_hash": base})
    files = BaseFiles(vae=tiny_vae, frozen=frozen)
    prepare_and_approve(site.home, "site-a", resolved, site.records, files)
    state = trainable_state(Msdm(settings, 32, tiny_vae, frozen=frozen, encoders=False).module)
    order = {number: type(site.order())(round=number, study_hash=resolved.hash) for number in range(1, 5)}

    def answer(home: Path, number: int) -> bytes:
        return answer_round(home, order[number], lambda _: state, in_time=lambda: True)

    def fresh(number: int) -> Path:
        return shutil.copytree(site.home, tmp_path / str(number))

    # Self-test and accountants once, here: a process that is forked from this one knows their answers.
    warm = fresh(999)
    for number in order:
        answer(warm, number)
    assert [line["kind"] for line in read_lines(warm)[2:]] == ["tap"] + ["reserve", "settle"] * ROUNDS
    return answer, fresh


@pytest.mark.parametrize("instants", [40, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_instants_of_a_real_round(real: Real, instants: int) -> None:
    answer, fresh = real
    where = kill_again_and_again(answer, fresh, instants)
    assert where["in training"] > 0


def test_killed_at_every_flush_of_a_real_round(real: Real) -> None:
    answer, fresh = real
    where = []
    for instant in range(9):
        home = fresh(instant)

        def stopped(home: Path, number: int, instant: int = instant) -> bytes:
            kill_at_flush(instant)
            return answer(home, number)

        released = {number: {digest} for number, digest in one_life(stopped, home, None)}
        assert not released
        where.append(check(home, released))
        after = {number: {digest} for number, digest in one_life(answer, home, None, rounds=1)}
        assert check(home, after) == "between rounds"
        assert list(after) == [1]
    assert {"in training", "between store and settle"} <= set(where)


def race(home: Path, act: Callable[[Any, int], object], runners: int = 6) -> Counter[int]:
    """Let processes run for one ledger at once; each tries until the lock is free. Counts exit codes."""
    start, go = os.pipe()

    def runner(number: int) -> None:
        os.close(go)
        os.read(start, 1)  # returns at once for all of them when the last writer is closed
        while True:
            try:
                with open_books(home) as ledger:
                    act(ledger, number)
                return
            except Refusal as refusal:
                if refusal.reason.name != "another-process":
                    os._exit(refusal.reason.code % 256)
                time.sleep(0.001)

    children = [in_child(partial(runner, number)) for number in range(runners)]
    os.close(start)
    os.close(go)
    return Counter(wait_for(child) for child in children)


def test_processes_that_race_cannot_both_spend_the_last_round(tmp_path: Path) -> None:
    for attempt in range(3):
        home = new(tmp_path / str(attempt), total=STEPS)
        codes = race(home, lambda ledger, number: reserve(ledger, number + 1))
        assert codes == {0: 1, 1003 % 256: 5}
        assert [line["kind"] for line in read_lines(home)] == ["open", "earmark", "reserve"]


def test_approvals_that_race_cannot_both_take_the_last_of_the_cap(tmp_path: Path) -> None:
    for attempt in range(3):
        home = new(tmp_path / str(attempt), (), epsilon=6.0)
        codes = race(home, lambda ledger, number: earmark(ledger, f"a{number}", 6.0))
        assert codes == {0: 1, 1003 % 256: 5}
        assert [line["kind"] for line in read_lines(home)] == ["open", "earmark"]


def test_answers_that_race_for_one_round_are_the_same_bytes(tmp_path: Path) -> None:
    home = new(tmp_path / "home", total=STEPS)

    def answer(ledger: Any, number: int) -> None:
        path = ledger.stored_reply("a", 1, STATE)
        if path is None:
            reserve(ledger, 1)
            path = ledger.settle("a", 1, os.urandom(100))
        (tmp_path / f"sent-{number}").write_bytes(path.read_bytes())

    assert race(home, answer) == {0: 6}
    assert len({path.read_bytes() for path in tmp_path.glob("sent-*")}) == 1
    assert [line["kind"] for line in read_lines(home)] == ["open", "earmark", "reserve", "settle"]
