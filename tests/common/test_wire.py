"""PRIVACY.md, rule 12: a closed schema, on both sides."""

import json
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.common.generators.base import Tensors
from polyclinic.common.refusals import Refusal
from polyclinic.common.wire import (
    ReplyFacts,
    RoundOrder,
    check_like,
    order_records,
    pack_reply,
    payload_bytes,
    read_order,
    read_reply,
    reply_records,
    state_hash,
    unpack_reply,
)

# What may leave a site, and why it is public. A field that is not here needs a change of PRIVACY.md first.
ALLOWED = {
    "round", "sigma", "sampling_rate", "steps", "clip", "divisor", "tau",  # the mechanism's parameters
    "epsilon", "delta",  # follow from them
    "code_version", "base_hash", "study_hash",  # hashes of public things
    "approval", "ledger_sequence", "ledger_hash",  # random id; ledger head
    "flops",  # cost computed from public quantities
}  # fmt: skip

FACTS = ReplyFacts(
    round=2,
    sigma=0.8123456789,
    sampling_rate=0.1,
    steps=20,
    clip=1.0,
    divisor=30.0,
    tau=1e-4,
    epsilon=float("inf"),
    delta=1e-5,
    code_version="0.1.0",
    base_hash="b" * 64,
    study_hash="c" * 64,
    approval="d" * 16,
    ledger_sequence=7,
    ledger_hash="e" * 64,
    flops=1.5e12,
)
ORDER = RoundOrder(round=2, study_hash="c" * 64)


def state() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 4, generator=generator),
        "a": torch.randn(5, generator=generator),
        "scale": torch.tensor(0.25),
    }


def test_no_other_field_leaves_a_site() -> None:
    assert {field.name for field in fields(ReplyFacts)} == ALLOWED
    assert {field.name for field in fields(RoundOrder)} == {"round", "study_hash"}
    sent = reply_records(pack_reply(state(), FACTS))
    assert set(sent) == {"difference", "facts"}
    assert set(sent["facts"]) == ALLOWED


def test_order_round_trips_bit_for_bit() -> None:
    order, tensors = read_order(order_records(ORDER, state()))
    assert order == ORDER
    assert state_hash(tensors) == state_hash(state())
    assert tensors["scale"].shape == ()


def test_reply_round_trips_bit_for_bit_and_stays_the_same_bytes() -> None:
    stored = pack_reply(state(), FACTS)
    difference, facts, _ = read_reply(reply_records(stored), state())
    assert facts == FACTS
    assert all(torch.equal(difference[name], tensor) for name, tensor in state().items())
    assert pack_reply(*unpack_reply(stored)) == stored
    assert unpack_reply(stored)[1] == FACTS


def test_stored_reply_holds_nothing_but_difference_and_facts() -> None:
    stored = pack_reply(state(), FACTS)
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    assert set(header) == {"a", "b", "scale", "__metadata__"}
    assert set(header["__metadata__"]) == {"facts"}
    assert set(json.loads(header["__metadata__"]["facts"])) == ALLOWED


def facts_record(**changes: Any) -> RecordDict:
    content = reply_records(pack_reply(state(), FACTS))
    values = {**asdict(FACTS), **changes}
    content["facts"] = ConfigRecord({name: value for name, value in values.items() if value is not None})
    return content


@pytest.mark.parametrize(
    "changes",
    [
        {"patients": 41},
        {"loss": 0.3},
        {"sigma": None},
        {"sigma": 1},
        {"sigma": float("nan")},
        {"epsilon": float("nan")},
        {"round": 2.0},
        {"round": True},
        {"approval": b"d"},
        {"steps": "20"},
        {"delta": [1e-5]},
    ],
)
def test_server_refuses_facts_outside_the_schema(changes: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match="bad-message"):
        read_reply(facts_record(**changes), state())


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_every_field_is_needed_and_typed(name: str) -> None:
    with pytest.raises(Refusal, match="bad-message"):
        read_reply(facts_record(**{name: None}), state())
    with pytest.raises(Refusal, match="bad-message"):
        read_reply(facts_record(**{name: b"x"}), state())


@pytest.mark.parametrize("record", [MetricRecord({"loss": 0.1}), ConfigRecord({"x": 1}), ArrayRecord()])
def test_further_records_are_refused_on_both_sides(record: Any) -> None:
    up, down = reply_records(pack_reply(state(), FACTS)), order_records(ORDER, state())
    up["more"] = down["more"] = record
    with pytest.raises(Refusal, match="bad-message"):
        read_reply(up, state())
    with pytest.raises(Refusal, match="bad-message"):
        read_order(down)


