"""Server optimizers against Flower's strategies of the same names, over rounds and through a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM

from polyclinic.common.generators.base import Tensors
from polyclinic.common.settings import FederationSettings
from polyclinic.server.aggregation import advance
from polyclinic.server.checkpoints import Checkpoint, RoundRecord, checkpoint_folder, save_checkpoint
from polyclinic.server.rounds import run_rounds
from polyclinic.server.server_optimizer import MOMENTS, moments_of
from polyclinic.server.spool import spool_folder
from polyclinic.simulation.grid import _identify
from tests.server.rounds_home import Sites, hurry, moves_by, resolved, start
from tests.server.test_aggregation import flat, spooled, tensors

ROUNDS = 4


def flower_step(strategy: Any, state: Tensors, differences: dict[str, Tensors], count: int) -> Tensors:
    """One step of Flower's strategy from the same replies, all of the same weight."""
    _identify(1)
    arrays = {name: Array(tensor.numpy()) for name, tensor in state.items()}
    # FedAdam asks for an open grid to begin a round; what it remembers of it is this.
    strategy.current_arrays = (
        {name: tensor.numpy() for name, tensor in state.items()}
        if isinstance(strategy, FedAdam)
        else ArrayRecord(arrays)
    )
    replies = []
    for difference in differences.values():
        moved = {name: Array((state[name] + difference[name]).numpy()) for name in state}
        content = RecordDict({"arrays": ArrayRecord(moved), "m": MetricRecord({"num-examples": 1})})
        asked = Message(RecordDict(), dst_node_id=1, message_type="train")
        replies.append(Message(content, reply_to=asked))
    # Its bias correction raises the betas to server_round + 1; ours to the number of steps.
    aggregated, _ = strategy.aggregate_train(count - 1, replies)
    return {name: torch.from_numpy(array.numpy()) for name, array in aggregated.items()}


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [
        ("fedavgm", FedAvgM(server_learning_rate=0.7, server_momentum=0.8)),
        ("fedadam", FedAdam(eta=0.7, beta_1=0.8, beta_2=0.95, tau=0.01)),
    ],
)
def test_steps_are_flowers(tmp_path: Path, optimizer: str, strategy: Any) -> None:
    """Each round reads its moments from the checkpoint before it, as after a restart."""
    settings = FederationSettings(
        server_optimizer=optimizer,  # type: ignore[arg-type]
        server_learning_rate=0.7,
        server_betas=(0.8, 0.95),
        server_tau=0.01,
    )
    state, average, theirs = tensors(100), tensors(101), tensors(100)
    for number in range(1, ROUNDS + 1):
        differences = {f"s{i}": tensors(10 * number + i) for i in range(3)}
        theirs = flower_step(strategy, theirs, differences, number)
        moments = moments_of(
            checkpoint_folder(tmp_path, number - 1), spool_folder(tmp_path, number), settings
        )
        advance(state, average, spooled(tmp_path / str(number), differences), settings, moments)
        record = RoundRecord(round=number, state_hash="x")
        save_checkpoint(tmp_path, Checkpoint(record, state, average, {}, moments.after))
        assert np.allclose(flat(state), flat(theirs), rtol=1e-4, atol=1e-5), number
    assert (checkpoint_folder(tmp_path, ROUNDS) / MOMENTS).exists()


def test_a_tensor_that_nobody_sent_is_left_alone(tmp_path: Path) -> None:
    settings = FederationSettings(server_optimizer="fedadam")
    state, average = tensors(100), tensors(101)
    part = {f"s{i}": {"conv": tensors(i)["conv"]} for i in range(2)}
    for number in (1, 2):
        moments = moments_of(
            checkpoint_folder(tmp_path, number - 1), spool_folder(tmp_path, number), settings
        )
        advance(state, average, spooled(tmp_path / str(number), part), settings, moments)
        record = RoundRecord(round=number, state_hash="x")
        save_checkpoint(tmp_path, Checkpoint(record, state, average, {}, moments.after))
    assert torch.equal(state["bias"], tensors(100)["bias"])
    assert not torch.equal(state["conv"], tensors(100)["conv"])
    kept = moments_of(checkpoint_folder(tmp_path, 2), tmp_path, settings).before
    assert kept is not None
    assert [float(kept.read(f"{name}/steps", 0, 1)) for name in ("conv", "bias")] == [2.0, 0.0]


def test_a_resumed_run_goes_on_with_its_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds in one piece, and three rounds with the server lost after each."""
    hurry(monkeypatch)
    study = resolved(server_optimizer="fedavgm", server_betas=(0.5, 0.9))

    def sites() -> Sites:
        return Sites({"a": moves_by(1.0), "b": moves_by(3.0)})

    class Lost(Exception):
        pass

    def lose(_: Checkpoint) -> None:
        raise Lost

    save_checkpoint(tmp_path / "whole", start())
    run_rounds(sites(), study, tmp_path / "whole")
    save_checkpoint(tmp_path / "lost", start())
    for _ in range(3):
        with pytest.raises(Lost):
            run_rounds(sites(), study, tmp_path / "lost", after_round=lose)
    whole, lost = (
        [(checkpoint_folder(tmp_path / run, n) / "state.safetensors").read_bytes() for n in range(1, 4)]
        for run in ("whole", "lost")
    )
    assert whole == lost
    state = start().state
    # Momentum of a steady difference of 2: 2, then 2 + 1, then 2 + 1.5.
    final = np.frombuffer(whole[-1][-28:], dtype="<f4")
    assert np.allclose(final, flat(state) + 2 + 3 + 3.5)
