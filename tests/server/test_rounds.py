"""The round loop against sites that refuse, break, send nonsense or never answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from polyclinic.common.refusals import REASONS, Refusal
from polyclinic.common.study import Resolved, parse_study
from polyclinic.common.wire import ReplyFacts, pack_reply, read_order, reply_records, state_hash
from polyclinic.server.aggregation import advance, weighted_mean
from polyclinic.server.checkpoints import (
    Checkpoint,
    RoundRecord,
    load_checkpoint,
    rounds_done,
    save_checkpoint,
)
from polyclinic.server.rounds import registered_names, run_round, run_rounds
from polyclinic.simulation.grid import InProcessGrid, _identify

START = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
FACTS = ReplyFacts(
    round=1,
    sigma=1.0,
    sampling_rate=0.1,
    steps=1,
    clip=1.0,
    divisor=5.0,
    tau=1e-4,
    epsilon=1.5,
    delta=1e-5,
    code_version="x",
    base_hash="x",
    study_hash="x",
    approval="x",
    ledger_sequence=1,
    ledger_hash="x",
    flops=1.0,
)


def resolved(**federation: object) -> Resolved:
    study = parse_study(
        {
            "name": "loop",
            "evaluation": {"prompts": [{"text": "a"}]},
            "training": {"rounds": 3},
            "privacy": {"canaries": 0},
            "federation": {"grace_s": 0.0, "deadline_s": 2.0, **federation},
        },
        "test",
    )
    return Resolved(study=study, base_hash="b", start_hash="s", reference_hash="r")


def start() -> Checkpoint:
    return Checkpoint(RoundRecord(round=0, state_hash=state_hash(START)), START, START)


def grid_of(answers: dict[str, Callable[[Message], Message]]) -> InProcessGrid:
    """A grid whose sites answer as given; a site is a ClientApp of its own making."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        return answers[Path(str(context.node_config["home"])).name](message)

    _identify(1)
    return InProcessGrid([Path("/sites") / name for name in answers], app)


def moves_by(amount: float) -> Callable[[Message], Message]:
    def answer(message: Message) -> Message:
        _, state = read_order(message.content)
        difference = {name: torch.full_like(tensor, amount) for name, tensor in state.items()}
        return Message(reply_records(pack_reply(difference, FACTS)), reply_to=message)

    return answer


def refuses(message: Message) -> Message:
    return Message(Error(REASONS["budget-exhausted"].code, "budget-exhausted"), reply_to=message)


def breaks(message: Message) -> Message:
    return Message(Error(2, "Traceback: private text"), reply_to=message)


def sends_nan(message: Message) -> Message:
    return moves_by(float("nan"))(message)


def sends_other_shapes(message: Message) -> Message:
    return Message(reply_records(pack_reply({"a": torch.zeros(4), "b": START["b"]}, FACTS)), reply_to=message)


class Deaf(InProcessGrid):  # type: ignore[misc]
    """A grid in which one site's replies never arrive."""

    lost: str = "gone"

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        heard = [
            message
            for message in self._waiting
            if self._homes[message.metadata.dst_node_id].name != self.lost
        ]
        return super().pull_messages({m.metadata.message_id for m in heard} & set(message_ids))


def test_the_state_moves_by_the_mean_difference() -> None:
    grid = grid_of({"x": moves_by(1.0), "y": moves_by(3.0)})
    after = run_round(grid, resolved(), start(), 1, registered_names(grid))
    assert torch.equal(after.state["a"], torch.full((3,), 2.0))
    assert sorted(after.record.replied) == ["x", "y"]
    assert after.record.replied["x"]["epsilon"] == 1.5
    assert after.record.bytes_up > 2 * 7 * 4


def test_public_weights_and_server_average() -> None:
    settings = resolved(weights={"x": 3.0, "y": 1.0}, ema=0.75, server_learning_rate=2.0).study.federation
    mean = weighted_mean([("x", {"a": torch.ones(3)}), ("y", {"a": 5 * torch.ones(3)})], settings)
    assert torch.equal(mean["a"], torch.full((3,), 2.0))
    # A site that is absent takes its weight with it.
    assert torch.equal(weighted_mean([("y", {"a": 5 * torch.ones(3)})], settings)["a"], torch.full((3,), 5.0))
    state, average = advance({"a": torch.zeros(3)}, {"a": torch.zeros(3)}, mean, settings)
    assert torch.equal(state["a"], torch.full((3,), 4.0))
    assert torch.equal(average["a"], torch.full((3,), 1.0))


