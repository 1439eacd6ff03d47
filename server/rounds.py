"""Our own round loop over Flower's grid: deadline, quorum, grace, refusals, resume.

Flower's Strategy starts at round 1, waits forever, drops late replies silently and would release a
single hospital's update; this loop does none of that. Sites are asked when they are there, and again
when the way to them broke: a site answers from its stored reply, or uses its reservation once more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from polyclinic.common.adapters import trained
from polyclinic.common.cost import Meter, append_cost
from polyclinic.common.generators.base import Tensors
from polyclinic.common.generators.public import hash_state
from polyclinic.common.privacy.tap import tap_like
from polyclinic.common.progress import say
from polyclinic.common.refusals import REASONS, Refusal, reason_of
from polyclinic.common.settings import Transport
from polyclinic.common.study import Resolved
from polyclinic.common.wire_reading import RoundOrder, order_records
from polyclinic.server import silence
from polyclinic.server.alarms import is_possible, misfit, round_alarms
from polyclinic.server.checkpoints import (
    Checkpoint,
    RoundRecord,
    checkpoint_folder,
    load_checkpoint,
    rounds_done,
    save_checkpoint,
)
from polyclinic.server.link import Link, Names, registered_names
from polyclinic.server.open_round import OpenRound
from polyclinic.server.plausible import longest_difference
from polyclinic.server.progress_file import ABSENT, ASKED, NOT_HERE, REPLIED, Board
from polyclinic.server.replies import Incoming, as_sent, open_reply, payload_bytes
from polyclinic.server.server_optimizer import moments_of
from polyclinic.server.spool import clear_spool, spool_folder, spool_path, write_tensors
from polyclinic.server.stacking import step

# Seconds between two looks for replies (they grow while nothing comes), and for new sites.
POLL_S, SLOWEST_POLL_S = 0.2, 2.0
NAMES_S = 1.0

# The way to the site broke, or the site is still busy with an earlier asking: nothing was refused.
ASK_AGAIN = {
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
    REASONS["another-process"].code,
}


class Finish(Protocol):
    """What is asked of the sites after the last round (`collect.py`)."""

    def __call__(
        self,
        grid: Grid,
        resolved: Resolved,
        run_dir: Path,
        board: Board,
        *,
        names: Names,
        expected: Sequence[str],
    ) -> None:
        """Ask, and keep what comes in the run's folder."""


def run_rounds(
    grid: Grid,
    resolved: Resolved,
    run_dir: Path,
    *,
    names: Names = registered_names,
    after_round: Callable[[Checkpoint], None] = lambda _: None,
    expected: Sequence[str] | None = None,
    withdrawn: Callable[[], Collection[str]] = tuple,
    finish: Finish | None = None,
) -> None:
    """Run every round that has no checkpoint yet, and keep `progress.json` up to date.

    Args:
        grid: Where sites are reached.
        resolved: The study.
        run_dir: Holds the checkpoint of round 0 at least.
        names: How the sites that are online are named.
        after_round: Called with each new checkpoint, after it is on disk; its tensors become the next
            round's, in place.
        expected: Sites that should take part: a round waits for them until its deadline and names those
            that never came. Others that come are asked, too. Default: a simulation's sites, or none.
        withdrawn: Gives the sites that were put out since; an open round does not wait for them either.
        finish: Called after the last round, while `progress.json` still says that the run goes on.

    Raises:
        Refusal: `too-few-replies` where a round cannot be released.
        BadInput: The disk is full.
    """
    study = resolved.study
    if expected is None:
        expected = sorted(study.simulation.sites) if study.simulation else []
    clear_spool(run_dir)  # what a killed server left
    with Board(run_dir, resolved) as board:
        checkpoint = load_checkpoint(run_dir, rounds_done(run_dir)[-1])
        for number in range(checkpoint.record.round + 1, study.training.rounds + 1):
            try:
                checkpoint = run_round(
                    *(grid, resolved, checkpoint, number),
                    names=names,
                    expected=[site for site in expected if site not in withdrawn()],
                    withdrawn=withdrawn,
                    board=board,
                )
                save_checkpoint(run_dir, checkpoint)
            finally:
                clear_spool(run_dir)
            board.close(checkpoint.record)
            after_round(checkpoint)
        if finish is not None:
            finish(grid, resolved, run_dir, board, names=names, expected=expected)


