"""The ClientApp: takes a message in, lets `training.answer_round` answer it, sends the stored reply.

From a message the site reads the round number, the state and the deadline; everything else comes
from the study it approved. Whatever goes wrong, only a code and fixed words leave; exception texts
stay in the site's own log.
"""

from __future__ import annotations

import os
import time
import traceback
from contextlib import suppress
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from polyclinic.client.training import answer_round
from polyclinic.common.refusals import REASONS, Reason, Refusal
from polyclinic.common.wire import read_order, reply_records

app = ClientApp()

SIMULATED_SITES = "POLYCLINIC_SIMULATED_SITES"


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a round, or refuse with a code."""
    home: Path | None = None
    try:
        home = site_home(context)
        order, state = read_order(message.content)
        ends = message.metadata.created_at + message.metadata.ttl
        stored = answer_round(home, order, state, in_time=lambda: time.time() < ends)
        return Message(reply_records(stored), reply_to=message)
    except Refusal as refusal:
        _log(home, str(refusal))
        return _refuse(message, refusal.reason)
    except Exception:  # noqa: BLE001 - the one place where any text must be kept from leaving the site
        _log(home, traceback.format_exc())
        return _refuse(message, REASONS["site-fault"])


@app.query("name")
def name(message: Message, context: Context) -> Message:
    """Say the site's public name; only simulations ask, where nodes are not registered by name."""
    if SIMULATED_SITES not in os.environ or "home" in context.node_config:
        return _refuse(message, REASONS["bad-message"])  # a hospital's folder names are its own
    return Message(RecordDict({"name": ConfigRecord({"site": site_home(context).name})}), reply_to=message)


def site_home(context: Context) -> Path:
    """Find the site's home: from the hospital's own node configuration, or the simulation's list."""
    named = context.node_config.get("home")
    if named is not None:
        return Path(str(named))
    homes = os.environ.get(SIMULATED_SITES, "").split(os.pathsep)
    return Path(homes[int(context.node_config["partition-id"])])


def _refuse(message: Message, reason: Reason) -> Message:
    return Message(Error(reason.code, f"{reason.name}: {reason.cause}"), reply_to=message)


def _log(home: Path | None, text: str) -> None:
    # A full disk or a missing folder must not become an exception here: Flower would send its text.
    with suppress(OSError):
        if home is not None:
            path = home / "site.log"
            path.touch(mode=0o600)
            with path.open("a", encoding="utf-8") as file:
                file.write(text.rstrip() + "\n")
