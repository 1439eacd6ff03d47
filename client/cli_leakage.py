"""`polyclinic-client leakage RUN`: look at the final generator, then say `released` or `not released`."""

from __future__ import annotations

import argparse
from typing import Any

from polyclinic.client.cli_approval import ask, open_named
from polyclinic.client.journal import note
from polyclinic.client.ledger import open_ledger
from polyclinic.common.cli import common_options, show
from polyclinic.common.refusals import Refusal

Commands = Any  # argparse gives its subparsers no public type


def add_commands(commands: Commands) -> None:
    """Add the command to `polyclinic-client`."""
    command = commands.add_parser(
        "leakage", help="draw from the final generator, compare with your own images; release or veto"
    )
    command.add_argument("run", metavar="RUN", help="the study's name, or the first characters of its hash")
    word = command.add_mutually_exclusive_group()
    word.add_argument("--release", action="store_true", help="say `released`, once")
    word.add_argument("--veto", action="store_true", help="say `not released`, once; never why")
    command.add_argument("--yes", action="store_true", help="do not ask")
    common_options(command)
    command.set_defaults(act=_leakage)


def _leakage(arguments: argparse.Namespace) -> None:
    from polyclinic.client.approval import require_approval
    from polyclinic.client.leakage import folder_of, inspect_final, write_findings
    from polyclinic.client.leakage_page import membership_words, page, verdict_words

    home = arguments.home
    approval, _ = require_approval(home, open_named(home, arguments.run).resolved.hash)
    if arguments.release or arguments.veto:
        _decide(arguments)
        return
    findings, images = inspect_final(home, approval)
    folder = folder_of(home, approval)
    write_findings(folder, findings, page(findings, images, approval.resolved.study.data))
    facts = {
        "run": findings.run,
        "model": findings.model,
        "near_copies": findings.found,
        "patients": len(findings.trained),
        "almost_exact": findings.exact,
        "expected": findings.expected,
        "chance": findings.chance,
        "membership": findings.membership and findings.membership.model_dump(),
        "advice": findings.advice,
        "reasons": findings.reasons,
        "report": str(folder / "report.html"),
    }
    show(
        arguments,
        facts,
        f"{findings.run}, final generator {findings.model[:12]}: near copies of {findings.found} of "
        f"{len(findings.trained)} patients among {findings.images} drawn images (by chance at most "
        f"{findings.expected:.1f})\nmembership test: {membership_words(findings)}\n"
        f"{verdict_words(findings)}\n"
        f"{folder / 'report.html'} shows the nearest pairs; it holds patients' images and stays here.\n"
        f"Then: polyclinic-client leakage {findings.run} --release, or --veto",
    )


def _decide(arguments: argparse.Namespace) -> None:
    from polyclinic.client.leakage import read_findings
    from polyclinic.client.leakage_page import verdict_words
    from polyclinic.client.releases import COPIES, NOT_RELEASED, RELEASED, decide, decision

    home = arguments.home
    approval = open_named(home, arguments.run)
    with open_ledger(home) as ledger:
        if decision(ledger, approval) is not None:
            raise Refusal("gate-decided", approval.resolved.run_name)
    findings = read_findings(home, approval)
    verdict = RELEASED if arguments.release else NOT_RELEASED
    counted = arguments.release and COPIES in approval.releases
    if not arguments.yes:
        also = ", with the noisy number of patients with a near copy" if counted else ""
        ask(
            f"{verdict_words(findings)}\nThe coordinator will read `{verdict}`{also}, and nothing else. "
            f"Type the study's name ({approval.resolved.study.name}): ",
            approval.resolved.study.name,
        )
    decide(home, approval, verdict, {pair.patient: pair.near for pair in findings.trained}, findings.model)
    note(home, "gate", study=approval.resolved.hash, approval=approval.id)
    facts = {"run": findings.run, "verdict": verdict, "count": counted, "model": findings.model}
    show(arguments, facts, f"{findings.run}: `{verdict}` is what the coordinator will be told")
