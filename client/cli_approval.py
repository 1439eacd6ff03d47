"""`polyclinic-client base, approve, approvals, close, journal`: what people decide, and what was done."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polyclinic.client.journal import note
from polyclinic.client.journal_view import read_journal
from polyclinic.client.journal_view import words as journal_words
from polyclinic.client.ledger_chain import inspect
from polyclinic.common.cli import common_options, show
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import Resolved, explain

# What needs torch is imported by the commands that need it: the others start at once.
if TYPE_CHECKING:
    from polyclinic.client.approval import Approval
    from polyclinic.client.ledger_books import Books

Commands = Any  # argparse gives its subparsers no public type


def add_commands(commands: Commands) -> None:
    """Add the commands to `polyclinic-client`."""
    base = commands.add_parser("base", help="frozen public parts that the kit does not carry")
    command = base.add_subparsers(required=True, metavar="WHAT").add_parser(
        "add", help="bring a part into the home, and compare its hash with the study's"
    )
    command.add_argument(
        "source", metavar="PATH_OR_ID", help="folder carried here, or the Hugging Face id, to be downloaded"
    )
    command.add_argument("--revision", metavar="R", help="of the id; default: the study's")
    command.add_argument("--as", dest="part", metavar="ID", help="which part of the study a folder is")
    command.add_argument("--study", type=Path, metavar="STUDY", help="default: the kit's study.json")
    common_options(command)
    command.set_defaults(act=_base_add)
    command = commands.add_parser("approve", help="see what a study would do, take and cost; agree to it")
    command.add_argument(
        "study", type=Path, nargs="?", metavar="STUDY", help="resolved study (the kit's study.json)"
    )
    command.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with this site's data"
    )
    command.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="take part in the first N only: the budget has no room for more",
    )
    command.add_argument("--yes", action="store_true", help="do not ask")
    common_options(command)
    command.set_defaults(act=_approve)
    command = commands.add_parser("approvals", help="what this site has approved, and what has drifted since")
    common_options(command)
    command.set_defaults(act=_approvals)
    command = commands.add_parser("close", help="end a study here; what it did not use comes back")
    command.add_argument("study", metavar="STUDY", help="its name, or the first characters of its hash")
    command.add_argument("--yes", action="store_true", help="do not ask")
    common_options(command)
    command.set_defaults(act=_close)
    journal = commands.add_parser("journal", help="every message in and out").add_subparsers(
        required=True, metavar="WHAT"
    )
    command = journal.add_parser("verify", help="is the journal whole? names the first line that is not")
    common_options(command)
    command.set_defaults(act=_verify)
    command = journal.add_parser("show", help="one line a message")
    common_options(command)
    command.set_defaults(act=_show)


def read_resolved(path: Path) -> Resolved:
    """Read a resolved study as a kit carries it.

    Raises:
        BadInput: Missing or not one; names the file, the field and the fix.
    """
    path = path / "study.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"{path}: no such file; name the kit's study.json")
    try:
        return Resolved.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise BadInput(f"{path}: not a resolved study of this release: {explain(error)}") from error
    except ValueError as error:
        raise BadInput(
            f"{path}: not a resolved study; name the study.json of a kit, not a study's TOML file"
        ) from error


def _base_add(arguments: argparse.Namespace) -> None:
    from polyclinic.client.base_intake import add_base

    home = arguments.home
    resolved = read_resolved(arguments.study or home / "kit" / "study.json")
    said = add_base(home, resolved, arguments.source, arguments.revision, arguments.part)
    show(arguments, {"study": resolved.run_name, "said": said}, said)


def _approve(arguments: argparse.Namespace) -> None:
    from polyclinic.client.approval import drift, open_approval, prepare_and_approve
    from polyclinic.client.approval_terms import terms, words
    from polyclinic.client.base_intake import use_hub
    from polyclinic.client.binding import site_base
    from polyclinic.client.intake import site_records
    from polyclinic.client.population import compare
    from polyclinic.client.population import words as beside

    home = arguments.home
    use_hub(home)
    resolved = read_resolved(arguments.study or home / "kit" / "study.json")
    study = resolved.study
    records = site_records(home, study.data, arguments.data)
    site = str(inspect(home)[0][0]["site"])
    files = site_base(home, resolved)
    facts = terms(home, site, resolved, records, files, arguments.rounds)
    known = open_approval(home, resolved.hash)
    facts["drifted"] = drift(home, known) if known else []
    others = compare(home, study.data, arguments.data, records)
    facts["other_ledgers"] = [beside(other, study.data.unit) for other in others]
    text = words(facts)
    if others:
        text += "\n\nOther ledgers of this machine's user; who approves confirms that nobody is in two:\n  "
        text += "\n  ".join(facts["other_ledgers"])
    if facts["drifted"]:
        text += "\n\nApproved before; changed since then: " + "; ".join(facts["drifted"])
    if known and not facts["drifted"]:
        show(arguments, facts, f"{text}\n\nApproved already, and nothing has changed since.")
        return
    print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if not arguments.yes:
        ask(f"\nTo approve, type the study's name ({study.name}): ", study.name)
    made = prepare_and_approve(
        home, site, resolved, records, files, data=arguments.data, rounds=arguments.rounds, renew=True
    )
    note(home, "approve", study=resolved.hash, approval=made.id, apart_from=[str(o.home) for o in others])
    facts["approval"] = made.id
    show(arguments, facts, f"\napproved as {made.id}: `polyclinic-client start` answers its rounds")


def ask(question: str, name: str) -> None:
    """Ask a person to type a name; raises `BadInput` where they do not."""
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != name:
        raise BadInput(f"nothing was done: type {name} when asked, or give --yes")


def _approvals(arguments: argparse.Namespace) -> None:
    from polyclinic.client.approval import list_approvals
    from polyclinic.client.base_intake import use_hub
    from polyclinic.client.ledger_books import Books

    home = arguments.home
    use_hub(home)
    books = Books(home, inspect(home)[0])
    rows = [_row(home, books, approval) for approval in list_approvals(home)]
    lines = [
        f"{row['study']:24} {row['hash'][:8]}  {row['state']:8} {row['approval']}"
        + (f"  drifted: {'; '.join(row['drifted'])}" if row["drifted"] else "")
        for row in rows
    ]
    show(arguments, rows, "\n".join(lines) or "nothing is approved here")


def _row(home: Path, books: Books, approval: Approval) -> dict[str, Any]:
    from polyclinic.client.approval import drift

    closed = bool(books.of(approval.id, "close"))
    return {
        "study": approval.resolved.study.name,
        "hash": approval.resolved.hash,
        "approval": approval.id,
        "state": "closed" if closed else "open",
        "data": None if approval.data is None else str(approval.data),
        "drifted": [] if closed else drift(home, approval),
    }


def open_named(home: Path, asked: str) -> Approval:
    """Find the open study that a person means: by its name, its run's, or the first characters of its hash.

    Raises:
        BadInput: None, or several.
    """
    from polyclinic.client.approval import list_approvals
    from polyclinic.client.ledger_books import Books

    books = Books(home, inspect(home)[0])
    found = [
        approval
        for approval in list_approvals(home)
        if (
            asked in (approval.resolved.study.name, approval.resolved.run_name)
            or approval.resolved.hash[: max(4, len(asked))] == asked
        )
        and not books.of(approval.id, "close")
    ]
    if len(found) != 1:
        names = ", ".join(a.resolved.run_name for a in found) or "none"
        raise BadInput(
            f"{asked}: {names} of this site's open studies fit; name one, or its hash, as "
            "`polyclinic-client approvals` has it"
        )
    return found[0]


def _close(arguments: argparse.Namespace) -> None:
    from polyclinic.client.ledger_books import Books, open_books

    home, asked = arguments.home, arguments.study
    approval = open_named(home, asked)
    books = Books(home, inspect(home)[0])
    study = approval.resolved
    before = books.committed()
    if not arguments.yes:
        ask(f"No further round of {study.run_name} will be answered. Type its name: ", study.study.name)
    with open_books(home) as ledger:
        ledger.close(approval.id)
        after = ledger.committed()
    note(home, "close", study=study.hash, approval=approval.id)
    facts = {
        "study": study.hash,
        "approval": approval.id,
        "epsilon_returned": "inf" if before[0] == float("inf") else before[0] - after[0],
        "delta_returned": before[1] - after[1],
    }
    returned = facts["epsilon_returned"]
    epsilon = returned if isinstance(returned, str) else f"{returned:.3f}"
    show(
        arguments,
        facts,
        f"{study.run_name} is closed; epsilon {epsilon} and delta {facts['delta_returned']:.2g} came back",
    )


def _verify(arguments: argparse.Namespace) -> None:
    home = arguments.home
    lines, unfinished = read_journal(home)
    if not lines and (home / "ledger.jsonl").exists():
        rounds = sum(line["kind"] == "reserve" for line in inspect(home)[0])
        if rounds:
            raise Refusal("journal-broken", f"it is empty, but the ledger has {rounds} rounds")
    facts = {"lines": len(lines), "hash": lines[-1]["hash"] if lines else None, "unfinished_line": unfinished}
    torn = "; an unfinished last line is being written now, or is torn" if unfinished else ""
    show(
        arguments,
        facts,
        f"{home / 'journal.jsonl'}: {len(lines)} lines, the chain is whole and ends at journal.head{torn}\n"
        "detected: a line edited, moved, taken out, put in or cut from the end. Not detected: a file that "
        "somebody rewrote together with journal.head.",
    )


def _show(arguments: argparse.Namespace) -> None:
    lines, _ = read_journal(arguments.home)
    show(arguments, lines, journal_words(lines) or "nothing yet")
