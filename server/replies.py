"""A site's reply at the server: checked against the round, decoded one tensor at a time.

What arrives is somebody else's: names, shapes, types, numbers and hashes are checked here before
anything is kept, and nothing is read but the closed schema of `common/wire.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyclinic.common.adapters import pad
from polyclinic.common.generators.base import Tensors
from polyclinic.common.refusals import Refusal
from polyclinic.common.rounding import SCALE, encode, rows_of, widen
from polyclinic.common.settings import Transport
from polyclinic.common.wire import DIFFERENCE, FACTS, HASHES, TAP, ReplyFacts
from polyclinic.common.wire_reading import DOWN, Reply, check_like, parse, parts_of


class Incoming(NamedTuple):
    """A reply whose facts and tap are read; its difference is decoded and checked as it is taken."""

    difference: Iterator[tuple[str, Tensor]]
    facts: ReplyFacts
    tap: Tensors


def open_reply(
    content: Any, like: Tensors, tap_like: Tensors | None = None, transport: Transport = "bf16"
) -> Incoming:
    """Unpack and check a reply.

    Args:
        content: What a site sent, a Flower RecordDict.
        like: What the round trains: names and shapes a difference must have. Adapters may be of a smaller
            rank; they are padded to the study's.
        tap_like: Names and shapes the tap must have in this round; none where there is no tap.
        transport: How the study's differences are written.

    Raises:
        Refusal: `bad-message` for any field outside the schema, `bad-state` for other names, shapes,
            types, or numbers that are not finite, `hash-mismatch` naming the tensor; where it is the
            difference that is wrong, when that tensor is taken.
    """
    wanted = {DIFFERENCE: like}
    if transport == "int8":
        wanted[SCALE] = {f"{SCALE}/{name}": torch.empty(rows_of(tensor)) for name, tensor in like.items()}
    if tap_like:
        wanted[TAP] = tap_like
    if set(content) != {FACTS, HASHES, *wanted}:
        raise Refusal("bad-message", f"records {sorted(content)}")
    parts = parts_of(content, wanted)
    for what, part in parts.items():
        if set(part.tensors) != set(wanted[what]):
            raise Refusal("bad-state", f"names differ, e.g. {min(set(part.tensors) ^ set(wanted[what]))}")
        for name, found in part.tensors.items():
            # A difference may be of a smaller rank, which is seen when it is taken.
            if what == TAP and found.shape != wanted[what][name].shape:
                raise Refusal("bad-state", f"{name} is {found.kind}{found.shape}")
    tap = {name: parts[TAP].decode(name, "fp32") for name in sorted(tap_like or {})}
    check_like(tap, tap_like or {})

    def difference() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(like):
            tensor = parts[DIFFERENCE].decode(name, transport)
            if transport == "int8":
                scales = parts[SCALE].decode(f"{SCALE}/{name}", "fp32")
                if scales.shape != (rows_of(tensor),):
                    raise Refusal("bad-state", f"{SCALE}/{name} has shape {tuple(scales.shape)}")
                tensor = widen(tensor, scales)
            tensor = pad(name, tensor.float(), like[name])
            check_like({name: tensor}, {name: like[name]})
            yield name, tensor

    return Incoming(difference(), parse(ReplyFacts, content[FACTS]), tap)


def read_reply(
    content: Any, like: Tensors, tap_like: Tensors | None = None, transport: Transport = "bf16"
) -> Reply:
    """Unpack and check a whole reply at once: as `open_reply`."""
    reply = open_reply(content, like, tap_like, transport)
    return Reply(dict(reply.difference), reply.facts, reply.tap)


def as_sent(state: Tensors, transport: Transport) -> Tensors:
    """The state as sites decode it: what they train from, and what their ledgers name by its hash."""
    return {name: encode(name, tensor, DOWN[transport])[name].float() for name, tensor in state.items()}


def payload_bytes(content: Any) -> int:
    """Count the serialized bytes of a message's tensors, facts and hashes, whatever a site put there."""
    # Not `content.array_records`: that property ties the content into a cycle with itself, which stays
    # in memory until Python's collector happens to come by.
    total = 0
    for record in content.values():
        arrays = [value for value in record.values() if hasattr(value, "data")]
        total += (
            sum(len(array.data) for array in arrays)
            if arrays
            else len(json.dumps(dict(record), default=repr))
        )
    return total
