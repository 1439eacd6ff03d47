"""A round at a site: policy, ledger and stored reply around the common training loop.

In the order of `ledger.py`. Asked again with the same round and state: the stored bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from polyclinic.client.approval import Approval, require_approval
from polyclinic.client.ledger import Ledger, open_ledger
from polyclinic.client.policy import check_noise
from polyclinic.client.residual import last_residual
from polyclinic.common.adapters import freeze, narrow
from polyclinic.common.chain import Line
from polyclinic.common.cost import Meter, append_cost, view_flops
from polyclinic.common.data.cache import Cached, load_cache
from polyclinic.common.device import pick_device
from polyclinic.common.generators.base import (
    Family,
    Tensors,
    load_family,
    load_trainable_state,
    trainable_state,
)
from polyclinic.common.generators.public import hash_state
from polyclinic.common.plain_engine import PlainEngine
from polyclinic.common.privacy.clipping import tau
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.tap import Tap
from polyclinic.common.refusals import Refusal
from polyclinic.common.selftest import self_test
from polyclinic.common.settings import Transport
from polyclinic.common.study import CODE_VERSION
from polyclinic.common.training import PrivateEngine, train
from polyclinic.common.wire import ReplyFacts, pack_reply
from polyclinic.common.wire_reading import RoundOrder, check_like

# Approvals whose self-test this process has passed: once at start-up is enough.
_SELF_TESTED: set[tuple[str, str]] = set()


def answer_round(
    home: Path, order: RoundOrder, decode: Callable[[Transport], Tensors], *, in_time: Callable[[], bool]
) -> bytes:
    """Answer one round.

    Args:
        home: The site's home.
        order: The round and the study it belongs to.
        decode: Gives the trainable state of the round, read as the approved study's transport says.
        in_time: Says whether the round's deadline is still ahead; asked before anything is spent.

    Returns:
        The stored reply: these bytes, and no others, may be sent.

    Raises:
        Refusal: With its code; nothing was spent unless the code is `site-fault`.
    """
    approval, policy = require_approval(home, order.study_hash)
    study = approval.resolved.study
    check_noise(policy, study, approval.sigma)
    if not 1 <= order.round <= study.training.rounds:
        raise Refusal("bad-message", f"round {order.round}")
    transport = study.federation.transport
    state = decode(transport)
    incoming = hash_state(state)
    with open_ledger(home) as ledger:
        stored = ledger.answered(approval.id, order.round, incoming)
        if stored is not None:
            return stored
        if not in_time():
            raise Refusal("round-too-late")
        device = pick_device(study.training.device)
        torch.set_num_threads(study.training.threads or torch.get_num_threads())
        family = load_family(
            study, approval.files, device=device, encoders=False, rank=policy.lora_rank, quantized=True
        )
        state = narrow(state, policy.lora_rank)
        check_like(state, trainable_state(family.module))
        if study.privacy.enabled and (approval.id, device) not in _SELF_TESTED:
            self_test(family, study.privacy.engine, study.privacy.views)
            _SELF_TESTED.add((approval.id, device))
        load_trainable_state(family.module, state)
        freeze(family.module, study.federation.lora_aggregation, order.round)
        data = load_cache(home / "cache", approval.cache_index)  # refuses before anything is spent
        residual = last_residual(ledger, approval, order.round)
        steps = study.training.steps_per_round
        margin = tau(study.privacy.engine, family.dtype) if study.privacy.enabled else 0.0
        flops = float(view_flops(family) * study.privacy.views * approval.divisor * steps)
        line = ledger.reserve(
            approval=approval.id,
            item=order.round,
            state=incoming,
            sigma=approval.sigma,
            rate=study.privacy.sampling_rate,
            steps=steps,
            tau=margin,
        )
        meter = Meter(device)

        def make() -> bytes:
            with meter:
                difference, tap = _train(approval, order.round, state, family, data, device)
            facts = _facts(approval, order, ledger, line, flops)
            return pack_reply(difference, facts, tap, transport, residual)

        reply = ledger.answer(approval.id, order.round, make)
        append_cost(home / "cost.jsonl", "train", meter.measurement, round=order.round, flops=flops)
        return reply


def _train(
    approval: Approval, round_number: int, state: Tensors, family: Family, data: Cached, device: str
) -> tuple[Tensors, Tensors]:
    """Train a round's steps and return the difference and what the tap sends, fp32 on the CPU."""
    study = approval.resolved.study
    random = KeyedRandom.for_attempt(study.training.test_key, approval.site, round_number)
    privacy, tap = study.privacy, None
    engine: PrivateEngine | PlainEngine
    if privacy.enabled:
        if privacy.canaries:
            rate, clip, margin = privacy.sampling_rate, privacy.clip, tau(privacy.engine, family.dtype)
            tap = Tap(approval.coins, random, rate=rate, clip=clip, margin=margin, device=device)
        engine = PrivateEngine(
            family,
            data,
            study,
            random,
            sigma=approval.sigma,
            divisor=approval.divisor,
            device=device,
            tap=tap,
        )
    else:
        engine = PlainEngine(family, data, study, random, device=device)
    steps = study.training.steps_per_round
    train(engine.step, (round_number - 1) * steps, steps, f"round {round_number} {approval.site}")
    moved = {name: tensor - state[name] for name, tensor in trainable_state(family.module).items()}
    return moved, tap.released(last=round_number == study.training.rounds) if tap else {}


def _facts(approval: Approval, order: RoundOrder, ledger: Ledger, line: Line, flops: float) -> ReplyFacts:
    study = approval.resolved.study
    private = study.privacy.enabled
    return ReplyFacts(
        round=order.round,
        sigma=line["sigma"],
        sampling_rate=line["rate"],
        steps=line["steps"],
        clip=study.privacy.clip if private else float("inf"),
        divisor=approval.divisor,
        tau=line["tau"],
        epsilon=ledger.epsilon(approval.id),
        delta=study.privacy.delta,
        code_version=CODE_VERSION,
        base_hash=approval.resolved.base_hash,
        study_hash=approval.resolved.hash,
        approval=approval.id,
        ledger_sequence=line["sequence"],
        ledger_hash=line["hash"],
        flops=flops,
    )
