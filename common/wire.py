"""What crosses the wire: trainable state <-> Flower records, in a closed schema (PRIVACY.md, rule 12).

Down: the trainable state, the round number and the deadline. Up: the noised difference, the audit
tap's sums where the study has a tap, and the fields of `ReplyFacts`, all of them public parameters.
Anything else is refused on both sides.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from polyclinic.common.generators.base import Tensors
from polyclinic.common.generators.public import hash_state
from polyclinic.common.privacy.tap import COINS, SUM
from polyclinic.common.refusals import Refusal

T = TypeVar("T")

STATE, ROUND, DIFFERENCE, TAP, FACTS = "state", "round", "difference", "tap", "facts"


@dataclass(frozen=True)
class RoundOrder:
    """What the server asks for: nothing of it but these fields is read.

    Attributes:
        round: Number of the round, from 1.
        study_hash: Names the approved study; everything else about it comes from the site's own copy.
    """

    round: int
    study_hash: str


@dataclass(frozen=True)
class ReplyFacts:
    """Every field that leaves a site beside the difference; all follow from public quantities.

    Attributes:
        round: Number of the round.
        sigma: Noise standard deviation in units of C; 0 where the run is not private.
        sampling_rate: q.
        steps: Steps taken.
        clip: C.
        divisor: Public constant each sum was divided by.
        tau: Every contribution was scaled by 1 / (1 + tau).
        epsilon: Spent by this site in this study so far; infinity where the run is not private.
        delta: Of that epsilon.
        code_version: Release of Polyclinic at the site.
        base_hash: Frozen base.
        study_hash: Resolved study.
        approval: Random id of the site's approval.
        ledger_sequence: Number of the ledger line that recorded the reservation.
        ledger_hash: Hash of that line; salted, so it tells nothing.
        flops: Forward and backward operations of the expected batch, from public quantities.
    """

    round: int
    sigma: float
    sampling_rate: float
    steps: int
    clip: float
    divisor: float
    tau: float
    epsilon: float
    delta: float
    code_version: str
    base_hash: str
    study_hash: str
    approval: str
    ledger_sequence: int
    ledger_hash: str
    flops: float


class Reply(NamedTuple):
    """What a site answers: only `difference` is ever aggregated, `tap` is for the audit alone."""

    difference: Tensors
    facts: ReplyFacts
    tap: Tensors


def order_records(order: RoundOrder, state: Tensors) -> RecordDict:
    """Pack what goes down to a site."""
    return RecordDict({STATE: _arrays(state), ROUND: ConfigRecord(asdict(order))})


def read_order(content: RecordDict) -> tuple[RoundOrder, Tensors]:
    """Unpack an order at a site.

    Raises:
        Refusal: `bad-message` for other fields or types, `bad-state` for odd tensors.
    """
    if set(content) != {STATE, ROUND}:
        raise Refusal("bad-message", f"records {sorted(content)}")
    return _parse(RoundOrder, content[ROUND]), _tensors(content[STATE])


def reply_records(stored: bytes) -> RecordDict:
    """Pack a stored reply, and only a stored reply, for the way up."""
    reply = unpack_reply(stored)
    tap = {TAP: _arrays(reply.tap)} if reply.tap else {}
    return RecordDict(
        {DIFFERENCE: _arrays(reply.difference), FACTS: ConfigRecord(asdict(reply.facts)), **tap}
    )


def read_reply(content: RecordDict, like: Tensors, tap_like: Tensors | None = None) -> Reply:
    """Unpack and check a reply at the server.

    Args:
        content: What a site sent.
        like: The state of the round: names and shapes a difference must have.
        tap_like: Names and shapes the tap must have in this round; none where there is no tap.

    Raises:
        Refusal: `bad-message` for any field outside the schema, `bad-state` for other names, shapes,
            types, or numbers that are not finite.
    """
    if set(content) != {DIFFERENCE, FACTS, *([TAP] if tap_like else [])}:
        raise Refusal("bad-message", f"records {sorted(content)}")
    difference = _tensors(content[DIFFERENCE])
    check_like(difference, like)
    tap = _tensors(content[TAP]) if tap_like else {}
    check_like(tap, tap_like or {})
    return Reply(difference, _parse(ReplyFacts, content[FACTS]), tap)


def check_like(tensors: Tensors, like: Tensors) -> None:
    """Refuse tensors whose names, shapes or types are not `like`'s, or that are not finite."""
    if tensors.keys() != like.keys():
        raise Refusal("bad-state", f"names differ, e.g. {sorted(tensors.keys() ^ like.keys())[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape or tensor.dtype != torch.float32:
            raise Refusal("bad-state", f"{name} is {tensor.dtype}{tuple(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise Refusal("bad-state", f"{name} is not finite")


def pack_reply(difference: Tensors, facts: ReplyFacts, tap: Tensors | None = None) -> bytes:
    """Serialize a reply for the site's store: safetensors with the facts in its header."""
    return save({**difference, **(tap or {})}, metadata={FACTS: json.dumps(asdict(facts))})


def unpack_reply(stored: bytes) -> Reply:
    """Read a stored reply."""
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    facts = ReplyFacts(**json.loads(header["__metadata__"][FACTS]))
    difference = load(stored)
    tap = {name: difference.pop(name) for name in (SUM, COINS) if name in difference}
    return Reply(difference, facts, tap)


def payload_bytes(content: RecordDict) -> int:
    """Count the serialized bytes of a record's tensors and facts."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    return arrays + sum(len(json.dumps(dict(record))) for record in content.config_records.values())


def state_hash(state: Tensors) -> str:
    """Name a state by its content."""
    return hash_state(state)


def _arrays(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(tensors[name].contiguous().numpy()) for name in sorted(tensors)})


def _tensors(record: object) -> Tensors:
    if not isinstance(record, ArrayRecord):
        raise Refusal("bad-message", "tensors are missing")
    out: Tensors = {}
    for name, array in record.items():
        if array.dtype != "float32":
            raise Refusal("bad-state", f"{name} is {array.dtype}")
        out[name] = _decode(name, array)
    return out


def _decode(name: str, array: Array) -> Tensor:
    """Read an array that is exactly what numpy.save writes for its declared shape, in fp32.

    Not numpy.load: it parses the sender's header, with a dozen kinds of exceptions and whatever memory
    the header asks for.
    """
    shape = tuple(array.shape)
    if array.stype != "numpy.ndarray" or any(size < 0 for size in shape):
        raise Refusal("bad-state", f"{name} cannot be decoded")
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    start = len(header.getvalue())
    if array.data[:start] != header.getvalue() or len(array.data) != start + 4 * math.prod(shape):
        raise Refusal("bad-state", f"{name} is not the array it says")
    return torch.from_numpy(np.frombuffer(array.data, dtype="<f4", offset=start).reshape(shape).copy())


def _parse(kind: type[T], record: object) -> T:
    if not isinstance(record, ConfigRecord):
        raise Refusal("bad-message", "the facts are missing")
    expected = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    if set(record) != set(expected):
        raise Refusal("bad-message", f"fields {sorted(set(record) ^ set(expected))}")
    for name, kind_name in expected.items():
        value = record[name]
        if type(value).__name__ != kind_name or (isinstance(value, float) and math.isnan(value)):
            raise Refusal("bad-message", f"field {name}")
    return kind(**dict(record))
