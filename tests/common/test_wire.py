"""PRIVACY.md, rule 12: a closed schema, on both sides."""

import json
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any, get_args

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from polyclinic.common.generators.base import Tensors
from polyclinic.common.generators.public import hash_state
from polyclinic.common.refusals import Refusal
from polyclinic.common.settings import Transport
from polyclinic.common.wire import ReplyFacts, pack_reply, reply_records
from polyclinic.common.wire_reading import RoundOrder, check_like, order_records, read_order, unpack_reply
from polyclinic.server.replies import as_sent, open_reply, payload_bytes, read_reply
from tests.common.wire_files import FILE, file_of, put, raw, seal, tensors_in

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


TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
every_transport = pytest.mark.parametrize("transport", TRANSPORTS)


def records_of(transport: Transport) -> set[str]:
    return {"difference", "facts", "hashes"} | ({"scale"} if transport == "int8" else set())


@every_transport
def test_no_other_field_leaves_a_site(transport: Transport) -> None:
    assert {field.name for field in fields(ReplyFacts)} == ALLOWED
    assert {field.name for field in fields(RoundOrder)} == {"round", "study_hash"}
    residual = {name: 1e-3 * tensor for name, tensor in state().items()}
    sent = reply_records(pack_reply(state(), FACTS, transport=transport, residual=residual))
    assert set(sent) == records_of(transport)
    assert set(sent["facts"]) == ALLOWED
    assert set(tensors_in(sent, "difference")) == set(state())
    scales = {f"scale/{name}" for name in state()} if transport == "int8" else set()
    assert (set(tensors_in(sent, "scale")) if scales else set()) == scales
    # Hashes are of exactly what is sent, and of nothing else.
    told = dict(sent["hashes"])
    assert dict(seal(sent)["hashes"]) == told
    assert set(told) == set(state()) | scales


@every_transport
def test_both_sides_name_a_state_by_the_same_hash(transport: Transport) -> None:
    order, decode = read_order(order_records(ORDER, state(), transport))
    tensors = decode(transport)
    assert order == ORDER
    assert hash_state(tensors) == hash_state(as_sent(state(), transport))
    assert (hash_state(tensors) == hash_state(state())) == (transport == "fp32")
    assert tensors["scale"].shape == ()
    # bf16 keeps 8 bits: an error of half a unit in the last place.
    for name, tensor in state().items():
        assert ((tensors[name] - tensor).abs() <= tensor.abs() * 2.0**-8).all()


@every_transport
def test_what_is_sent_is_what_is_stored(transport: Transport) -> None:
    stored = pack_reply(state(), FACTS, transport=transport)
    difference, facts, _ = read_reply(reply_records(stored), state(), transport=transport)
    assert facts == FACTS == unpack_reply(stored)[1]
    kept = unpack_reply(stored)[0]
    assert difference.keys() == kept.keys() == state().keys()
    assert all(torch.equal(difference[name], tensor) for name, tensor in kept.items())
    written, sent = load(stored), reply_records(stored)
    for part in records_of(transport) - {"facts", "hashes"}:
        for name, tensor in tensors_in(sent, part).items():
            assert tensor.dtype == written[name].dtype
            assert raw(tensor) == raw(written[name])
    if transport != "int8":
        assert pack_reply(*unpack_reply(stored), transport) == stored


def test_a_site_reads_a_state_as_its_approval_says_not_as_the_message_does() -> None:
    for sent, approved in [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "int8")]:
        _, decode = read_order(order_records(ORDER, state(), sent))  # type: ignore[arg-type]
        with pytest.raises(Refusal, match="bad-state"):
            decode(approved)  # type: ignore[arg-type]
    for sent in TRANSPORTS:
        for wanted in set(TRANSPORTS) - {sent}:
            with pytest.raises(Refusal, match=r"bad-state|bad-message"):
                read_reply(
                    reply_records(pack_reply(state(), FACTS, transport=sent)), state(), transport=wanted
                )


@pytest.mark.parametrize("record", ["difference", "scale", "tap"])
def test_a_tensor_that_changed_on_the_way_is_named(record: str) -> None:
    tap = {"tap/sum": torch.zeros(100)}
    content = reply_records(pack_reply(state(), FACTS, tap, "int8"))
    name = damage_last(content, record)
    with pytest.raises(Refusal, match=rf"hash-mismatch.*{name}"):
        read_reply(content, state(), tap, "int8")
    down = order_records(ORDER, state())
    name = damage_last(down, "state")
    with pytest.raises(Refusal, match=rf"hash-mismatch.*\({name}\)"):
        read_order(down)[1]("bf16")


