"""The ClientApp: takes a message in, lets `training.answer_round` answer it, sends the stored reply.

From a message the site reads the round number, the state and the deadline; everything else comes
from the study it approved. Whatever goes wrong, only a code and fixed words leave; exception texts
stay in the site's own log. The journal notes each message before it is looked at, and each reply before
it leaves.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from polyclinic.client.final import receive_final
from polyclinic.client.journal import note
from polyclinic.client.ledger import open_ledger
from polyclinic.client.policy import load_policy
from polyclinic.client.readiness import check_ready
from polyclinic.client.releases import answer_release
from polyclinic.client.training import answer_round
from polyclinic.common.refusals import REASONS, BadInput, Reason, Refusal
from polyclinic.common.wire import release_records, reply_records
from polyclinic.common.wire_reading import digest, read_order, read_release_order

app = ClientApp()

SIMULATED_SITES = "POLYCLINIC_SIMULATED_SITES"

# From the site's home, and what says (or raises) whether a round may be begun now, to the reply.
Work = Callable[[Path, Callable[[], bool]], RecordDict]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a round, or refuse with a code."""
    return stored(message, context, read_order, answer_round, reply_records)


@app.query("release")
def release(message: Message, context: Context) -> Message:
    """Answer a question for an extra release, or refuse with a code."""
    return stored(message, context, lambda x: (read_release_order(x),), answer_release, release_records)


@app.query("final")
def final(message: Message, context: Context) -> Message:
    """Keep the final generator for the leakage gate, or refuse with a code."""
    return stored(message, context, read_order, receive_final, release_records)


@app.query("idle")
def idle(message: Message, context: Context) -> Message:
    """Say that no round is in work: a coordinator that has long heard nothing asks, then asks again."""

    def work(home: Path, _: Callable[[], bool]) -> RecordDict:
        with open_ledger(home):  # refuses where a round is in work
            return RecordDict()

    return answer(message, context, work)


def stored(
    message: Message,
    context: Context,
    read: Callable[[RecordDict], tuple[Any, ...]],
    act: Callable[..., bytes],
    pack: Callable[[bytes], RecordDict],
) -> Message:
    """Read what is asked, act on it, and send what was stored for it, and nothing else."""
    return answer(message, context, lambda home, go: pack(act(home, *read(message.content), in_time=go)))


def answer(message: Message, context: Context, work: Work) -> Message:
    """Do the work between two journal lines; turn whatever goes wrong into a code and fixed words."""
    home: Path | None = None
    outcome = "answered again"  # unless the round is begun now

    def ready() -> bool:
        nonlocal outcome
        outcome = "answered"
        assert home is not None
        if unwritten is not None:
            raise unwritten
        if time.time() >= metadata.created_at + metadata.ttl:
            return False
        check_ready(home, load_policy(home), created_at=metadata.created_at, received=size)
        return True

    try:
        metadata = message.metadata
        home = site_home(context)
        sha256, size = digest(message.content)
        unwritten = _note(
            home,
            "in",
            type=metadata.message_type[:64],
            round=metadata.group_id[:64],
            message=metadata.message_id[:64],
            sha256=sha256,
            bytes=size,
            created_at=f"{metadata.created_at:.3f}",
        )
        reply = Message(work(home, ready), reply_to=message)
    except Refusal as refusal:
        _log(home, str(refusal))
        outcome = f"{refusal.reason.code} {refusal.reason.name}"
        reply = _refuse(message, refusal.reason)
    except Exception:  # noqa: BLE001 - the one place where any text must be kept from leaving the site
        _log(home, traceback.format_exc())
        outcome, reply = "fault", _refuse(message, REASONS["site-fault"])
    if home is not None:
        sha256, size = digest(reply.content if reply.has_content() else RecordDict())
        to = {"type": message.metadata.message_type[:64], "reply_to": message.metadata.message_id[:64]}
        # A line that cannot be written does not hold back what the ledger has settled already.
        _note(home, "out", **to, sha256=sha256, bytes=size, outcome=outcome)
    return reply


def site_home(context: Context) -> Path:
    """Find the site's home: from the hospital's own node configuration, or the simulation's list."""
    named = context.node_config.get("home")
    if named is not None:
        return Path(str(named))
    homes = os.environ.get(SIMULATED_SITES, "").split(os.pathsep)
    return Path(homes[int(context.node_config["partition-id"])])


def _refuse(message: Message, reason: Reason) -> Message:
    return Message(Error(reason.code, f"{reason.name}: {reason.cause}"), reply_to=message)


def _note(home: Path, kind: str, **values: object) -> Refusal | None:
    """Write a journal line; where that cannot be, say why no round may be begun."""
    try:
        note(home, kind, **values)
    except Refusal as refusal:
        _log(home, str(refusal))
        return refusal
    except (OSError, BadInput) as error:
        _log(home, str(error))
        return Refusal("journal-unwritable", str(error))
    return None


def _log(home: Path | None, text: str) -> None:
    # A full disk or a missing folder must not become an exception here: Flower would send its text.
    with suppress(OSError):
        if home is not None:
            path = home / "site.log"
            path.touch(mode=0o600)
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text.rstrip() + "\n")
