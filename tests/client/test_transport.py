"""A site and `federation.transport`: what it reads, stores and sends, and where its rounding errors stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.client import training
from polyclinic.client.ledger_chain import read_lines
from polyclinic.client.residual import unpack_residual
from polyclinic.client.training import answer_round
from polyclinic.common.generators.base import Tensors
from polyclinic.common.generators.public import hash_state
from polyclinic.common.refusals import Refusal
from polyclinic.common.wire import pack_reply, reply_records
from polyclinic.common.wire_reading import order_records, read_order, unpack_reply
from polyclinic.server.replies import as_sent, read_reply

OPEN = "allow_not_private = true\nallow_test_randomness = true\n"
TABLES = {"privacy": {"enabled": False}, "training": {"test_key": "k"}}


def ask(site: Any, number: int, sent: Any = "int8") -> bytes:
    order, decode = read_order(order_records(site.order(number), site.state, sent))
    return answer_round(site.home, order, decode, in_time=lambda: True)


def kinds(home: Path) -> list[str]:
    return [line["kind"] for line in read_lines(home)]


@pytest.mark.parametrize(("rule", "back"), [("freeze-a", 1), ("alternate", 2), ("stack", None)])
def test_int8_adds_what_rounding_lost_to_the_next_reply(
    make_site: Any, monkeypatch: pytest.MonkeyPatch, rule: str, back: int | None
) -> None:
    """With alternation to the next but one; under stacking the old coordinates mean nothing any more."""
    federation = {"transport": "int8", "lora_aggregation": rule, "ema": 0.0}
    site = make_site(OPEN, **TABLES, federation=federation)
    site.approve()
    made: list[Tensors] = []

    def watched(difference: Tensors, *others: Any) -> bytes:
        made.append(difference)
        return pack_reply(difference, *others)

    monkeypatch.setattr(training, "pack_reply", watched)
    replies = [ask(site, number) for number in (1, 2, 3)]
    residuals = [{name: torch.zeros_like(tensor) for name, tensor in site.state.items()}] * (back or 4)
    for reply, difference in zip(replies, made, strict=True):
        residual = residuals.pop(0)
        sent, lost = unpack_reply(reply).difference, unpack_residual(reply)
        for name, tensor in difference.items():
            assert torch.allclose(sent[name] + lost[name], tensor + residual[name], rtol=1e-5, atol=1e-9)
        assert any(bool(tensor.any()) for tensor in lost.values())
        # What leaves is what is stored, without the residual.
        records = reply_records(reply)
        assert set(records) == {"difference", "scale", "facts", "hashes"}
        arrived = read_reply(records, site.state, transport="int8").difference
        assert all(torch.equal(arrived[name], tensor) for name, tensor in sent.items())
        residuals.append(lost)
    assert ask(site, 2) == replies[1]

    # An attempt that was killed after it reserved is made again, with the same residual.
    (site.home / "replies" / f"{read_lines(site.home)[1]['approval']}-0003.safetensors").unlink()
    lines = (site.home / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (site.home / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    (site.home / "ledger.head").write_text(
        f'{{"sequence": {len(lines) - 2}, "hash": "{read_hash(lines[-2])}"}}'
    )
    assert ask(site, 3) == replies[2]


def read_hash(line: bytes) -> str:
    return str(json.loads(line)["hash"])


def test_a_residual_that_was_changed_is_noticed_before_anything_is_spent(make_site: Any) -> None:
    site = make_site(OPEN, **TABLES, federation={"transport": "int8"})
    site.approve()
    ask(site, 1)
    before = kinds(site.home)
    (path,) = (site.home / "replies").iterdir()
    for data in (path.read_bytes()[:-1] + b"\1", None):
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(Refusal, match="reply-broken"):
            ask(site, 2)
    assert kinds(site.home) == before


def test_a_message_does_not_choose_the_transport(make_site: Any) -> None:
    site = make_site(OPEN, **TABLES, federation={"transport": "fp32"})
    site.approve()
    with pytest.raises(Refusal, match="bad-state"):
        ask(site, 1, "bf16")
    assert "reserve" not in kinds(site.home)
    reply = unpack_reply(ask(site, 1, "fp32"))
    assert any(bool((tensor != tensor.bfloat16().float()).any()) for tensor in reply.difference.values())


def test_the_ledger_names_the_state_that_the_server_names(make_site: Any) -> None:
    site = make_site(OPEN, **TABLES)
    site.approve()
    ask(site, 1, "bf16")
    (reserved,) = [line for line in read_lines(site.home) if line["kind"] == "reserve"]
    assert reserved["state"] == hash_state(as_sent(site.state, "bf16")) != hash_state(site.state)