def run_round(
    grid: Grid,
    resolved: Resolved,
    before: Checkpoint,
    number: int,
    *,
    board: Board,
    names: Names = registered_names,
    expected: Sequence[str] = (),
    withdrawn: Callable[[], Collection[str]] = tuple,
) -> Checkpoint:
    """Send the state, collect differences until deadline or quorum and grace, combine them.

    The round begins, and its deadline starts to run, when `min_sites` are online.

    Args:
        grid: Where sites are reached.
        resolved: The study.
        before: The last checkpoint; its tensors become the new one's, in place. State and average
            share no memory.
        number: Of the round.
        board: Says where the round stands; its run folder holds the spool.
        names: How the sites that are online are named.
        expected: Sites that should take part.
        withdrawn: Gives the sites that were put out since.

    Raises:
        Refusal: `too-few-replies`, with every site's reason.
        BadInput: The disk is full; the last checkpoint stands.
    """
    study, settings = resolved.study, resolved.study.federation
    link = Link(grid)
    board.open(number, expected, settings.quorum or len(expected), settings.deadline_s)
    online = _wait_for_sites(link, names, resolved, number, expected)
    start = time.monotonic()
    board.phase("training", settings.deadline_s)
    sent_hash = hash_state(as_sent(before.state, settings.transport))
    order = RoundOrder(round=number, study_hash=resolved.hash)
    last = number == study.training.rounds
    opened = OpenRound(
        number=number,
        resolved=resolved,
        board=board,
        like=trained(before.state, settings.lora_aggregation, number),
        content=order_records(order, before.state, settings.transport),
        tap=tap_like(study.privacy.canaries if study.privacy.enabled else 0, last=last),
        longest=longest_difference(study, number, before.state),
        end=start + settings.deadline_s,
        everyone={site for site in expected if settings.weights == "equal" or site in settings.weights},
        usual=before.record.seconds or settings.deadline_s / 4,
    )
    _collect(link, opened, names, online, withdrawn, known=bool(expected))
    absent = sorted(
        opened.everyone - opened.differences.keys() - opened.rejected.keys() - opened.refused.keys()
    )
    for site in absent:
        board.site(site, ABSENT)
    others = {"refused": opened.refused, "rejected": opened.rejected, "absent": absent}
    if len(opened.differences) < settings.min_sites:
        told = "; ".join(f"{what}: {sites or 'none'}" for what, sites in others.items())
        raise Refusal(
            "too-few-replies",
            f"round {number}: {len(opened.differences)} of at least {settings.min_sites}; {told}",
        )
    board.phase("combining")
    opened.content = None
    last_folder, spool = checkpoint_folder(board.run_dir, number - 1), spool_folder(board.run_dir, number)
    moments = moments_of(last_folder, spool, settings)
    with Meter() as meter:
        step(number, before.state, before.average, opened.differences, settings, moments)
    seconds = time.monotonic() - start
    append_cost(board.run_dir / "cost.jsonl", "combine", meter.measurement, round=number)
    say(
        f"round {number}: {len(opened.differences)} sites replied in {seconds:.1f} s"
        + "".join(f", {what}: {sites}" for what, sites in others.items() if sites)
    )
    for alarm in round_alarms(resolved, number, opened.facts, opened.taps):
        say(f"AUDIT ALARM, round {number}, {alarm}")
    record = RoundRecord(
        round=number,
        state_hash=hash_state(before.state),
        sent_hash=sent_hash,
        replied={site: asdict(opened.facts[site]) for site in sorted(opened.facts)},
        refused=opened.refused,
        rejected=opened.rejected,
        absent=absent,
        bytes_down=sum(opened.down.values()),
        bytes_up=sum(opened.up.values()),
        down=opened.down,
        up=opened.up,
        seconds=seconds,
    )
    return Checkpoint(record, before.state, before.average, opened.taps if opened.tap else {}, moments.after)


def _wait_for_sites(
    link: Link, names: Names, resolved: Resolved, number: int, expected: Sequence[str]
) -> dict[str, int]:
    """Wait until enough sites for a release are online: a round asked of fewer would be for nothing."""
    settings = resolved.study.federation
    end = time.monotonic() + settings.deadline_s
    while len(online := link.online(names, resolved)) < settings.min_sites:
        if time.monotonic() >= end:
            missing = sorted(set(expected) - online.keys())
            raise Refusal(
                "too-few-replies",
                f"round {number} was not begun: {len(online)} of at least {settings.min_sites} sites came "
                f"online; missing: {missing or 'unknown'}",
            )
        time.sleep(max(0.0, min(NAMES_S, end - time.monotonic())))
    return online


