"""A site gone odd: our launcher, with what it sends spoilt in the rounds that a file names.

Started in place of `polyclinic.client.launcher` by a script of the test. Everything up to the stored
reply is the installed code, and the ledger is honest: what is spoilt is what leaves.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from safetensors.torch import load, save

import polyclinic.client.app as site
from polyclinic.client import launcher, training
from polyclinic.common.generators.base import Tensors
from polyclinic.common.settings import Transport
from polyclinic.common.wire_reading import RoundOrder, digest, order_records, read_order

ROOM = 300_000  # bytes that a full disk still has: enough for the journal, not for a reply


def with_nan(difference: Tensors) -> None:
    difference[min(difference)].reshape(-1)[0] = float("nan")


def shorter(difference: Tensors) -> None:
    name = min(difference)
    difference[name] = difference[name].reshape(-1)[:-1].clone()


def longer(difference: Tensors) -> None:
    for tensor in difference.values():
        tensor.mul_(1000)


SPOIL = {"nan": with_nan, "shape": shorter, "norm": longer}


def spoilt(stored: bytes, spoil: Callable[[Tensors], None]) -> bytes:
    """Change the difference in a stored reply and leave tap and facts as they are."""
    tensors = load(stored)
    difference = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    spoil(difference)
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    return save(tensors | difference, metadata=header["__metadata__"])


def replayed(app: Callable[..., Message], message: Message, context: Context, home: Path) -> Message:
    """Give the site its message with other times, as it is, once more, and with another state."""

    def at(shift: float) -> Message:
        other = copy.copy(message)
        other.__dict__["_metadata"] = copy.deepcopy(message.metadata)
        other.metadata.__dict__["_created_at"] += shift
        return other

    def said(reply: Message) -> str:
        return str(reply.error.code) if reply.has_error() else digest(reply.content)[0]

    heard = {"future": said(app(at(600), context)), "past": said(app(at(-86400), context))}
    answer = app(message, context)
    heard |= {
        "first": said(answer),
        "again": said(app(message, context)),
        "old": said(app(at(-86400), context)),
    }
    order, state = read_order(message.content)
    moved = {name: tensor + 1 for name, tensor in state("bf16").items()}
    other = at(0)
    other.__dict__["_content"] = order_records(order, moved, "bf16")
    heard["other"] = said(app(other, context))
    (home.parent / "replayed.json").write_text(json.dumps(heard))
    return answer


def on_a_full_disk(app: Callable[..., Message], message: Message, context: Context, home: Path) -> Message:
    filler = home / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(home).free - ROOM)
    try:
        return app(message, context)
    finally:
        filler.unlink()


def main() -> None:
    moods: dict[str, str] = json.loads(Path(sys.argv[2]).read_text())
    del sys.argv[1:3]
    home = Path(os.environ["POLYCLINIC_HOME"])
    installed = launcher._installed

    def answer_round(
        home: Path, order: RoundOrder, decode: Callable[[Transport], Tensors], *, in_time: Callable[[], bool]
    ) -> bytes:
        mood = moods.get(str(order.round), "")
        if mood == "linger":
            (home.parent / "lingers").touch()
            time.sleep(5)  # the test kills its superexec now
        if mood == "slow":
            (home.parent / "slow").touch()
            while not (home.parent / "go-on").exists():  # the test lets it go on when the round is over
                time.sleep(0.2)
        stored = training.answer_round(home, order, decode, in_time=in_time)
        return spoilt(stored, SPOIL[mood]) if mood in SPOIL else stored

    def loaded() -> Callable[..., Message]:
        app = installed()

        def respond(message: Message, context: Context) -> Message:
            mood = moods.get(message.metadata.group_id)
            if mood == "replay":
                return replayed(app, message, context, home)
            if mood == "full":
                return on_a_full_disk(app, message, context, home)
            return app(message, context)

        return respond

    vars(site)["answer_round"] = answer_round
    launcher._installed = loaded
    launcher.main()


if __name__ == "__main__":
    main()
