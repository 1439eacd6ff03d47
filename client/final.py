"""The final generator as a site receives it: the same schema as a round's state, kept whole, once.

It is public: everybody who is given the generator has it. A site cannot know that what it was sent is what
the coordinator hands out; so the hash stands in what the site says, and anybody can compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save

from polyclinic.client.approval import Approval, require_approval
from polyclinic.client.ledger import Ledger
from polyclinic.client.ledger_chain import inspect
from polyclinic.client.releases import release_facts
from polyclinic.common.files import write_atomic
from polyclinic.common.generators.base import Tensors, load_family, trainable_state
from polyclinic.common.generators.public import hash_state
from polyclinic.common.refusals import Refusal
from polyclinic.common.settings import Transport
from polyclinic.common.wire import pack_release
from polyclinic.common.wire_reading import RoundOrder, check_like

FINAL = "final"


def receive_final(
    home: Path, order: RoundOrder, decode: Callable[[Transport], Tensors], *, in_time: Callable[[], bool]
) -> bytes:
    """Keep the final generator for the leakage gate.

    Args:
        home: The site's home.
        order: Names the study; its round is the last one.
        decode: Gives the state, as in `answer_round`.
        in_time: As in `answer_round`.

    Returns:
        What is sent back: the hash of what was kept.

    Raises:
        Refusal: `bad-message` where the study has no gate, `bad-state`, or `final-already-given`.
    """
    approval, _ = require_approval(home, order.study_hash)
    study = approval.resolved.study
    if not study.releases.leakage_gate or order.round != study.training.rounds:
        raise Refusal("bad-message", f"final generator of round {order.round}")
    if not in_time():
        raise Refusal("round-too-late")
    state = decode(study.federation.transport)
    path = final_path(home, approval)
    if not path.exists():
        family = load_family(study, approval.files, encoders=False)
        check_like(state, trainable_state(family.module))
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(path, save(state), mode=0o600)
    model = hash_state(state)
    if hash_state(load_final(home, approval)) != model:
        raise Refusal("final-already-given", str(path))
    spent = Ledger(home, inspect(home)[0]).epsilon(approval.id)
    return pack_release(None, replace(release_facts(approval, FINAL, 0.0, model=model), epsilon=spent))


def load_final(home: Path, approval: Approval) -> Tensors:
    """Read the final generator's trainable state.

    Raises:
        Refusal: `final-missing`.
    """
    path = final_path(home, approval)
    if not path.exists():
        raise Refusal("final-missing", str(path))
    return load_file(str(path))


def final_path(home: Path, approval: Approval) -> Path:
    """Where it is kept."""
    return home / FINAL / f"{approval.resolved.hash}.safetensors"
