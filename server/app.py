"""The ServerApp: opens a run and lets the round loop drive it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import TextIO

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from polyclinic.common.stored import read_stored
from polyclinic.common.study import Resolved
from polyclinic.server.checkpoints import Checkpoint
from polyclinic.server.collect import collect
from polyclinic.server.link import Names, registered_names
from polyclinic.server.node import PROBE
from polyclinic.server.provisioning import enrolled
from polyclinic.server.rounds import run_rounds


def make_app(
    run_dir: Path,
    *,
    names: Names = registered_names,
    after_round: Callable[[Checkpoint], None] = lambda _: None,
) -> ServerApp:
    """Build the ServerApp of a run.

    Args:
        run_dir: Holds `study.json` and the checkpoint of round 0.
        names: How sites are named.
        after_round: Called with each new checkpoint.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        resolved = load_resolved(run_dir)
        run_rounds(grid, resolved, run_dir, names=names, after_round=after_round, finish=collect)

    return app


def load_resolved(run_dir: Path) -> Resolved:
    """Read a run's resolved study.

    Raises:
        BadInput: Another release wrote it.
    """
    return read_stored(run_dir / "study.json", Resolved, "use that release, or run the study anew")


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a study in a real deployment: the run configuration names a folder under `runs`.

    The name alone travels, with the bundle, to every site.
    """
    run = str(context.run_config["run"])
    if run == PROBE:
        return
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,39}-[0-9a-f]{8}", run):
        raise ValueError("the run configuration names no run folder")
    home = Path(os.environ["POLYCLINIC_HOME"])
    run_dir = home / "runs" / run
    expected = json.loads((run_dir / "sites.json").read_text(encoding="utf-8"))

    def withdrawn() -> set[str]:
        return set(expected) - enrolled(home).keys()

    with (run_dir / "server.log").open("a", encoding="utf-8") as log, redirect_stderr(_Tee(sys.stderr, log)):
        run_rounds(
            grid, load_resolved(run_dir), run_dir, expected=expected, withdrawn=withdrawn, finish=collect
        )


class _Tee:
    """Write to two streams: the process's log and the run's own."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()
