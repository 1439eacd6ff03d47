"""A ledger in a folder of its own, and the ways the tests use it."""

import os
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from polyclinic.client.ledger import Ledger
from polyclinic.client.ledger_books import Books, create_ledger, open_books
from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.wire import ReplyFacts, pack_reply

# A reply's facts, of which only the head that they echo matters here.
EMPTY: dict[str, Any] = {
    field.name: {"int": 0, "float": 0.0, "str": ""}[str(field.type)] for field in fields(ReplyFacts)
}
SIGMA, RATE, STEPS = 1.0, 0.1, 10
STATE = "5" * 64


def new(
    folder: Path, approvals: tuple[str, ...] = ("a",), *, epsilon: float = 5.0, total: int = 1000
) -> Path:
    folder.mkdir(exist_ok=True)
    create_ledger(folder, "site", simulated=True)
    with open_books(folder) as ledger:
        for approval in approvals:
            earmark(ledger, approval, epsilon, total)
    return folder


def earmark(
    ledger: Books,
    approval: str,
    epsilon: float,
    total: int = 1000,
    cap: float = 10.0,
    delta_cap: float = 1e-3,
) -> None:
    ledger.earmark(
        approval=approval,
        study="s",
        sigma=SIGMA,
        rate=RATE,
        steps=total,
        delta=1e-5,
        epsilon=epsilon,
        cap=cap,
        delta_cap=delta_cap,
    )


def reserve(ledger: Ledger, number: int, **changes: Any) -> Any:
    values = {"approval": "a", "item": number, "state": STATE, "sigma": SIGMA, "rate": RATE}
    return ledger.reserve(**{**values, "steps": STEPS, "tau": 1e-4, **changes})


def kinds(folder: Path) -> list[str]:
    return [line["kind"] for line in read_lines(folder)]


def answer(folder: Path, number: int, state: str = STATE) -> bytes:
    """A round as `client/training.py` does it, with random bytes for a reply."""
    with open_books(folder) as ledger:
        stored = ledger.stored_reply("a", number, state)
        if stored is not None:
            reply = stored.read_bytes()
            ledger.note_settled("a", number, reply)
            return reply
        reserve(ledger, number, state=state)
        ledger.settle("a", number, os.urandom(3000))
        return ledger.reply_path("a", number).read_bytes()


def answered(home: Path, numbers: range, approval: str = "a") -> None:
    """Answer rounds with replies that echo the ledger as real ones do."""
    for number in numbers:
        with open_books(home) as ledger:
            place = reserve(ledger, number, approval=approval)
            facts = ReplyFacts(**EMPTY | {"ledger_sequence": place["sequence"], "ledger_hash": place["hash"]})
            ledger.settle(approval, number, pack_reply({"w": torch.zeros(2)}, facts))


def in_child(work: Callable[[], None]) -> int:
    """Fork a real process; it never returns into pytest."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_flush(instant: int) -> None:
    """Make this process kill itself when it flushes to disk for the `instant`-th time, from 0."""
    left, flush = [instant], os.fsync

    def fsync(handle: int) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        flush(handle)

    setattr(os, "fsync", fsync)  # noqa: B010 - a plain assignment has another type
