"""Flower's SuperNode, changed in four places.

Beside each reply it would tell the SuperLink how many seconds the ClientApp took. How long a step takes
follows from how many patients were in it, so that is a measured cost and stays here (PRIVACY.md, rule 12).

A reply travels in pieces. Where a connection breaks after a piece was stored and before that was said, the
piece is sent again, and refused because it is there; Flower would then give the whole reply up. Here the
other pieces are still sent.

A ClientApp that was killed is missed after 30 s without a heartbeat, not after 60.

A node signs the time. Where the coordinator refuses that, Flower ends without a word; here the log says what
is wrong with the clock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supernode import start_client_internal as node
from flwr.supernode.cli import flower_supernode
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from polyclinic.common.progress import say

SIGNS = "intercept"
PATIENCE = "HEARTBEAT_PATIENCE"  # in intervals of 30 s; our launcher has the ClientApp beat every 4 s
MEASURES = "get_message_processing_duration"
PUSHES = "push_object_contents_from_iterable"
REPLACED = (
    (MEASURES, InMemoryNodeState),
    (PUSHES, node),
    (SIGNS, NodeAuthHttpInterceptor),
    (PATIENCE, in_memory_corestate),
)
CLOCK_S = 3.0  # Flower's SuperLink bears 5 s ahead of its own clock, and 5 minutes behind


def no_duration(*_: object, **__: object) -> float:
    """Say nothing of how long a message took."""
    return 0.0


def push_every_piece(
    pieces: Iterable[tuple[str, bytes]], push_object_fn: Callable[[str, bytes], None]
) -> None:
    """Send the pieces of a reply; one that is refused keeps none of the others from being sent."""

    def push(piece: str, content: bytes) -> None:
        try:
            push_object_fn(piece, content)
        except ObjectPushError as error:
            say(f"{error} It is there already, or the coordinator will ask again.")

    inflatable_utils.push_object_contents_from_iterable(pieces, push)


def telling_why(sign: Callable[..., Any]) -> Callable[..., Any]:
    """Have a request signed and sent, and say why where the coordinator refuses the signature."""

    def intercept(*arguments: Any) -> Any:
        response = sign(*arguments)
        if response.status_code == 401:
            say(_why_refused(response.headers.get("date", ""), datetime.now(UTC)))
        return response

    return intercept


def _why_refused(theirs: str, ours: datetime) -> str:
    try:
        off = (ours - parsedate_to_datetime(theirs)).total_seconds()
    except (TypeError, ValueError):
        off = 0.0
    if abs(off) > CLOCK_S:
        where = "ahead of" if off > 0 else "behind"
        why = f"the clock here is {abs(off):.0f} s {where} the coordinator's; set it, and keep it set by NTP"
    else:
        why = "it does not know the node's key any more; ask the coordinator"
    return f"the coordinator refuses this node's signature: {why}. Meanwhile it answers no round."


def main() -> None:
    """Run Flower's `flower-supernode` with its own arguments."""
    called = node._push_messages.__code__.co_names
    for name, place in REPLACED:
        if name not in vars(place) or (place in (node, InMemoryNodeState) and name not in called):
            sys.exit(f"flower-supernode: this Flower has no {name} to replace; install the tested release")
    setattr(InMemoryNodeState, MEASURES, no_duration)
    setattr(node, PUSHES, push_every_piece)
    setattr(in_memory_corestate, PATIENCE, 1)
    setattr(NodeAuthHttpInterceptor, SIGNS, telling_why(getattr(NodeAuthHttpInterceptor, SIGNS)))
    flower_supernode()


if __name__ == "__main__":
    main()