def damage_last(content: RecordDict, part: str) -> str:
    """Turn the last bit of a part's file, and say whose bit it was."""
    data = bytearray(content[part][FILE].data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    data[-1] ^= 1
    content[part] = file_of(bytes(data))
    return str(max(header, key=lambda name: header[name]["data_offsets"][1]))


@pytest.mark.parametrize("damage", ["missing", "more", "type", "record"])
def test_hashes_of_other_tensors_are_refused_on_both_sides(damage: str) -> None:
    up, down = reply_records(pack_reply(state(), FACTS)), order_records(ORDER, state())
    for content in (up, down):
        hashes: Any = dict(content["hashes"])
        if damage == "missing":
            del hashes["a"]
        if damage == "more":
            hashes["patients"] = "0" * 64
        if damage == "type":
            hashes["a"] = 7
        content["hashes"] = MetricRecord({"a": 1}) if damage == "record" else ConfigRecord(hashes)
    with pytest.raises(Refusal, match=r"bad-message|hash-mismatch"):
        read_reply(up, state())
    with pytest.raises(Refusal, match=r"bad-message|hash-mismatch"):
        read_order(down)[1]("bf16")


@every_transport
def test_a_number_that_is_none_is_refused_however_it_is_written(transport: Transport) -> None:
    odd = {**state(), "b": torch.full((3, 4), torch.nan)}
    with pytest.raises(Refusal, match="bad-state"):
        read_reply(reply_records(pack_reply(odd, FACTS, transport=transport)), state(), transport=transport)


def test_a_difference_is_checked_tensor_by_tensor_as_it_is_taken() -> None:
    content = reply_records(
        pack_reply({**state(), "scale": torch.tensor(torch.inf)}, FACTS, transport="fp32")
    )
    taken = open_reply(content, state(), transport="fp32").difference
    assert [next(taken)[0], next(taken)[0]] == ["a", "b"]
    with pytest.raises(Refusal, match="scale is not finite"):
        next(taken)


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
    odd = {n: t for n, t in {**state(), name: tensor}.items() if t is not None}
    content = reply_records(pack_reply(state(), FACTS))
    with pytest.raises(Refusal, match="bad-state"):
        read_reply(put(content, "difference", odd), state(), transport="fp32")


def head(entry: dict[str, Any] | list[Any] | int, size: int = 64) -> bytes:
    """A safetensors file that says one thing of tensor `a`, whatever it then holds."""
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"not a file at all",
        save({"a": torch.zeros(5)})[:-7],
        (2**63).to_bytes(8, "little") + b"{}",
        (200_000).to_bytes(8, "little") + 100_000 * b"[" + 100_000 * b"]",
        head({"dtype": "F32", "shape": [5], "data_offsets": [0, 19]}),
        head({"dtype": "F32", "shape": [5], "data_offsets": [-20, 0]}),
        head({"dtype": "F32", "shape": [-1, -5], "data_offsets": [0, 20]}),
        head({"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}),
        head({"dtype": "F64", "shape": [5], "data_offsets": [0, 40]}),
        head({"dtype": "F32", "shape": [5], "data_offsets": [0, 20, 40]}),
        head({"dtype": "F32", "shape": 5, "data_offsets": [0, 20]}),
        head({"dtype": "F32", "data_offsets": [0, 20]}),
        head([1, 2, 3]),
        head(7),
        # What could ride along, past the closed schema: bytes after, before and beside the tensors.
        save({"a": torch.zeros(5)}) + b"41 patients",
        head({"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}, 24),
        head({"dtype": "F32", "shape": [5], "data_offsets": [0, 20], "patients": 41}, 20),
    ],
)
def test_bytes_that_are_not_what_they_say_are_refused_on_both_sides(odd: bytes) -> None:
    like = {"a": torch.zeros(5)}
    up = reply_records(pack_reply(like, FACTS, transport="fp32"))
    down = order_records(ORDER, like, "fp32")
    up["difference"] = down["state"] = file_of(odd)
    with pytest.raises(Refusal, match=r"bad-state|bad-message|hash-mismatch"):
        read_reply(up, like, transport="fp32")
    with pytest.raises(Refusal, match=r"bad-state|bad-message|hash-mismatch"):
        check_like(read_order(down)[1]("fp32"), like)


def as_bf16(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def test_what_is_said_of_an_array_is_what_it_is() -> None:
    sent = save(as_bf16(state()))
    for dtype, shape in [("uint8", (41,)), ("41 patients", (len(sent),))]:
        content = reply_records(pack_reply(state(), FACTS))
        content["difference"] = ArrayRecord({FILE: Array(dtype, shape, FILE, sent)})
        with pytest.raises(Refusal, match="bad-state"):
            read_reply(seal(content), state())


def test_an_array_that_is_no_file_is_refused_on_both_sides() -> None:
    pickled = file_of(save(as_bf16(state())), "pickle")
    several = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state().items()})
    for odd, code in [(pickled, "bad-state"), (several, "bad-message"), (ArrayRecord(), "bad-message")]:
        up, down = reply_records(pack_reply(state(), FACTS)), order_records(ORDER, state())
        up["difference"] = down["state"] = odd
        with pytest.raises(Refusal, match=code):
            read_reply(up, state())
        with pytest.raises(Refusal, match=code):
            read_order(down)[1]("bf16")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_damaged_arrays_end_in_a_refusal_or_the_same_shape(noise: bytes, place: int) -> None:
    content = reply_records(pack_reply(state(), FACTS, transport="fp32"))
    data = bytearray(content["difference"][FILE].data)
    place = min(place, len(data))
    data[place : place + len(noise)] = noise
    content["difference"] = file_of(bytes(data))
    with suppress(Refusal):
        check_like(read_reply(content, state(), transport="fp32")[0], state())


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
    assert (hash_state(one) == hash_state(other)) == (not any(flip))
    renamed = {"c" if key == "a" else key: tensor for key, tensor in state().items()}
    assert hash_state(renamed) != hash_state(state())


@pytest.mark.parametrize(("transport", "each"), [("fp32", 4), ("bf16", 2), ("int8", 1)])
def test_payload_counts_every_tensor(transport: Transport, each: int) -> None:
    def size(tensors: Tensors, facts: ReplyFacts = FACTS) -> int:
        return payload_bytes(reply_records(pack_reply(tensors, facts, transport=transport)))

    small = size(state())
    assert size({**state(), "d": torch.zeros(10_000)}) - small == pytest.approx(10_000 * each, abs=600)
    assert size(state(), replace(FACTS, code_version="0" * 105)) == small + 100
