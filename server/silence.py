"""A site that has been silent for long: is it still at work, or was something lost on the way?

Where a connection breaks at the wrong moment, Flower's SuperNode gives up a reply for good, and its
SuperLink a message that it believes delivered; nobody is told. The site has its reply in store, so asking
again costs no budget; but it would make a slow site send its reply twice.

So it is first asked whether it is at work, in a message without content that expires soon. A SuperNode
takes one message at a time, and sends the reply before it takes the next: a site at work never sees the
question, and one that answers it has sent all that it had to send. What is not here by then was lost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

from polyclinic.common.progress import say
from polyclinic.common.refusals import REASONS
from polyclinic.server.link import Link
from polyclinic.server.open_round import OpenRound

QUESTION = "query.idle"
SILENT_S = 60.0  # nobody is asked earlier: to answer, a site starts a process
TIMES_USUAL = 2.0
QUESTION_S = 60.0  # for which a question may lie and be answered

# The question was never seen, or the site says that it is at work.
NOT_IDLE = {
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    REASONS["another-process"].code,
}


def patience(opened: OpenRound, site: str) -> float:
    """Seconds for which a site may be silent before it is asked whether it is at work.

    Twice what the slowest of the others took in this round, or else what is usual; doubled with each
    question. Both are known to everybody (PRIVACY.md: reply timing is not covered).
    """
    usual = max(opened.took.values(), default=opened.usual)
    return max(SILENT_S, TIMES_USUAL * usual) * 2.0 ** opened.questioned.get(site, 0)


def question(link: Link, opened: OpenRound, online: Mapping[str, int]) -> None:
    """Ask the sites that have been silent for long whether they are at work."""
    waiting = set(opened.pending.values()) - opened.again.keys() - set(opened.questions.values())
    for site in sorted(waiting & online.keys()):
        now = time.monotonic()
        if now - opened.since[site] < patience(opened, site) or now >= opened.end:
            continue
        message = Message(
            RecordDict(),
            dst_node_id=online[site],
            message_type=QUESTION,
            ttl=min(QUESTION_S, opened.end - now),
            group_id=str(opened.number),
        )
        ids = list(link.call(link.grid.push_messages, [message]) or ())
        if ids and ids[0]:
            opened.questioned[site] = opened.questioned.get(site, 0) + 1
            opened.questions[ids[0]] = site


def idle(link: Link, opened: OpenRound) -> list[str]:
    """Take the answers to questions; returns the sites that owe nothing and have sent nothing."""
    found = []
    for message, site in list(opened.questions.items()):
        for reply in link.call(link.grid.pull_messages, [message]) or ():
            del opened.questions[message]
            if not (reply.has_error() and reply.error.code in NOT_IDLE):
                say(
                    f"round {opened.number}: {site} has nothing more to send, but no reply has come: it "
                    "was lost on the way"
                )
                found.append(site)
    return found
