"""The folder that stands first on the PATH of a site's superexec: our launcher, and a no to all else."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from polyclinic.common.files import write_atomic

LAUNCHER = "flwr-clientapp"
# All that Flower would start a process for (its TASK_TYPE_TO_COMMAND; a test compares).
DENIED = ("flwr-serverapp", "flwr-simulation", "flwr-agentapp", "flwr-model", "flwr-connector")


def write_launcher(folder: Path) -> Path:
    """Write the launcher and a refusing script for every other task that Flower could start.

    Python starts isolated (`-I`): neither the working folder nor any PYTHON variable adds to its path.

    Returns:
        The launcher.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    scripts = dict.fromkeys(DENIED, 'echo "$0: a site runs only its own ClientApp" >&2; exit 3')
    scripts[LAUNCHER] = f'exec {shlex.quote(sys.executable)} -I -m polyclinic.client.launcher "$@"'
    for name, line in scripts.items():
        write_atomic(folder / name, f"#!/bin/sh\n{line}\n".encode())
        (folder / name).chmod(0o755)
    return folder / LAUNCHER
