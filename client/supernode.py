"""Flower's SuperNode, changed in two places.

Beside each reply it would tell the SuperLink how many seconds the ClientApp took. How long a step takes
follows from how many patients were in it, so that is a measured cost and stays here (PRIVACY.md, rule 12).

A reply travels in pieces. Where a connection breaks after a piece was stored and before that was said, the
piece is sent again, and refused because it is there; Flower would then give the whole reply up. Here the
other pieces are still sent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supernode import start_client_internal as node
from flwr.supernode.cli import flower_supernode
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from polyclinic.common.progress import say

MEASURES = "get_message_processing_duration"
PUSHES = "push_object_contents_from_iterable"


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


def main() -> None:
    """Run Flower's `flower-supernode` with its own arguments."""
    for name, place, user in (
        (MEASURES, InMemoryNodeState, node._push_messages),
        (PUSHES, node, node._push_messages),
    ):
        if name not in vars(place) or name not in user.__code__.co_names:
            sys.exit(f"flower-supernode: this Flower has no {name} to replace; install the tested release")
    setattr(InMemoryNodeState, MEASURES, no_duration)
    setattr(node, PUSHES, push_every_piece)
    flower_supernode()


if __name__ == "__main__":
    main()
