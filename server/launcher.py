"""What the coordinator's superexec starts as `flwr-serverapp`: our own ServerApp, whoever launched the run.

The SuperLink's Control API asks nobody on the loopback interface who they are. So here, too, a bundle is
looked at and never unpacked, and the app is the installed one: whoever gets as far as that API can start
our ServerApp on a run folder that exists, and no code of their own.

A reply is there for Flower as soon as its upload begins, and taking it waits until the upload is whole:
minutes where a site's link stands still, up to two hours where it trickles, and nobody else's reply is taken
meanwhile. Here that waiting ends after a minute; the site is then asked again, answers from its store, and
sends only the pieces that are not there yet.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from polyclinic.common.bundle import check_bundle

RUNNER = "flwr.superlink.runtime.run_serverapp"
SERVER_APP = "polyclinic.server.app:app"
# What is replaced in the runner: unpacking, where to, the unpacked configuration, installing, and dying
# with the superexec: a run is not lost with what started it.
REPLACED = (
    *("install_from_fab", "get_project_dir", "get_project_config", "get_fused_config_from_dir"),
    *("install_app_dependencies", "start_parent_process_monitor"),
)

GRID = "flwr.superlink.grid.http_grid"
PULLS = "pull_objects"
PULL_S = 60.0  # for which an upload that has begun is waited for


def main() -> None:
    """Run Flower's `flwr-serverapp` with our check, our app, and less patience with a stalled upload."""
    runner, grid = import_module(RUNNER), import_module(GRID)
    called = runner.run_serverapp.__code__.co_names
    gone = [name for name in REPLACED if not hasattr(runner, name) or name not in called]
    gone += [PULLS] if not hasattr(grid, PULLS) else []
    if gone:
        sys.exit(f"flwr-serverapp: this Flower's runner does not call {gone[0]}; install the tested release")

    def check(bundle: bytes, **_: object) -> None:
        check_bundle(bundle)

    def nowhere(*_: object) -> Path:
        return Path("/nonexistent")

    def config(*_: object) -> dict[str, Any]:
        return {"tool": {"flwr": {"app": {"components": {"serverapp": SERVER_APP}}}}}

    def fused(_: Path, override: dict[str, Any]) -> dict[str, Any]:
        return {"run": override.get("run", "")}

    def install(*_: object, **__: object) -> None:
        raise RuntimeError("nothing is installed at run time")

    for name, ours in zip(REPLACED, (check, nowhere, config, fused, install, nowhere), strict=True):
        setattr(runner, name, ours)
    setattr(grid, PULLS, partial(grid.pull_objects, max_time=PULL_S))
    from flwr.superlink.cli import flwr_serverapp

    flwr_serverapp()


if __name__ == "__main__":
    main()
