"""A site that has been silent for long: asked again where something was lost, left alone where it works."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from polyclinic.common.generators.public import hash_state
from polyclinic.common.refusals import REASONS
from polyclinic.server import silence
from polyclinic.server.open_round import OpenRound
from polyclinic.server.progress_file import Board
from polyclinic.server.replies import payload_bytes
from tests.server.rounds_home import Answer, Sites, decoded, hurry, moves_by, one_round, resolved


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


class SuperNodes(Sites):
    """Sites as Flower's SuperNodes are: each takes one message at a time, and none that has expired.

    Attributes:
        seconds: How long a site is at work on a round; a question takes no time.
        losing: What is lost on the way to or from a site, in order: `train message`, `query.idle reply`.
        held: Sites whose replies wait on the way until they were asked a second time.
        took: What each site has taken, in order.
    """

    def __init__(self, answers: dict[str, Answer]) -> None:
        super().__init__(answers)
        self.seconds: dict[str, float] = {}
        self.losing: dict[str, list[str]] = {}
        self.held: set[str] = set()
        self.took: list[tuple[str, str]] = []
        self._queues: dict[str, list[Message]] = {name: [] for name in answers}
        self._busy: dict[str, tuple[Message, float] | None] = dict.fromkeys(answers)
        self._replies: dict[str, Message] = {}
        self.sent = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        ids = list(super().push_messages(pushed))
        for message in pushed:
            self._waiting.remove(message)
            self._queues[self.name_of(message)].append(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for site in self._queues:
            self._work(site)
        (wanted,) = message_ids
        (message,) = (message for _, message in self.asked if message.metadata.message_id == wanted)
        if _is_over(message):  # as Flower's SuperLink says it, whatever has become of the reply
            return [Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "expired"), reply_to=message)]
        reply = self._replies.get(wanted)
        if reply is None or self._is_held(reply):
            return []
        return [self._replies.pop(wanted)]

    def _is_held(self, reply: Message) -> bool:
        (site,) = (site for site, message in self.asked if message.metadata.message_id == _answered(reply))
        rounds = [name for name, message in self.asked if message.metadata.message_type == "train"]
        return site in self.held and reply.has_content() and len(reply.content) > 0 and rounds.count(site) < 2

    def _work(self, site: str) -> None:
        busy = self._busy[site]
        if busy is not None:
            message, end = busy
            if time.monotonic() < end:
                return
            self._busy[site] = None
            reply = self._answer(message)
            self.sent += 1
            if self._lost(site, message, "reply"):
                return
            self._replies[message.metadata.message_id] = reply
        while self._queues[site] and self._busy[site] is None:
            message = self._queues[site].pop(0)
            if not _is_over(message) and not self._lost(site, message, "message"):
                self.took.append((site, message.metadata.message_type))
                at_work = message.metadata.message_type == "train"
                self._busy[site] = message, time.monotonic() + at_work * self.seconds.get(site, 0.0)

    def _lost(self, site: str, message: Message, what: str) -> bool:
        losing = self.losing.get(site, [])
        if losing[:1] != [f"{message.metadata.message_type} {what}"]:
            return False
        losing.pop(0)
        return True


def _is_over(message: Message) -> bool:
    return bool(time.time() > message.metadata.created_at + message.metadata.ttl)


def _answered(reply: Message) -> str:
    return str(reply.metadata.reply_to_message_id)


def rounds_asked(grid: Sites) -> list[str]:
    return [site for site, message in grid.asked if message.metadata.message_type == "train"]


@pytest.mark.parametrize(
    "lost",
    [
        ["train reply"],
        ["train message"],
        ["train reply", "train reply"],
        ["train message", "query.idle message", "train reply"],
        ["train reply", "query.idle reply", "query.idle message"],
    ],
)
def test_what_was_lost_is_asked_for_again(
    tmp_path: Path, lost: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = SuperNodes({"x": moves_by(1.0), "y": moves_by(3.0)})
    grid.losing = {"y": list(lost)}
    again = sum(what.startswith("train") for what in lost)
    after = one_round(tmp_path, grid, resolved(deadline_s=60.0), expected=["x", "y"])
    assert torch.equal(after.state["a"], torch.full((3,), 2.0))
    assert (after.record.refused, after.record.absent) == ({}, [])
    assert rounds_asked(grid) == ["x", "y"] + ["y"] * again
    first, *_, last = (m for site, m in grid.asked if (site, m.metadata.message_type) == ("y", "train"))
    # The same question: the site recognises it, and answers from its store if it has answered.
    assert hash_state(decoded(last)) == hash_state(decoded(first))
    assert 50.0 < last.metadata.ttl < first.metadata.ttl
    assert after.record.bytes_down == (2 + again) * payload_bytes(first.content)
    assert after.record.bytes_up == 2 * payload_bytes(moves_by(1.0)(first).content)
    assert "y has nothing more to send" in capsys.readouterr().err


def test_a_slow_site_is_left_alone(tmp_path: Path) -> None:
    grid = SuperNodes({"x": moves_by(1.0), "y": moves_by(3.0)})
    grid.seconds = {"y": 1.5}  # against 0.2 s of silence
    after = one_round(tmp_path, grid, resolved(deadline_s=60.0), expected=["x", "y"])
    assert torch.equal(after.state["a"], torch.full((3,), 2.0))
    assert rounds_asked(grid) == ["x", "y"]
    assert [site for site, kind in grid.took if kind == "train"] == ["x", "y"]
    questions = [message for _, message in grid.asked if message.metadata.message_type == silence.QUESTION]
    assert 1 <= len(questions) <= 4  # at 0.2, 0.4, 0.8 and 1.6 s
    assert all(payload_bytes(message.content) == 0 for message in questions)
    assert after.record.bytes_down == 2 * payload_bytes(grid.asked[0][1].content)


def test_a_late_first_reply_is_taken_and_counted_once(tmp_path: Path) -> None:
    """The site was asked again, is at work on that for long, and then the first reply turns up."""
    grid = SuperNodes({"x": moves_by(1.0), "y": moves_by(3.0)})
    grid.held = {"y"}

    def second_takes_long(message: Message) -> Message:
        grid.seconds["y"] = 60.0
        return moves_by(3.0)(message)

    grid._app = Sites({"x": moves_by(1.0), "y": second_takes_long})._app
    after = one_round(tmp_path, grid, resolved(deadline_s=30.0), expected=["x", "y"])
    assert rounds_asked(grid) == ["x", "y", "y"]
    assert torch.equal(after.state["a"], torch.full((3,), 2.0))
    assert (after.record.refused, after.record.absent, grid.sent) == ({}, [], 3)
    assert after.record.seconds < 20


@pytest.mark.parametrize("code", [3, 4, 5, REASONS["another-process"].code])
def test_an_answer_that_does_not_show_an_idle_site_changes_nothing(tmp_path: Path, code: int) -> None:
    class Unsure(SuperNodes):
        def _answer(self, message: Message) -> Message:
            if message.metadata.message_type == silence.QUESTION:
                return Message(Error(code, "not there, or at work"), reply_to=message)
            return super()._answer(message)

    grid = Unsure({"x": moves_by(1.0), "y": moves_by(3.0), "z": moves_by(3.0)})
    grid.losing = {"z": ["train reply"]}
    record = one_round(tmp_path, grid, resolved(deadline_s=1.5), expected=["x", "y", "z"]).record
    assert (rounds_asked(grid), record.absent) == (["x", "y", "z"], ["z"])
    assert ("z", silence.QUESTION) in grid.took


def test_patience_follows_the_others_and_doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "SILENT_S", 60.0)
    opened = OpenRound(
        number=1, resolved=resolved(), board=Board(tmp_path, resolved()), like={},
        content=RecordDict(), tap={}, longest=0.0,
        end=0.0, everyone={"x", "y"}, usual=300.0,
    )  # fmt: skip
    assert silence.patience(opened, "y") == 600.0
    opened.took = {"x": 100.0, "z": 40.0}
    assert silence.patience(opened, "y") == 200.0
    opened.took = {"x": 1.0}
    assert silence.patience(opened, "y") == 60.0
    opened.questioned = {"y": 2}
    assert silence.patience(opened, "y") == 240.0