def test_refusals_and_nonsense_are_recorded_by_site_and_code() -> None:
    grid = grid_of(
        {
            "good": moves_by(1.0),
            "fine": moves_by(1.0),
            "spent": refuses,
            "broken": breaks,
            "nan": sends_nan,
            "shape": sends_other_shapes,
        }
    )
    record = run_round(grid, resolved(), start(), 1, registered_names(grid)).record
    assert record.refused == {
        "spent": "1003 budget-exhausted",
        "broken": "1014 site-fault",
        "nan": "1012 bad-state",
        "shape": "1012 bad-state",
    }
    assert "private" not in record.model_dump_json()


def test_one_hospital_alone_is_never_released() -> None:
    grid = grid_of({"only": moves_by(1.0), "spent": refuses})
    with pytest.raises(Refusal, match="too-few-replies") as caught:
        run_round(grid, resolved(min_sites=2), start(), 1, registered_names(grid))
    assert "spent" in str(caught.value)


def test_a_site_that_never_answers_is_absent_after_the_deadline() -> None:
    app_grid = grid_of({"x": moves_by(1.0), "y": moves_by(1.0), "gone": moves_by(100.0)})
    grid = Deaf([app_grid._homes[node] for node in app_grid._homes], app_grid._app)
    after = run_round(grid, resolved(deadline_s=0.5), start(), 1, registered_names(grid))
    assert after.record.absent == ["gone"]
    assert torch.equal(after.state["a"], torch.ones(3))


def test_a_quorum_starts_the_grace_period() -> None:
    app_grid = grid_of({"x": moves_by(1.0), "y": moves_by(1.0), "gone": moves_by(100.0)})
    grid = Deaf([app_grid._homes[node] for node in app_grid._homes], app_grid._app)
    # With a deadline of an hour, only the quorum can end this round.
    study = resolved(deadline_s=3600.0, quorum=2, grace_s=0.3)
    after = run_round(grid, study, start(), 1, registered_names(grid))
    assert after.record.absent == ["gone"]
    assert after.record.seconds < 60


def test_a_run_goes_on_after_its_last_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, start())
    seen: list[int] = []

    def stop_after_two(checkpoint: Checkpoint) -> None:
        seen.append(checkpoint.record.round)
        if seen == [1, 2]:
            raise KeyboardInterrupt

    grid = grid_of({"x": moves_by(1.0), "y": moves_by(1.0)})
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, resolved(), tmp_path, after_round=stop_after_two)
    run_rounds(grid, resolved(), tmp_path, after_round=stop_after_two)
    assert seen == [1, 2, 3]
    assert rounds_done(tmp_path) == [0, 1, 2, 3]
    assert torch.equal(load_checkpoint(tmp_path, 3).state["a"], torch.full((3,), 3.0))


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way leaves no round behind."""
    save_checkpoint(tmp_path, start())
    torn = Checkpoint(RoundRecord(round=1, state_hash="x"), START, {"a": torch.zeros(3).to_sparse()})
    with pytest.raises(Exception, match=r"sparse|contiguous|layout"):
        save_checkpoint(tmp_path, torn)
    assert rounds_done(tmp_path) == [0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-0000"]


def test_a_private_reply_survives_the_record(tmp_path: Path) -> None:
    facts = dataclasses.asdict(dataclasses.replace(FACTS, epsilon=float("inf"), clip=float("inf")))
    record = RoundRecord(round=0, state_hash="x", replied={"a": facts})
    save_checkpoint(tmp_path, Checkpoint(record, START, START))
    assert float(load_checkpoint(tmp_path, 0).record.replied["a"]["epsilon"]) == float("inf")


def test_an_order_of_another_kind_is_refused() -> None:
    with pytest.raises(Refusal, match="bad-message"):
        read_order(RecordDict())
