"""What leaves a site: stored replies <-> Flower records, in a closed schema (PRIVACY.md, rule 12).

Up: the noised difference, the audit tap's sums where the study has a tap, and the fields of `ReplyFacts`,
all of them public parameters; once a study, a noisy sum and `ReleaseFacts`. Both ways: the SHA-256 of
every tensor's bytes. What comes down, and how either side reads a message, is in `wire_reading.py`;
anything else is refused there.

States and differences are written as the approved study's `federation.transport` says (`rounding.py`), and
read as it says, never as a message says. What rounding lost stays in the stored reply. The tap is always
fp32: it is tested against the noise it should have.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from polyclinic.common.generators.base import Tensors
from polyclinic.common.rounding import SCALE, encode
from polyclinic.common.settings import Transport

DIFFERENCE, TAP, SUM, FACTS, HASHES = "difference", "tap", "sum", "facts", "hashes"
RELEASE = f"{SUM}/release"  # the one tensor of an extra release

# A part travels as one array, a safetensors file: Flower fetches every array, and every 5 MB of it, by a
# request of its own, and a network has hundreds of small tensors.
FILE = "safetensors"


def said(words: str) -> Any:
    """Make a field of facts that leave a site; an approval shows it to a person in these words."""
    return field(metadata={"words": words})


@dataclass(frozen=True)
class ReplyFacts:
    """Every field that leaves a site beside the difference; all follow from public quantities."""

    round: int = said("number of the round")
    sigma: float = said("strength of the noise, in units of the clipping bound; 0: not private")
    sampling_rate: float = said("chance of a patient to be in a step")
    steps: int = said("steps taken")
    clip: float = said("bound on what one patient can contribute to a step")
    divisor: float = said("sampling rate x declared patients: tells the declared size of this site")
    tau: float = said("margin for rounding errors: every contribution was scaled by 1 / (1 + tau)")
    epsilon: float = said("privacy spent in this study so far; infinite: not private")
    delta: float = said("chance that the guarantee may fail")
    code_version: str = said("release of Polyclinic here")
    base_hash: str = said("hash of the frozen public base")
    study_hash: str = said("hash of the study")
    approval: str = said("random number of this approval")
    ledger_sequence: int = said("number of the ledger's line for the round")
    ledger_hash: str = said("salted hash of that line")
    flops: float = said("operations of the expected batch, from public numbers; not what was measured")


@dataclass(frozen=True)
class ReleaseFacts:
    """Every field that leaves a site with an extra release: public, but for a person's own word."""

    release: str = said("which release: fidelity (a noisy sum of image features) or gate (a person's word)")
    verdict: str = said("gate: released or not released, as a person here decided, never why")
    model: str = said("gate: hash of the final generator that was looked at")
    sigma: float = said("strength of the noise, in units of the bound below; 0: no sum, or not private")
    bound: float = said("most that one patient can add to the sum; 0: no sum")
    tau: float = said("margin for rounding errors: every patient's part was scaled by 1 / (1 + tau)")
    epsilon: float = said("privacy spent in this study so far; infinite: not private")
    delta: float = said("chance that the guarantee may fail")
    code_version: str = said("release of Polyclinic here")
    study_hash: str = said("hash of the study")
    approval: str = said("random number of this approval")
    ledger_sequence: int = said("number of the ledger's line for the release; 0: no sum")
    ledger_hash: str = said("salted hash of that line")


Facts = TypeVar("Facts", ReplyFacts, ReleaseFacts)


def reply_records(stored: bytes) -> RecordDict:
    """Pack a stored reply, and only a stored reply, for the way up; its residual stays."""
    return _records(stored, ReplyFacts)


def release_records(stored: bytes) -> RecordDict:
    """Pack a stored extra release, and only a stored one, for the way up."""
    return _records(stored, ReleaseFacts)


def _records(stored: bytes, kind: type[Facts]) -> RecordDict:
    parts, facts = sort_stored(stored, kind)
    packed = {part: pack(parts[part]) for part in (DIFFERENCE, SCALE, TAP, SUM) if part in parts}
    hashes = {name: value for _, found in packed.values() for name, value in found.items()}
    sent = {part: tensors for part, (tensors, _) in packed.items()}
    return RecordDict({**sent, FACTS: ConfigRecord(asdict(facts)), HASHES: ConfigRecord(hashes)})


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


def pack_release(total: Tensor | None, facts: ReleaseFacts) -> bytes:
    """Serialize an extra release for the site's store: the noisy sum, if there is one, and its facts."""
    return save({} if total is None else {RELEASE: total}, metadata={FACTS: json.dumps(asdict(facts))})


def sort_stored(stored: bytes, kind: type[Facts]) -> tuple[dict[str, Tensors], Facts]:
    """Sort a stored reply's tensors into the parts that their names begin with."""
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    parts: dict[str, Tensors] = {}
    for name, tensor in load(stored).items():
        part, slash, _ = name.partition("/")
        parts.setdefault(part if slash else DIFFERENCE, {})[name] = tensor
    return parts, kind(**json.loads(header["__metadata__"][FACTS]))


def pack(tensors: Tensors) -> tuple[ArrayRecord, dict[str, str]]:
    """Write tensors into one array, and hash each."""
    raw = {name: x.contiguous().reshape(-1).view(torch.uint8).numpy() for name, x in tensors.items()}
    packed = save(tensors)
    array = Array(dtype="uint8", shape=(len(packed),), stype=FILE, data=packed)
    return ArrayRecord({FILE: array}), {name: sha256(x.data).hexdigest() for name, x in raw.items()}
