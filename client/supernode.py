"""Flower's SuperNode, without the one number about private data that it would send.

Beside each reply it tells the SuperLink how many seconds the ClientApp took. How long a step takes follows
from how many patients were in it, so that is a measured cost and stays here (PRIVACY.md, rule 12).
"""

from __future__ import annotations

import sys

from flwr.supernode.cli import flower_supernode
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

MEASURES = "get_message_processing_duration"


def no_duration(*_: object, **__: object) -> float:
    """Say nothing of how long a message took."""
    return 0.0


def main() -> None:
    """Run Flower's `flower-supernode` with its own arguments."""
    if MEASURES not in vars(InMemoryNodeState):
        sys.exit(f"flower-supernode: this Flower has no {MEASURES} to replace; install the tested release")
    setattr(InMemoryNodeState, MEASURES, no_duration)
    flower_supernode()


if __name__ == "__main__":
    main()
