"""The round loop while sites and the SuperLink come and go: nobody is forgotten, nobody asked in vain."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import RunNotRunningException

from polyclinic.common.generators.base import Tensors
from polyclinic.common.generators.public import hash_state
from polyclinic.common.refusals import REASONS, Refusal
from polyclinic.common.wire import pack_reply, reply_records
from polyclinic.server import rounds
from polyclinic.server.progress_file import read_progress
from tests.server.rounds_home import (
    Sites,
    decoded,
    facts_for,
    fails,
    hurry,
    in_turn,
    moves_by,
    one_round,
    resolved,
)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def test_a_site_that_comes_late_is_asked_when_it_appears(tmp_path: Path) -> None:
    grid = Sites({"x": moves_by(1.0), "y": moves_by(1.0), "late": moves_by(4.0)})
    grid.online = {"x", "y"}

    def y_answers(message: Message) -> Message:
        time.sleep(0.2)
        grid.online.add("late")
        return moves_by(1.0)(message)

    grid._app = Sites({"x": moves_by(1.0), "y": y_answers, "late": moves_by(4.0)})._app
    study = resolved(deadline_s=60.0)
    after = one_round(tmp_path, grid, study, expected=["late", "x", "y"])
    assert torch.equal(after.state["a"], torch.full((3,), 2.0))
    ttl = {site: message.metadata.ttl for site, message in grid.asked}
    assert 59.5 < ttl["x"] <= 60.0
    # What is left of the deadline, so that a site knows what is worth beginning.
    assert ttl["late"] < ttl["y"] - 0.2


def test_no_site_trains_for_a_round_that_cannot_be_released(tmp_path: Path) -> None:
    grid = Sites({"x": moves_by(1.0), "y": moves_by(1.0)})
    grid.online = {"x"}
    with pytest.raises(Refusal, match=r"too-few-replies.*not begun: 1 of at least 2.*\['y'\]"):
        one_round(tmp_path, grid, resolved(deadline_s=0.3), expected=["x", "y"])
    assert grid.asked == []

    seen = []

    def come(_: Any) -> dict[int, str]:
        seen.append(read_progress(tmp_path))
        return {2: "x", 3: "y"} if len(seen) > 3 else {2: "x"}

    assert one_round(tmp_path, grid, resolved(deadline_s=60.0), names=come).record.absent == []
    assert {progress.phase for progress in seen[:3] if progress} == {"waiting for sites"}


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
        REASONS["another-process"].code,
    ],
)
def test_a_site_is_asked_again_when_the_way_to_it_broke(tmp_path: Path, code: int) -> None:
    grid = Sites({"x": moves_by(1.0), "y": in_turn(fails(code), fails(code), moves_by(3.0))})
    after = one_round(tmp_path, grid, resolved(deadline_s=60.0), expected=["x", "y"])
    assert (after.record.refused, after.record.absent) == ({}, [])
    assert torch.equal(after.state["a"], torch.full((3,), 2.0))
    assert [site for site, _ in grid.asked] == ["x", "y", "y", "y"]
    first, _, last = (message for site, message in grid.asked if site == "y")
    assert last.metadata.ttl < first.metadata.ttl
    # The same question: the site recognises it, and answers from its store if it has answered.
    assert hash_state(decoded(last)) == hash_state(decoded(first))


def test_flowers_error_codes_are_those_we_ask_again_for() -> None:
    codes = (3, 4, 5, 8)
    assert codes == (
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    )
    assert {*codes, 1017} == rounds.ASK_AGAIN


@pytest.mark.parametrize("quorum", [0, 3])
@pytest.mark.parametrize("came", [False, True])
def test_a_site_that_is_missed_is_named_and_not_waited_for_once_it_is_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quorum: int, came: bool
) -> None:
    grid = Sites({"x": moves_by(1.0), "y": moves_by(3.0), "z": moves_by(9.0)})
    grid.online = set("xyz" if came else "xy")
    grid.lost = {"z"}
    told: list[str] = []

    def withdrawn() -> set[str]:
        told.append(capsys.readouterr().err)
        return {"z"} if "revoke SITE" in "".join(told) else set()

    study = resolved(deadline_s=60.0, quorum=quorum)
    record = one_round(tmp_path, grid, study, expected=["x", "y", "z"], withdrawn=withdrawn).record
    assert (sorted(record.replied), record.refused, record.absent) == (["x", "y"], {}, ["z"])
    assert record.seconds < 30
    said = "".join(told) + capsys.readouterr().err
    assert f" for z ({'asked' if came else 'not here'}). If a site will not come" in said
    assert said.count("revoke SITE") == said.count("z was revoked and is not waited for") == 1


def test_a_site_that_stays_busy_or_broken_is_named(tmp_path: Path) -> None:
    answers = {"busy": fails(1017), "down": fails(8), "x": moves_by(1.0), "y": moves_by(1.0)}
    record = one_round(tmp_path, Sites(answers), resolved(deadline_s=0.4), expected=sorted(answers)).record
    assert record.refused == {"busy": "1017 another-process"}
    assert record.absent == ["down"]


@pytest.mark.parametrize("code", [0, 1, 2, 6, 7, 1003, 1014])
def test_a_refusal_is_never_asked_again(tmp_path: Path, code: int) -> None:
    grid = Sites({"x": moves_by(1.0), "y": moves_by(1.0), "no": fails(code)})
    one_round(tmp_path, grid, resolved(deadline_s=60.0), expected=["no", "x", "y"])
    assert [site for site, _ in grid.asked] == ["no", "x", "y"]


def test_late_replies_of_earlier_rounds_do_no_harm(tmp_path: Path) -> None:
    class Haunted(Sites):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            if replies:
                old = moves_by(9.0)(self.asked[0][1])
                old.metadata.__dict__["_reply_to_message_id"] = "of an earlier round"
                replies = [old, *replies, old]
            return replies

    after = one_round(tmp_path, Haunted({"x": moves_by(1.0), "y": moves_by(1.0)}))
    assert torch.equal(after.state["a"], torch.ones(3))


class Unsteady(Sites):
    """A grid whose SuperLink is away for some calls."""

    def __init__(self, answers: Any, fault: BaseException, failing: Iterable[int]) -> None:
        super().__init__(answers)
        self.fault, self.failing, self.calls = fault, set(failing), 0

    def _maybe(self) -> None:
        self.calls += 1
        if self.calls in self.failing:
            raise self.fault

    def get_nodes(self) -> Iterable[NodeInfo]:
        self._maybe()
        return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._maybe()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._maybe()
        return super().pull_messages(message_ids)


@pytest.mark.parametrize(
    "fault",
    [
        httpx.ReadTimeout("away"),
        httpx.ConnectError("refused"),
        httpx.HTTPStatusError(
            "500", request=httpx.Request("POST", "https://x"), response=httpx.Response(500)
        ),
        ObjectPushError("object", 1, "session"),
    ],
)
def test_a_superlink_that_goes_away_is_waited_for(
    tmp_path: Path, fault: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    for failing in (range(1, 4), range(2, 5), range(4, 7), range(1, 12, 2)):
        grid = Unsteady({"x": moves_by(1.0), "y": moves_by(3.0)}, fault, failing)
        after = one_round(tmp_path, grid, resolved(deadline_s=60.0), expected=["x", "y"])
        assert torch.equal(after.state["a"], torch.full((3,), 2.0))
        assert grid.calls > max(failing)
    assert "cannot be reached" in capsys.readouterr().err


def test_a_stopped_run_stops(tmp_path: Path) -> None:
    grid = Unsteady({"x": moves_by(1.0), "y": moves_by(1.0)}, RunNotRunningException(), [4])
    with pytest.raises(RunNotRunningException):
        one_round(tmp_path, grid)
    progress = read_progress(tmp_path)
    assert progress is not None
    assert progress.phase == "failed: RunNotRunningException"


def test_a_site_without_a_public_weight_is_not_asked(tmp_path: Path) -> None:
    grid = Sites({"x": moves_by(1.0), "y": moves_by(5.0), "new": moves_by(9.0)})
    after = one_round(tmp_path, grid, resolved(weights={"x": 3.0, "y": 1.0}), expected=["new", "x", "y"])
    assert torch.equal(after.state["a"], torch.full((3,), 2.0))
    assert [site for site, _ in grid.asked] == ["x", "y"]


def test_neither_order_nor_disturbance_changes_a_bit_of_the_model(tmp_path: Path) -> None:
    """Differences whose sum depends on its order, from sites that answer in another one."""

    def third(amount: float) -> Any:
        def answer(message: Message) -> Message:
            difference: Tensors = {
                name: torch.linspace(amount, 1.0, tensor.numel()).reshape(tensor.shape) / 3
                for name, tensor in decoded(message).items()
            }
            return Message(reply_records(pack_reply(difference, facts_for(message))), reply_to=message)

        return answer

    names = ["a", "b", "c", "d"]
    answers = {name: third(10.0**-place) for place, name in enumerate(names)}
    calm = one_round(tmp_path, Sites(answers), resolved(deadline_s=60.0), expected=names)
    disturbed = {"d": answers["d"], "c": answers["c"], "b": in_turn(fails(8), answers["b"]),
                 "a": in_turn(fails(5), fails(3), answers["a"])}  # fmt: skip
    wild = one_round(
        tmp_path,
        Unsteady(disturbed, httpx.ReadTimeout(""), [3, 5, 8]),
        resolved(deadline_s=60.0),
        expected=names,
    )
    assert wild.record.state_hash == calm.record.state_hash
    assert wild.record.replied.keys() == calm.record.replied.keys()


def test_a_round_that_cannot_be_released_hears_the_other_reasons_first(tmp_path: Path) -> None:
    class OneLook(Sites):
        """The second site's reply is there at the second look."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(super().pull_messages(message_ids))
            if not found:
                self.lost.clear()
            return found

    no = fails(REASONS["budget-exhausted"].code)
    grid = OneLook({"x": no, "y": no})
    grid.lost = {"y"}
    with pytest.raises(Refusal, match=r"'x': '1003 [a-z-]+', 'y': '1003 [a-z-]+'.*absent: none"):
        one_round(tmp_path, grid, resolved(deadline_s=3600.0), expected=["x", "y"])


def test_a_round_that_cannot_be_released_waits_for_no_deadline(tmp_path: Path) -> None:
    grid = Sites({"x": fails(REASONS["budget-exhausted"].code), "y": moves_by(1.0)})
    grid.lost = {"y"}
    with pytest.raises(Refusal, match=r"0 of at least 2.*absent: \['y'\]"):
        one_round(tmp_path, grid, resolved(deadline_s=3600.0), expected=["x", "y"])
