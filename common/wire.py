"""What crosses the wire: trainable state <-> Flower records, in a closed schema (PRIVACY.md, rule 12).

Down: the trainable state, the round number and the deadline. Up: the noised difference, the audit
tap's sums where the study has a tap, and the fields of `ReplyFacts`, all of them public parameters.
Both ways: the SHA-256 of every tensor's bytes. Anything else is refused on both sides.

States and differences are written as the approved study's `federation.transport` says, and read as it
says, never as a message says. int8 sends a difference as 8-bit steps and a scale a row; what rounding
lost stays in the stored reply and is added to the site's next difference (error feedback: Seide et al.
2014, Karimireddy et al. 2019). The tap is always fp32: it is tested against the noise it should have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from polyclinic.common.generators.base import Tensors
from polyclinic.common.refusals import Refusal
from polyclinic.common.settings import Transport

T = TypeVar("T")

STATE, ROUND, DIFFERENCE, TAP, FACTS, HASHES = "state", "round", "difference", "tap", "facts", "hashes"
# Also what the names in these parts begin with; no parameter's name has the slash that follows.
SCALE, RESIDUAL = "scale", "residual"

# Transport to the type in memory, and to its name in a safetensors file.
_TYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16"), "int8": (torch.int8, "I8")}
# A part travels as one array, a safetensors file: Flower fetches every array, and every 5 MB of it, by a
# request of its own, and a network has hundreds of small tensors.
_FILE = "safetensors"
# A state sent down is rounded to a number's own exponent even where differences are 8-bit steps.
DOWN: dict[Transport, Transport] = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16"}
_LARGEST = torch.finfo(torch.bfloat16).max  # fp32 goes a little further, to what bf16 calls infinity


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


def order_records(order: RoundOrder, state: Tensors, transport: Transport = "bf16") -> RecordDict:
    """Pack what goes down to a site."""
    tensors, hashes = _pack({name: encode(name, state[name], DOWN[transport])[name] for name in state})
    return RecordDict({STATE: tensors, ROUND: ConfigRecord(asdict(order)), HASHES: ConfigRecord(hashes)})


def read_order(content: RecordDict) -> tuple[RoundOrder, Callable[[Transport], Tensors]]:
    """Unpack an order at a site, and how to decode its state once the site's approval has told the transport.

    Raises:
        Refusal: `bad-message` for other fields or types; when decoded, `bad-state` for odd tensors and
            `hash-mismatch` naming the tensor.
    """
    if set(content) != {STATE, ROUND, HASHES}:
        raise Refusal("bad-message", f"records {sorted(content)}")

    def state(transport: Transport) -> Tensors:
        part = parts_of(content, [STATE])[STATE]
        return {name: part.decode(name, DOWN[transport]).float() for name in sorted(part.tensors)}

    return parse(RoundOrder, content[ROUND]), state


def reply_records(stored: bytes) -> RecordDict:
    """Pack a stored reply, and only a stored reply, for the way up; its residual stays."""
    parts, facts = _stored(stored)
    packed = {part: _pack(parts[part]) for part in (DIFFERENCE, SCALE, TAP) if part in parts}
    hashes = {name: value for _, found in packed.values() for name, value in found.items()}
    sent = {part: tensors for part, (tensors, _) in packed.items()}
    return RecordDict({**sent, FACTS: ConfigRecord(asdict(facts)), HASHES: ConfigRecord(hashes)})


def check_like(tensors: Tensors, like: Tensors) -> None:
    """Refuse tensors whose names, shapes or types are not `like`'s, or that are not finite."""
    if tensors.keys() != like.keys():
        raise Refusal("bad-state", f"names differ, e.g. {sorted(tensors.keys() ^ like.keys())[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape or tensor.dtype != torch.float32:
            raise Refusal("bad-state", f"{name} is {tensor.dtype}{tuple(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise Refusal("bad-state", f"{name} is not finite")


def pack_reply(
    difference: Tensors,
    facts: ReplyFacts,
    tap: Tensors | None = None,
    transport: Transport = "bf16",
    residual: Tensors | None = None,
) -> bytes:
    """Serialize a reply for the site's store: safetensors, encoded, with the facts in its header.

    Args:
        difference: The noised difference, fp32.
        facts: What is said beside it.
        tap: The audit tap's tensors.
        transport: How it is written; these bytes are what is sent, whatever the study says later.
        residual: int8: what rounding lost in the site's reply before; empty at the first.
    """
    tensors = dict(tap or {})
    for name, tensor in difference.items():
        tensors.update(encode(name, tensor, transport, (residual or {}).get(name)))
    return save(tensors, metadata={FACTS: json.dumps(asdict(facts))})


def unpack_reply(stored: bytes) -> Reply:
    """Read a stored reply, decoded."""
    parts, facts = _stored(stored)
    scales = parts.get(SCALE, {})
    difference = {
        name: widen(tensor, scales[f"{SCALE}/{name}"]) if scales else tensor.float()
        for name, tensor in parts[DIFFERENCE].items()
    }
    return Reply(difference, facts, parts.get(TAP, {}))


def unpack_residual(stored: bytes) -> Tensors:
    """Read what rounding lost in a stored reply; it never leaves the site."""
    parts, _ = _stored(stored)
    return {name.removeprefix(f"{RESIDUAL}/"): tensor for name, tensor in parts.get(RESIDUAL, {}).items()}


def rows_of(tensor: Tensor) -> int:
    """Scales a tensor has: one a slice of its leading dimension, one in all for a vector."""
    return len(tensor) if tensor.dim() > 1 else 1


def widen(steps: Tensor, scale: Tensor) -> Tensor:
    """Multiply 8-bit steps by their rows' scales, in fp32."""
    return (steps.reshape(len(scale), -1).float() * scale[:, None]).reshape(steps.shape)


def encode(name: str, tensor: Tensor, transport: Transport, residual: Tensor | None = None) -> Tensors:
    """Round a tensor; in int8, with its scales and with what the rounding lost.

    What is finite stays finite; what is not becomes a scale or a number that the other side refuses.
    """
    if transport == "fp32":
        return {name: tensor}
    wanted = (tensor if residual is None else tensor + residual).clamp(-_LARGEST, _LARGEST)
    if transport == "bf16":
        return {name: wanted.bfloat16()}
    rows = wanted.reshape(rows_of(wanted), -1)
    scale = rows.abs().amax(dim=1) / 127
    # A row of zeros divides by zero: no step is its step.
    rounded = (rows / scale[:, None]).nan_to_num(0.0).round().clamp(-127, 127)
    steps = rounded.to(torch.int8).reshape(wanted.shape)
    return {name: steps, f"{SCALE}/{name}": scale, f"{RESIDUAL}/{name}": wanted - widen(steps, scale)}


def _stored(stored: bytes) -> tuple[dict[str, Tensors], ReplyFacts]:
    """Sort a stored reply's tensors into the parts that their names begin with."""
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    parts: dict[str, Tensors] = {}
    for name, tensor in load(stored).items():
        part, slash, _ = name.partition("/")
        parts.setdefault(part if slash else DIFFERENCE, {})[name] = tensor
    return parts, ReplyFacts(**json.loads(header["__metadata__"][FACTS]))


def _pack(tensors: Tensors) -> tuple[ArrayRecord, dict[str, str]]:
    """Write tensors into one array, and hash each."""
    raw = {name: x.contiguous().reshape(-1).view(torch.uint8).numpy() for name, x in tensors.items()}
    packed = save(tensors)
    array = Array(dtype="uint8", shape=(len(packed),), stype=_FILE, data=packed)
    return ArrayRecord({_FILE: array}), {name: sha256(x.data).hexdigest() for name, x in raw.items()}


class Stored(NamedTuple):
    """A tensor as it lies in a safetensors file: its type's name, its shape, its bytes."""

    kind: str
    shape: tuple[int, ...]
    data: memoryview


class Part(NamedTuple):
    """Tensors of a message, not decoded yet.

    Attributes:
        tensors: By name.
        hashes: Name to the SHA-256 that the sender gave for its bytes.
    """

    tensors: dict[str, Stored]
    hashes: dict[str, object]

    def decode(self, name: str, transport: Transport) -> Tensor:
        """Read a tensor of the study's type.

        Raises:
            Refusal: `bad-state` for another type or too few bytes, `hash-mismatch`.
        """
        found, (kind, wanted) = self.tensors[name], _TYPES[transport]
        size = kind.itemsize * math.prod(found.shape)
        if found.kind != wanted or len(found.data) != size or any(n < 0 for n in found.shape):
            raise Refusal("bad-state", f"{name} is {len(found.data)} bytes of {found.kind}{found.shape}")
        if sha256(found.data).hexdigest() != self.hashes[name]:
            raise Refusal("hash-mismatch", name)
        raw = torch.from_numpy(np.frombuffer(found.data, dtype=np.uint8).copy())
        return raw.view(kind).reshape(found.shape)


def parts_of(content: RecordDict, names: Iterable[str]) -> dict[str, Part]:
    """Find a message's tensors; refuses `bad-message` or `bad-state` unless they are written as ours are."""
    hashes = content[HASHES]
    if not isinstance(hashes, ConfigRecord):
        raise Refusal("bad-message", "the hashes are missing")
    found = {name: Part(_read(content[name], name), dict(hashes)) for name in names}
    if set(hashes) != {name for part in found.values() for name in part.tensors}:
        raise Refusal("bad-message", "the hashes are not those of the tensors")
    return found


def _read(record: object, part: str) -> dict[str, Stored]:
    """Find the tensors in a part's file. Not by safetensors' own reader, which copies them all at once."""
    if not isinstance(record, ArrayRecord) or set(record) != {_FILE}:
        raise Refusal("bad-message", "tensors are missing")
    array = record[_FILE]
    data = memoryview(array.data)
    end = start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    try:
        for name, entry in json.loads(bytes(data[8:start])).items():
            first, last = (start + int(place) for place in entry["data_offsets"])
            if first != end or len(entry) != 3:  # nothing rides along, between tensors or in the header
                raise ValueError(name)
            found[name] = Stored(str(entry["dtype"]), tuple(map(int, entry["shape"])), data[first:last])
            end = last
        if end != len(data) or (array.dtype, array.shape, array.stype) != ("uint8", (end,), _FILE):
            raise ValueError(part)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise Refusal("bad-state", f"{part} is not a safetensors file") from error
    return found


def parse(kind: type[T], record: object) -> T:
    """Read a record that has exactly the fields of a dataclass, with their types."""
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
