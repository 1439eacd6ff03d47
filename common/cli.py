"""What the three commands share: exit codes, `--home`, `--json`, one sentence for a mistake."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from polyclinic.common.refusals import BadInput, Refusal

# Nothing phones home, whatever library is used below.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Their warnings speak to people who load models by hand; errors are still shown.
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}

Command = Callable[[argparse.Namespace], object]


def default_home() -> Path:
    """`$POLYCLINIC_HOME`, or `.polyclinic` in the current folder."""
    return Path(os.environ.get("POLYCLINIC_HOME", ".polyclinic"))


def common_options(parser: argparse.ArgumentParser) -> None:
    """Add `--home` and `--json`."""
    parser.add_argument(
        "--home", type=Path, default=default_home(), help="where everything is kept (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print facts as JSON")


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, run the chosen command (`act` in its defaults), and turn a mistake into one sentence.

    Returns:
        0; 2 for bad input; 3 for a refusal; 130 when interrupted.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    for name in ("", "torch.utils._pytree"):  # kernels that torchao and bitsandbytes would have elsewhere
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(opacus|diffusers|transformers|torch|prv_accountant).*"
    )
    arguments = parser.parse_args(argv)
    try:
        arguments.act(arguments)
    except (BadInput, Refusal) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(
                f"{parser.prog}: the disk is full ({error.filename}); free space and run again",
                file=sys.stderr,
            )
            return BadInput.exit_code
        raise
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; go on with --resume", file=sys.stderr)
        return 130
    return 0


def show(arguments: argparse.Namespace, facts: object, words: str) -> None:
    """Print facts as JSON where `--json` was given, as words otherwise."""
    print(json.dumps(facts, indent=1, sort_keys=True, default=str) if arguments.json else words)