def _collect(
    link: Link,
    opened: OpenRound,
    names: Names,
    online: dict[str, int],
    withdrawn: Callable[[], Collection[str]],
    *,
    known: bool,
) -> None:
    """Ask sites as they appear and take replies as they come, until the round is over."""
    settings = opened.resolved.study.federation
    looked, pause = time.monotonic(), POLL_S
    while (now := time.monotonic()) < opened.end:
        if now - looked >= NAMES_S:
            looked = now
            opened.withdraw(withdrawn())
            if not known or opened.again or opened.outstanding() - opened.asked.keys():
                online = link.online(names, opened.resolved)
        for site, node in online.items():
            if site not in opened.asked or opened.again.get(site, math.inf) <= now:
                _ask(link, opened, site, node)
        heard = False
        for message_id in list(opened.pending):
            if time.monotonic() >= opened.end:
                break
            heard = _pull(link, opened, message_id) or heard
            opened.begin_grace()
        for site in silence.idle(link, opened):
            for message_id in opened.waiting(site):  # what it has sent before it said so
                heard = _pull(link, opened, message_id) or heard
            opened.begin_grace()
            if site in opened.outstanding() - opened.again.keys():
                _ask(link, opened, site, online[site])
        silence.question(link, opened, online)
        opened.say_who_is_missing()
        waiting = opened.outstanding()
        if not waiting:
            return
        if len(opened.differences) + len(waiting) < settings.min_sites:
            if not opened.pending:
                return
            opened.begin_loss()
        pause = POLL_S if heard else min(1.5 * pause, SLOWEST_POLL_S)
        if not heard:
            time.sleep(max(0.0, min(pause, opened.end - time.monotonic())))


def _pull(link: Link, opened: OpenRound, message_id: str) -> bool:
    """Take the reply to a message, if it is there; False where nothing was heard."""
    # One at a time, and none kept: a reply is as large as the state.
    replies = list(link.call(link.grid.pull_messages, [message_id]) or ())
    heard = False
    while replies:
        heard = _take(opened, replies.pop()) or heard
    return heard


def _ask(link: Link, opened: OpenRound, site: str, node: int) -> None:
    """Send the round to a site, to be answered before the round ends."""
    message = Message(
        opened.content,
        dst_node_id=node,
        message_type=MessageType.TRAIN,
        ttl=max(1e-3, opened.end - time.monotonic()),  # Flower takes 0 for its default of 12 h
        group_id=str(opened.number),
    )
    opened.everyone.add(site)
    opened.asked[site] = opened.asked.get(site, 0) + 1
    opened.since[site] = time.monotonic()
    opened.again.pop(site, None)
    opened.refused.pop(site, None)
    ids = list(link.call(link.grid.push_messages, [message]) or ())
    if not ids or not ids[0]:
        if not link.away:
            say(f"round {opened.number}: {site} could not be asked; Flower's log says why; trying again")
        opened.ask_later(site)
        return
    opened.pending[ids[0]] = site
    size = payload_bytes(opened.content)
    opened.down[site] = opened.down.get(site, 0) + size
    opened.board.site(site, ASKED, down=size)


def _take(opened: OpenRound, reply: Message) -> bool:
    """Keep a reply on disk, or say why not; False where it answers nothing that was asked."""
    site = opened.pending.pop(reply.metadata.reply_to_message_id, None)
    if site is None:
        return False  # late: its round is over
    if reply.has_error():
        code = reply.error.code
        reason = reason_of(code) or REASONS["site-fault"]
        why = f"{reason.code} {reason.name}"
        if code in ASK_AGAIN and opened.waiting(site):
            return True  # it was asked twice, and the other message may still be answered
        if code in ASK_AGAIN:
            say(f"round {opened.number}: {site} could not answer (code {code}); it is asked again")
            opened.ask_later(site)
        else:
            opened.settle(site)
        if code not in ASK_AGAIN or reason_of(code):
            opened.refused[site] = why
        opened.board.site(site, f"refused: {why}" if site in opened.refused else NOT_HERE)
        return True
    opened.settle(site)
    size = opened.up[site] = payload_bytes(reply.content)
    path = spool_path(opened.board.run_dir, opened.number, site)
    try:
        incoming = _open(reply, opened.like, opened.tap, opened.resolved.study.federation.transport)
        if wrong := misfit(incoming.facts, opened.resolved, opened.number):
            raise Refusal("bad-message", f"its {wrong} is not this round's")
        spooled = write_tensors(path, incoming.difference, opened.like)
        if spooled.norm > opened.longest:
            path.unlink()
            raise Refusal("implausible-norm", f"{spooled.norm:.3g}, at most {opened.longest:.3g} is possible")
    except Refusal as refusal:
        words = ascii(refusal.detail)[1:-1][:200]  # it may quote what the site sent
        opened.rejected[site] = f"{refusal.reason.code} {refusal.reason.name}: {words}"
        opened.board.site(site, f"rejected: {opened.rejected[site]}", up=size)
        return True
    opened.differences[site], opened.facts[site], opened.taps[site] = spooled, incoming.facts, incoming.tap
    opened.took[site] = time.monotonic() - opened.since[site]
    opened.board.site(site, REPLIED, up=size, epsilon=incoming.facts.epsilon)
    return True


def _open(reply: Message, state: Tensors, tap: Tensors, transport: Transport = "bf16") -> Incoming:
    """Read a reply's facts and tap; its difference is checked as it is taken."""
    opened = open_reply(reply.content, state, tap, transport)
    if tap and not is_possible(opened.facts):
        raise Refusal("bad-message", "the facts are not those of a private mechanism")
    return opened
