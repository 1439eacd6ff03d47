"""Sites of the round loop's tests: what they answer, and grids that lose, delay and refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from polyclinic.common.generators.base import Tensors
from polyclinic.common.generators.public import hash_state
from polyclinic.common.refusals import REASONS
from polyclinic.common.study import CODE_VERSION, Resolved, parse_study
from polyclinic.common.wire import ReplyFacts, pack_reply, reply_records
from polyclinic.common.wire_reading import read_order
from polyclinic.server import open_round, rounds, silence
from polyclinic.server.checkpoints import Checkpoint, RoundRecord
from polyclinic.server.progress_file import Board
from polyclinic.server.rounds import run_round
from polyclinic.simulation.grid import InProcessGrid, _identify

SECONDS = {
    rounds: {"POLL_S": 0.01, "SLOWEST_POLL_S": 0.05, "NAMES_S": 0.02},
    open_round: {"ASK_AGAIN_S": 0.05, "TELL_S": 0.1, "REASONS_S": 0.3},
    silence: {"SILENT_S": 0.2, "QUESTION_S": 0.3},
}

Answer = Callable[[Message], Message]

FACTS = ReplyFacts(
    round=1,
    sigma=1.0,
    sampling_rate=0.1,
    steps=20,
    clip=1.0,
    divisor=5.0,
    tau=1e-4,
    epsilon=1.5,
    delta=1e-5,
    code_version=CODE_VERSION,
    base_hash="b",
    study_hash="x",
    approval="x",
    ledger_sequence=1,
    ledger_hash="x",
    flops=1.0,
)


def facts_for(message: Message, **changes: Any) -> ReplyFacts:
    """Facts that fit what a message asks for."""
    order, _ = read_order(message.content)
    return dataclasses.replace(FACTS, round=order.round, study_hash=order.study_hash, **changes)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often: what is tested is what happens, not how long a pause is."""
    for module, pauses in SECONDS.items():
        for name, seconds in pauses.items():
            monkeypatch.setattr(module, name, seconds)


def start_state() -> Tensors:
    return {"a": torch.zeros(3), "b": torch.ones(2, 2)}


def start() -> Checkpoint:
    state = start_state()
    return Checkpoint(RoundRecord(round=0, state_hash=hash_state(state)), state, start_state())


def resolved(**federation: Any) -> Resolved:
    """A study of three rounds without a tap, whose sites may move a weight by 50 or so."""
    study = parse_study(
        {
            "name": "loop",
            "evaluation": {"prompts": [{"text": "a"}]},
            "training": {"rounds": 3, "learning_rate": 1.0},
            "privacy": {"canaries": 0},
            "federation": {"grace_s": 0.0, "deadline_s": 2.0, **federation},
        },
        "test",
    )
    return Resolved(study=study, base_hash="b", start_hash="s", reference_hash="r")


def decoded(message: Message) -> Tensors:
    return read_order(message.content)[1]("bf16")


def moves_by(amount: float) -> Answer:
    def answer(message: Message) -> Message:
        difference = {name: torch.full_like(tensor, amount) for name, tensor in decoded(message).items()}
        return Message(reply_records(pack_reply(difference, facts_for(message))), reply_to=message)

    return answer


def fails(code: int) -> Answer:
    return lambda message: Message(Error(code, "Traceback: private text"), reply_to=message)


refuses = fails(REASONS["budget-exhausted"].code)


def sends_other_shapes(message: Message) -> Message:
    difference = {"a": torch.zeros(4), "b": torch.ones(2, 2)}
    return Message(reply_records(pack_reply(difference, facts_for(message))), reply_to=message)


def in_turn(*answers: Answer) -> Answer:
    """Answer one way after the other, and the last way from then on."""
    left = list(answers)
    return lambda message: (left.pop(0) if len(left) > 1 else left[0])(message)


class Sites(InProcessGrid):  # type: ignore[misc]
    """A grid of sites that answer as given, come and go.

    Attributes:
        online: Names of the sites that are there; all at first.
        lost: Sites whose replies never arrive.
        asked: Name of each site that was sent a message, in order, and the message.
    """

    def __init__(self, answers: dict[str, Answer]) -> None:
        app = ClientApp()

        @app.train()  # type: ignore[untyped-decorator]
        def train(message: Message, context: Context) -> Message:
            return answers[Path(str(context.node_config["home"])).name](message)

        @app.query("idle")  # type: ignore[untyped-decorator]
        def idle(message: Message, context: Context) -> Message:
            return Message(RecordDict(), reply_to=message)

        _identify(1)
        super().__init__([Path("/sites") / name for name in answers], app)
        self.online = set(answers)
        self.lost: set[str] = set()
        self.asked: list[tuple[str, Message]] = []

    def name_of(self, message: Message) -> str:
        return str(self._homes[message.metadata.dst_node_id].name)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [node for node in super().get_nodes() if node.name in self.online]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        self.asked += [(self.name_of(message), message) for message in pushed]
        return super().push_messages(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (wanted,) = message_ids  # one at a time, or memory would grow with the sites
        heard = {x.metadata.message_id for x in self._waiting if self.name_of(x) not in self.lost}
        return super().pull_messages({wanted} & heard)


def one_round(run_dir: Path, grid: InProcessGrid, study: Resolved | None = None, **more: Any) -> Checkpoint:
    study = study or resolved()
    with Board(run_dir, study) as board:
        return run_round(grid, study, start(), 1, board=board, **more)
