"""Rounds of adapters over a grid: sites of their own rank, halves that take turns, and a told loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from polyclinic.common.adapters import A, B, narrow, trained
from polyclinic.common.generators.base import Tensors
from polyclinic.common.generators.public import hash_state
from polyclinic.common.refusals import BadInput
from polyclinic.common.wire import pack_reply, reply_records
from polyclinic.common.wire_reading import read_order
from polyclinic.server.checkpoints import Checkpoint, RoundRecord, load_checkpoint, save_checkpoint
from polyclinic.server.rounds import run_rounds
from tests.server.rounds_home import Answer, Sites, facts_for, hurry, resolved
from tests.server.test_stacking import CONV, PLAIN, adapters, products


def site(rank: int, rule: Any, seed: int, transport: Any = "fp32") -> Answer:
    """Moves what the round trains by random numbers of its own, at its own rank."""

    def answer(message: Message) -> Message:
        order, decode = read_order(message.content)
        state = narrow(trained(decode(transport), rule, order.round), rank)
        drawn = adapters(100 * order.round + seed, 0.1, rank)
        difference = {name: drawn[name] for name in state}
        stored = pack_reply(difference, facts_for(message), None, transport)
        return Message(reply_records(stored), reply_to=message)

    return answer


def run(run_dir: Path, rule: str, ranks: tuple[int, ...], transport: str = "fp32") -> list[Tensors]:
    state = adapters(0)
    save_checkpoint(
        run_dir,
        Checkpoint(RoundRecord(round=0, state_hash=hash_state(state)), state, adapters(0)),
    )
    sites = {f"s{i}": site(rank, rule, i, transport) for i, rank in enumerate(ranks)}
    study = resolved(lora_aggregation=rule, transport=transport)
    run_rounds(Sites(sites), study, run_dir, expected=sorted(sites))
    for number in range(1, 4):
        record = load_checkpoint(run_dir, number).record
        assert sorted(record.replied) == sorted(sites), record
    return [load_checkpoint(run_dir, number).state for number in range(4)]


def test_sites_of_their_own_rank_are_summed_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the study's rank, each round's product is the best cut of the exact mean of the sites' moves."""
    hurry(monkeypatch)
    states = run(tmp_path, "stack", (1, 2, 4))
    for number in (1, 2, 3):
        before = states[number - 1]
        for layer in (PLAIN, CONV):
            exact = products(before)[layer].clone()
            for i, rank in enumerate((1, 2, 4)):
                own, moved = narrow(before, rank), adapters(100 * number + i, 0.1, rank)
                ended = {name: own[name] + moved[name] for name in own}
                exact += (products(ended)[layer] - products(own)[layer]) / 3
            u, s, vh = torch.linalg.svd(exact)
            best = u[:, :4] * s[:4] @ vh[:4]
            assert torch.allclose(products(states[number])[layer], best, atol=1e-5)
    said = capsys.readouterr()
    assert (said.out + said.err).count("cut back to rank 4; lost") == 3


@pytest.mark.parametrize("transport", ["fp32", "int8"])
def test_halves_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    hurry(monkeypatch)
    states = run(tmp_path, "alternate", (4, 2), transport)
    for number in (1, 2, 3):
        same = {n for n, t in states[number].items() if torch.equal(t, states[number - 1][n])}
        assert same == {PLAIN + (A if number % 2 else B), CONV + (A if number % 2 else B)}


def test_what_stacking_takes_the_meaning_of_is_refused() -> None:
    for field, value in (("ema", 0.9), ("server_optimizer", "fedadam"), ("aggregation", "median")):
        with pytest.raises(BadInput, match=f"{field} works coordinate by coordinate.*set {field} = "):
            resolved(lora_aggregation="stack", **{field: value})
