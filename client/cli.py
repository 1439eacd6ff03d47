"""`polyclinic-client`: what the engineer of a hospital runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from polyclinic.client import cli_approval, cli_data, cli_enrolment, cli_leakage, cli_node, cli_reader
from polyclinic.common.cli import common_options, run_command, show
from polyclinic.common.files import write_atomic


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="polyclinic-client", description="a hospital's side of Polyclinic")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cli_enrolment.add_commands(commands)
    cli_data.add_commands(commands)
    cli_approval.add_commands(commands)
    cli_node.add_commands(commands)
    cli_leakage.add_commands(commands)
    cli_reader.add_commands(commands)
    _add_ledger(commands.add_parser("ledger", help="what this site has spent"))
    return run_command(parser, argv)


def _add_ledger(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    command = commands.add_parser("show", help="epsilon spent, by study and round, and what is left")
    _delta_option(command)
    command.add_argument("--svg", type=Path, metavar="PATH", help="draw it, too")
    common_options(command)
    command.set_defaults(act=_show)
    command = commands.add_parser("verify", help="is the ledger whole? names the first line that is not")
    command.add_argument(
        "--anchor",
        action="append",
        default=[],
        metavar="SEQUENCE:HASH",
        help="a line's hash from the coordinator's record of a round (ledger_sequence, ledger_hash)",
    )
    command.add_argument(
        "--rewrite-head",
        action="store_true",
        help="ledger.head is lost and you know why: accept the chain as it stands; leaves a line",
    )
    common_options(command)
    command.set_defaults(act=_verify)
    command = commands.add_parser("export", help="lines and summary as one JSON file for an auditor")
    command.add_argument("path", type=Path, metavar="PATH")
    _delta_option(command)
    common_options(command)
    command.set_defaults(act=_export)


def _delta_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delta", type=float, help="compute epsilon at this delta (each study's own)")


# The accountant needs torch, which takes seconds to import: only these commands wait for it.


def _show(arguments: argparse.Namespace) -> None:
    from polyclinic.client.ledger_view import spending, svg, words

    facts = spending(arguments.home, arguments.delta)
    if arguments.svg:
        write_atomic(arguments.svg, svg(facts).encode(), mode=0o600)
    show(arguments, facts, words(facts))


def _verify(arguments: argparse.Namespace) -> None:
    from polyclinic.client.ledger_view import DETECTED, rewrite_head, verify

    if arguments.rewrite_head:
        rewrite_head(arguments.home, arguments.anchor)
    facts = verify(arguments.home, arguments.anchor)
    unfinished = (
        "; an unfinished last line is being written now, or is torn and set aside at the next start"
        if facts["unfinished_line"]
        else ""
    )
    show(
        arguments,
        facts,
        f"{arguments.home / 'ledger.jsonl'}: {facts['lines']} lines, the chain is whole; checked with "
        f"ledger.head, {facts['replies']} stored replies and {facts['anchors']} anchors{unfinished}\n"
        f"{DETECTED}",
    )


def _export(arguments: argparse.Namespace) -> None:
    from polyclinic.client.ledger_view import export

    facts = export(arguments.home, arguments.path, arguments.delta)
    show(arguments, facts, f"{facts['path']}: {facts['lines']} lines, written for an auditor")


if __name__ == "__main__":
    raise SystemExit(main())
