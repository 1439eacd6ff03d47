"""How a message is read, on either side, and what comes down to a site.

Down: the trainable state, the round number and the hash of the study. No image and nothing made from one
is here: the guarantee lets what comes in be anything. What is not as `wire.py` writes it is refused.
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
from torch import Tensor

from polyclinic.common.generators.base import Tensors
from polyclinic.common.refusals import Refusal
from polyclinic.common.rounding import SCALE, encode, widen
from polyclinic.common.settings import Transport
from polyclinic.common.wire import (
    DIFFERENCE,
    FACTS,
    FILE,
    HASHES,
    RELEASE,
    SUM,
    TAP,
    ReleaseFacts,
    ReplyFacts,
    pack,
    sort_stored,
)

T = TypeVar("T")

STATE, ROUND = "state", "round"

# Transport to the type in memory, and to its name in a safetensors file.
_TYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16"), "int8": (torch.int8, "I8")}
# A state sent down is rounded to a number's own exponent even where differences are 8-bit steps.
DOWN: dict[Transport, Transport] = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16"}


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
class ReleaseOrder:
    """What the server asks for beside rounds.

    Attributes:
        release: `fidelity` or `gate`.
        study_hash: Names the approved study.
    """

    release: str
    study_hash: str


class Reply(NamedTuple):
    """What a site answers: only `difference` is ever aggregated, `tap` is for the audit alone."""

    difference: Tensors
    facts: ReplyFacts
    tap: Tensors


def order_records(order: RoundOrder, state: Tensors, transport: Transport = "bf16") -> RecordDict:
    """Pack what goes down to a site."""
    tensors, hashes = pack({name: encode(name, state[name], DOWN[transport])[name] for name in state})
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


def release_order(order: ReleaseOrder) -> RecordDict:
    """Pack the question for an extra release."""
    return RecordDict({SUM: ConfigRecord(asdict(order))})


def read_release_order(content: RecordDict) -> ReleaseOrder:
    """Unpack it at a site.

    Raises:
        Refusal: `bad-message` for other fields or types.
    """
    if set(content) != {SUM}:
        raise Refusal("bad-message", f"records {sorted(content)}")
    return parse(ReleaseOrder, content[SUM])


def read_release(content: RecordDict, length: int) -> tuple[Tensor | None, ReleaseFacts]:
    """Unpack an extra release at the server.

    Args:
        content: What a site sent.
        length: Numbers in its sum, where it has one.

    Raises:
        Refusal: `bad-message`, `bad-state` or `hash-mismatch`.
    """
    named = [SUM] if SUM in content else []
    if set(content) != {FACTS, HASHES, *named}:
        raise Refusal("bad-message", f"records {sorted(content)}")
    facts = parse(ReleaseFacts, content[FACTS])
    parts = parts_of(content, named)
    if not named:
        return None, facts
    if set(parts[SUM].tensors) != {RELEASE}:
        raise Refusal("bad-state", f"tensors {sorted(parts[SUM].tensors)}")
    total = parts[SUM].decode(RELEASE, "fp32")
    check_like({RELEASE: total}, {RELEASE: torch.empty(length)})
    return total, facts


def check_like(tensors: Tensors, like: Tensors) -> None:
    """Refuse tensors whose names, shapes or types are not `like`'s, or that are not finite."""
    if tensors.keys() != like.keys():
        raise Refusal("bad-state", f"names differ, e.g. {sorted(tensors.keys() ^ like.keys())[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape or tensor.dtype != torch.float32:
            raise Refusal("bad-state", f"{name} is {tensor.dtype}{tuple(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise Refusal("bad-state", f"{name} is not finite")


def unpack_reply(stored: bytes) -> Reply:
    """Read a stored reply, decoded."""
    parts, facts = sort_stored(stored, ReplyFacts)
    scales = parts.get(SCALE, {})
    difference = {
        name: widen(tensor, scales[f"{SCALE}/{name}"]) if scales else tensor.float()
        for name, tensor in parts[DIFFERENCE].items()
    }
    return Reply(difference, facts, parts.get(TAP, {}))


def echoed(stored: bytes) -> tuple[int, str]:
    """Number and hash of the ledger's line that a stored reply or extra release echoes."""
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    facts = json.loads(header["__metadata__"][FACTS])
    return int(facts["ledger_sequence"]), str(facts["ledger_hash"])


def digest(content: RecordDict) -> tuple[str, int]:
    """SHA-256 over every entry's name, type and bytes, in the order of names; and the number of bytes."""
    total, size = sha256(), 0
    for name, record in sorted(content.items()):
        for key, value in sorted(record.items()):
            plain = not isinstance(value, Array)
            kind = "" if plain else f"{value.stype}|{value.dtype}|{tuple(value.shape)}"
            data = repr(value).encode() if plain else value.data
            total.update(f"{name}/{key}|{kind}|{len(data)}\n".encode())
            total.update(data)
            size += len(data)
    return total.hexdigest(), size


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
    if not isinstance(record, ArrayRecord) or set(record) != {FILE}:
        raise Refusal("bad-message", "tensors are missing")
    array = record[FILE]
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
        if end != len(data) or (array.dtype, array.shape, array.stype) != ("uint8", (end,), FILE):
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
