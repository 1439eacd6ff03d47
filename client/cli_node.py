"""`polyclinic-client` start, health, status: the site's processes."""

from __future__ import annotations

import argparse
from typing import Any

from polyclinic.client.enrolment import expiry_warning
from polyclinic.common.cli import common_options, show
from polyclinic.common.progress import say
from polyclinic.common.refusals import Refusal


def add_commands(commands: Any) -> None:
    """Add the commands to the parser's group."""
    for name, act, text in (
        ("start", _start, "run sidecar, SuperNode and superexec until SIGTERM"),
        ("health", _health, "do the site's processes run? exit code 0 if so, 3 if not"),
        ("status", _status, "processes, approvals and what has drifted, budget, last messages"),
    ):
        command = commands.add_parser(name, help=text)
        common_options(command)
        command.set_defaults(act=act)


def _start(arguments: argparse.Namespace) -> None:
    from polyclinic.client.node import start

    if warning := expiry_warning(arguments.home):
        say(warning)
    start(arguments.home)


def _health(arguments: argparse.Namespace) -> None:
    from polyclinic.client.node import health

    if faults := health(arguments.home):
        raise Refusal("not-healthy", "; ".join(faults))
    show(arguments, {"healthy": True}, "healthy: sidecar, SuperNode and superexec run")


def _status(arguments: argparse.Namespace) -> None:
    from polyclinic.client.approval import drift, list_approvals
    from polyclinic.client.base_intake import use_hub
    from polyclinic.client.journal_view import read_journal
    from polyclinic.client.ledger_view import spending, words
    from polyclinic.client.node import health

    home = arguments.home
    use_hub(home)
    faults = health(home)
    drifted = {approval.resolved.run_name: drift(home, approval) for approval in list_approvals(home)}
    last = [line for line in read_journal(home)[0] if line["kind"] in ("in", "out")][-6:]
    budget = spending(home)
    lines = ["; ".join(faults) or "sidecar, SuperNode and superexec run"]
    if warning := expiry_warning(home):
        lines.append(warning)
    lines += [
        f"{run}: drifted since its approval: {', '.join(what)}" for run, what in drifted.items() if what
    ]
    lines += [
        f"{line['time']}  {line['kind']:4} {line.get('outcome', 'round ' + str(line.get('round')))}  "
        f"{line['bytes']} B"
        for line in last
    ]
    facts = {"faults": faults, "warning": warning, "drifted": drifted, "budget": budget, "messages": last}
    show(arguments, facts, "\n".join([*lines, "", words(budget)]))
