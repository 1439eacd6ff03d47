"""Our own round loop over Flower's grid: deadline, quorum, grace, refusals, resume.

Flower's Strategy starts at round 1, waits forever, drops late replies silently and would release a
single hospital's update; this loop does none of that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from polyclinic.common.generators.base import Tensors
from polyclinic.common.privacy.tap import SUM, tap_like
from polyclinic.common.progress import say
from polyclinic.common.refusals import REASONS, Refusal, reason_of
from polyclinic.common.study import Resolved
from polyclinic.common.wire import (
    Reply,
    ReplyFacts,
    RoundOrder,
    order_records,
    payload_bytes,
    read_reply,
    state_hash,
)
from polyclinic.server.aggregation import advance, weighted_mean
from polyclinic.server.checkpoints import (
    Checkpoint,
    RoundRecord,
    load_checkpoint,
    rounds_done,
    save_checkpoint,
)
from polyclinic.server.evaluation.audit import Claim, round_alarm, round_level

POLL_S = 0.2

Names = Callable[[Grid], dict[int, str]]


def registered_names(grid: Grid) -> dict[int, str]:
    """Node id to the site name it was registered under; nodes without one take no part."""
    return {node.node_id: node.name for node in grid.get_nodes() if node.name}


def run_rounds(
    grid: Grid,
    resolved: Resolved,
    run_dir: Path,
    *,
    names: Names = registered_names,
    after_round: Callable[[Checkpoint], None] = lambda _: None,
) -> None:
    """Run every round that has no checkpoint yet.

    Args:
        grid: Where sites are reached.
        resolved: The study.
        run_dir: Holds the checkpoint of round 0 at least.
        names: How sites are named.
        after_round: Called with each new checkpoint, after it is on disk.

    Raises:
        Refusal: `too-few-replies` where a round cannot be released.
    """
    total = resolved.study.training.rounds
    checkpoint = load_checkpoint(run_dir, rounds_done(run_dir)[-1])
    for number in range(checkpoint.record.round + 1, total + 1):
        checkpoint = run_round(grid, resolved, checkpoint, number, names(grid))
        save_checkpoint(run_dir, checkpoint)
        after_round(checkpoint)


def run_round(
    grid: Grid, resolved: Resolved, before: Checkpoint, number: int, sites: dict[int, str]
) -> Checkpoint:
    """Send the state, collect differences until deadline or quorum and grace, combine them.

    Raises:
        Refusal: `too-few-replies`, with every site's reason.
    """
    settings = resolved.study.federation
    start = time.monotonic()
    order = RoundOrder(round=number, study_hash=resolved.hash)
    pending: dict[str, str] = {}
    down = up = 0
    for node, site in sorted(sites.items(), key=lambda item: item[1]):
        content = order_records(order, before.state)
        down += payload_bytes(content)
        message = Message(
            content,
            dst_node_id=node,
            message_type=MessageType.TRAIN,
            ttl=settings.deadline_s,
            group_id=str(number),
        )
        for message_id in grid.push_messages([message]):
            pending[message_id] = site
    differences: dict[str, Tensors] = {}
    facts: dict[str, ReplyFacts] = {}
    taps: dict[str, Tensors] = {}
    privacy = resolved.study.privacy
    wanted = tap_like(
        privacy.canaries if privacy.enabled else 0, last=number == resolved.study.training.rounds
    )
    refused: dict[str, str] = {}
    quorum = min(settings.quorum or len(pending), len(pending))
    end = start + settings.deadline_s
    while pending and time.monotonic() < end:
        replies = list(grid.pull_messages(list(pending)))
        for reply in replies:
            site = pending.pop(reply.metadata.reply_to_message_id)
            try:
                differences[site], facts[site], taps[site] = _open(reply, before.state, wanted)
                up += payload_bytes(reply.content)
            except Refusal as refusal:
                refused[site] = f"{refusal.reason.code} {refusal.reason.name}"
        if len(differences) >= quorum:
            end = min(end, time.monotonic() + settings.grace_s)
            quorum = len(sites) + 1  # the grace period starts once
        if pending and not replies:
            time.sleep(POLL_S)
    absent = sorted(pending.values())
    if len(differences) < settings.min_sites:
        raise Refusal(
            "too-few-replies",
            f"round {number}: {len(differences)} of at least {settings.min_sites}; "
            f"refused: {refused or 'none'}; "
            f"absent: {absent or 'none'}",
        )
    mean = weighted_mean(((site, differences[site]) for site in sorted(differences)), settings)
    state, average = advance(before.state, before.average, mean, settings)
    seconds = time.monotonic() - start
    say(
        f"round {number}: {len(differences)} sites replied in {seconds:.1f} s"
        + (f", refused: {refused}" if refused else "")
    )
    for alarm in _alarms(resolved, number, facts, taps):
        say(f"AUDIT ALARM, round {number}, {alarm}")
    record = RoundRecord(
        round=number,
        state_hash=state_hash(state),
        replied={site: asdict(facts[site]) for site in sorted(facts)},
        refused=refused,
        absent=absent,
        bytes_down=down,
        bytes_up=up,
        seconds=seconds,
    )
    return Checkpoint(record, state, average, taps if wanted else {})


def claim_of(resolved: Resolved, facts: Mapping[str, float | int | str]) -> Claim:
    """What a site's mechanism is held to: the study's own settings, and what only the site knows."""
    privacy = resolved.study.privacy
    return Claim(
        sigma=float(facts["sigma"]),
        clip=privacy.clip,
        divisor=float(facts["divisor"]),
        rate=privacy.sampling_rate,
        steps=resolved.study.training.steps_per_round,
        tau=float(facts["tau"]),
        epsilon=float(facts["epsilon"]),
        delta=privacy.delta,
    )


def _alarms(
    resolved: Resolved, number: int, facts: dict[str, ReplyFacts], taps: dict[str, Tensors]
) -> Iterator[str]:
    """Test each site's noise while the run goes on; the report tests it again, and more at the end."""
    level = round_level(resolved.study.training.rounds, max(1, len(taps)))
    for site, tap in sorted(taps.items()):
        alarm = round_alarm(tap[SUM], claim_of(resolved, asdict(facts[site])), level) if tap else None
        if alarm:
            yield f"{site}: {alarm}"


def _open(reply: Message, state: Tensors, tap: Tensors) -> Reply:
    """Read a reply, or turn its error into a refusal with the site's own code."""
    if reply.has_error():
        reason = reason_of(reply.error.code) or REASONS["site-fault"]
        raise Refusal(reason.name)
    opened = read_reply(reply.content, state, tap)
    if tap and not _possible(opened.facts):
        raise Refusal("bad-message", "the facts are not those of a private mechanism")
    return opened


def _possible(facts: ReplyFacts) -> bool:
    """Tell whether a private mechanism can have these parameters, so that it can be audited."""
    return 0 < facts.sigma < math.inf and 0 < facts.divisor < math.inf and facts.tau >= 0 <= facts.epsilon
