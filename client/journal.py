"""The site's journal: one chained line for every message in and out, and for what people did.

`journal.jsonl` is a chained file like the ledger, and `journal.head` anchors its last line. Nothing private
is in it, no loss, count, prompt or exception text. Kinds, with their own fields:

* `in`: `type`, `round` (as the coordinator labels it), `message` (its id), `sha256` and `bytes` of what was
  received, `created_at` (Unix seconds by the coordinator's clock).
* `out`: `type`, `reply_to`, `sha256` and `bytes` of what was sent, `outcome`: `answered`, `answered again`
  (from the store; a question is one, too), a refusal's code and name, or `fault`.
* `start`, `stop`: the node's processes. `approve`, `close`, `gate`: `study`, `approval`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyclinic.common.chain import Line, append_anchored, lock, read_anchored, set_aside

NAME = "journal"


def note(home: Path, kind: str, **values: Any) -> Line:
    """Write a line, fsync'd before this returns; waits for another process that writes one.

    Raises:
        Refusal: `journal-broken`: it was changed, and somebody has to look first.
        BadInput: The disk is full.
    """
    with lock(home, NAME, wait=True):
        lines, torn = read_anchored(home, NAME)
        if torn:
            set_aside(home, NAME, torn)
        return append_anchored(home, NAME, lines, kind, values)