def test_missing_and_swapped_records_are_refused() -> None:
    for content in (order_records(ORDER, state()), RecordDict(), RecordDict({"state": ArrayRecord()})):
        with pytest.raises(Refusal, match="bad-message"):
            read_reply(content, state())
    swapped = RecordDict({"state": ConfigRecord({"round": 1}), "round": ArrayRecord()})
    with pytest.raises(Refusal, match="bad-message"):
        read_order(swapped)


@pytest.mark.parametrize("changes", [{"sigma": 0.0}, {"key": "k"}, {"allow_not_private": True}])
def test_site_refuses_an_order_that_says_more(changes: dict[str, Any]) -> None:
    content = order_records(ORDER, state())
    content["round"] = ConfigRecord({**asdict(ORDER), **changes})
    with pytest.raises(Refusal, match="bad-message"):
        read_order(content)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a", torch.zeros(6)),
        ("a", torch.zeros(5, 1)),
        ("a", torch.zeros(5, dtype=torch.float64)),
        ("a", torch.zeros(5, dtype=torch.float16)),
        ("a", torch.tensor([0, 0, 0, 0, torch.inf])),
        ("a", torch.tensor([torch.nan, 0, 0, 0, 0])),
        ("z", torch.zeros(5)),
        ("a", None),
        ("scale", torch.zeros(1)),
    ],
)
def test_server_refuses_a_difference_unlike_the_state(name: str, tensor: torch.Tensor | None) -> None:
    odd = {**state(), name: tensor}
    content = reply_records(pack_reply(state(), FACTS))
    content["difference"] = ArrayRecord({n: Array(t.numpy()) for n, t in odd.items() if t is not None})
    with pytest.raises(Refusal, match="bad-state"):
        read_reply(content, state())


def array(
    data: bytes, *, dtype: str = "float32", shape: tuple[int, ...] = (5,), stype: str = "numpy.ndarray"
) -> Array:
    return Array(dtype, shape, stype, data)


def npy(values: Any) -> bytes:
    return bytes(Array(np.asarray(values)).data)


@pytest.mark.parametrize(
    "odd",
    [
        array(b""),
        array(b"not numpy at all"),
        array(npy(np.zeros(5, np.float32))[:-7]),
        array(npy(np.zeros(5, np.float64))),
        array(npy(np.zeros(5, ">f4"))),
        array(npy(np.array(["a"] * 5))),
        array(npy(np.zeros(5, np.float32)), stype="pickle"),
        array(npy(np.zeros(5, np.float32)).replace(b"(5,)", b"(9999999999999,)")),
    ],
)
def test_bytes_that_are_not_what_they_say_are_refused_on_both_sides(odd: Array) -> None:
    up, down = reply_records(pack_reply(state(), FACTS)), order_records(ORDER, state())
    up["difference"]["a"] = down["state"]["a"] = odd
    with pytest.raises(Refusal, match="bad-state"):
        read_reply(up, state())
    with pytest.raises(Refusal, match="bad-state"):
        check_like(read_order(down)[1], state())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_damaged_arrays_end_in_a_refusal_or_the_same_shape(noise: bytes, place: int) -> None:
    data = bytearray(npy(state()["a"].numpy()))
    place = min(place, len(data))
    data[place : place + len(noise)] = noise
    content = reply_records(pack_reply(state(), FACTS))
    content["difference"]["a"] = array(bytes(data))
    with suppress(Refusal):
        check_like(read_reply(content, state())[0], state())


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=12), st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.booleans()
    )
)
def test_any_other_facts_are_refused(values: dict[str, Any]) -> None:
    content = reply_records(pack_reply(state(), FACTS))
    content["facts"] = ConfigRecord(values)
    with pytest.raises(Refusal, match="bad-message"):
        read_reply(content, state())


@given(st.binary(min_size=1, max_size=4), st.sampled_from(["a", "b"]))
def test_state_hash_sees_every_byte(flip: bytes, name: str) -> None:
    one, other = state(), state()
    raw = bytearray(other[name].numpy().tobytes())
    raw[: len(flip)] = bytes(x ^ y for x, y in zip(raw, flip, strict=False))
    other[name] = torch.frombuffer(raw, dtype=torch.float32).reshape(one[name].shape)
    assert (state_hash(one) == state_hash(other)) == (not any(flip))
    renamed = {"c" if key == "a" else key: tensor for key, tensor in state().items()}
    assert state_hash(renamed) != state_hash(state())


def test_payload_counts_every_tensor() -> None:
    small = payload_bytes(reply_records(pack_reply(state(), FACTS)))
    large = payload_bytes(reply_records(pack_reply({**state(), "d": torch.zeros(1000)}, FACTS)))
    assert large - small == pytest.approx(4000, abs=200)
    assert (
        payload_bytes(reply_records(pack_reply(state(), replace(FACTS, code_version="0" * 105))))
        == small + 100
    )
