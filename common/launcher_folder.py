"""The folder that stands first on the PATH of a superexec: our launcher, and a no to all else."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from polyclinic.common.files import write_atomic

# All that Flower would start a process for (its TASK_TYPE_TO_COMMAND; a test compares).
PROGRAMS = (
    *("flwr-clientapp", "flwr-serverapp", "flwr-simulation", "flwr-agentapp", "flwr-model"),
    "flwr-connector",
)


def write_launcher(folder: Path, program: str, module: str) -> Path:
    """Write our launcher for one program, and a refusing script for every other that Flower could start.

    Python starts isolated (`-I`): neither the working folder nor any PYTHON variable adds to its path.

    Args:
        folder: To be first on the superexec's PATH.
        program: Flower's name for what may run.
        module: Ours that runs it.

    Returns:
        The launcher.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    scripts = dict.fromkeys(PROGRAMS, f'echo "$0: only our own {program} runs here" >&2; exit 3')
    scripts[program] = f'exec {shlex.quote(sys.executable)} -I -m {module} "$@"'
    for name, line in scripts.items():
        write_atomic(folder / name, f"#!/bin/sh\n{line}\n".encode())
        (folder / name).chmod(0o755)
    return folder / program
