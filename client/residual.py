"""Error feedback of int8 (Seide et al. 2014, Karimireddy et al. 2019).

What rounding lost of a stored, noised reply is added to the site's next difference.
"""

from __future__ import annotations

from polyclinic.client.approval import Approval
from polyclinic.client.ledger import Ledger
from polyclinic.common.files import sha256_file
from polyclinic.common.generators.base import Tensors
from polyclinic.common.refusals import Refusal
from polyclinic.common.rounding import RESIDUAL
from polyclinic.common.wire import ReplyFacts, sort_stored


def last_residual(ledger: Ledger, approval: Approval, round_number: int) -> Tensors:
    """What rounding lost in the reply to the last settled round that moved these tensors; else nothing.

    Stacking gives the factors another basis after each round: what was lost of the old ones is no part of it.
    """
    federation = approval.resolved.study.federation
    turns = 2 if federation.lora_aggregation == "alternate" else 1
    before = range(round_number - turns, 0, -turns)
    settled = [line for line in ledger.of(approval.id, "settle") if line["round"] in before]
    if federation.transport != "int8" or federation.lora_aggregation == "stack" or not settled:
        return {}
    last = max(settled, key=lambda line: int(line["round"]))
    path = ledger.reply_path(approval.id, last["round"])
    if not path.exists() or sha256_file(path) != last["reply"]:
        raise Refusal("reply-broken", str(path))
    return unpack_residual(path.read_bytes())


def unpack_residual(stored: bytes) -> Tensors:
    """Read what rounding lost in a stored reply; it never leaves the site."""
    parts, _ = sort_stored(stored, ReplyFacts)
    return {name.removeprefix(f"{RESIDUAL}/"): tensor for name, tensor in parts.get(RESIDUAL, {}).items()}
