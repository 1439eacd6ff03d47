"""The ServerApp: opens a run and lets the round loop drive it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from polyclinic.common.study import Resolved
from polyclinic.server.checkpoints import Checkpoint
from polyclinic.server.rounds import Names, registered_names, run_rounds


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
        run_rounds(grid, load_resolved(run_dir), run_dir, names=names, after_round=after_round)

    return app


def load_resolved(run_dir: Path) -> Resolved:
    """Read a run's resolved study."""
    return Resolved.model_validate(json.loads((run_dir / "study.json").read_text(encoding="utf-8")))


def run_dir_of(context: Context) -> Path:
    """Find the run a deployed ServerApp works on: the coordinator's own run config names it."""
    return Path(str(context.run_config["run-dir"]))


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a study in a real deployment."""
    run_dir = run_dir_of(context)
    run_rounds(grid, load_resolved(run_dir), run_dir)
