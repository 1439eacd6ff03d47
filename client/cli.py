"""`polyclinic-client`: what the engineer of a hospital runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyclinic.client.ledger import Ledger, open_ledger
from polyclinic.common.cli import common_options, run_command, show


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="polyclinic-client", description="a hospital's side of Polyclinic")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("ledger", help="what this site has spent")
    command.add_argument("what", choices=["show", "verify"])
    common_options(command)
    command.set_defaults(act=_ledger)
    return run_command(parser, argv)


def _ledger(arguments: argparse.Namespace) -> None:
    home: Path = arguments.home
    with open_ledger(home) as ledger:
        studies = _studies(ledger)
        facts = {"lines": len(ledger.lines), "head": ledger.lines[-1]["hash"], "studies": studies}
    if arguments.what == "verify":
        show(arguments, facts, f"{home / 'ledger.jsonl'}: {facts['lines']} lines, the chain is whole")
        return
    rows = [f"{'study':10} {'rounds':>6} {'steps':>7} {'epsilon':>9} {'set aside':>10} {'delta':>8}"]
    for row in studies:
        rows.append(
            f"{row['study'][:8]:10} {row['rounds']:>6} {row['steps']:>7} {row['epsilon']:>9.3f} "
            f"{row['set_aside']:>10.3f} {row['delta']:>8.0e}"
        )
    show(arguments, facts, "\n".join(rows))


def _studies(ledger: Ledger) -> list[dict[str, Any]]:
    return [
        {
            "study": line["study"],
            "approval": line["approval"],
            "rounds": len(ledger.of(line["approval"], "reserve")),
            "steps": sum(steps for _, _, steps in ledger.history(line["approval"])),
            "epsilon": ledger.epsilon(line["approval"]),
            "set_aside": float(line["epsilon"]),
            "delta": line["delta"],
        }
        for line in ledger.lines
        if line["kind"] == "earmark"
    ]


if __name__ == "__main__":
    raise SystemExit(main())
