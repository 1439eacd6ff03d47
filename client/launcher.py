"""What a site's superexec starts as `flwr-clientapp`: our own ClientApp, whatever the coordinator sends.

Flower would unpack the coordinator's bundle and import it, in front of what is installed. Here Flower's
runner keeps its protocol and loses both steps: the bundle is only looked at (`bundle.py`), and the app is
the installed one (PRIVACY.md, rule 18).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp.client_app import LoadClientAppError

from polyclinic.client.base_intake import use_hub
from polyclinic.common.bundle import check_bundle
from polyclinic.common.cli import default_home
from polyclinic.common.refusals import Refusal

RUNNER = "flwr.supernode.runtime.run_clientapp"
HEARTBEAT = "flwr.supercore.heartbeat"
BEAT_S = 10  # of which Flower makes one beat in about 4 s; the SuperNode waits 30 s for one (supernode.py)
# What is replaced in the runner: unpacking, loading, installing, where to, dying with the superexec.
_UNPACKING = ("install_from_fab", "get_load_client_app_fn", "install_app_dependencies", "get_project_dir")
REPLACED = (*_UNPACKING, "start_parent_process_monitor")


def main() -> None:
    """Run Flower's `flwr-clientapp` with our check and our app; the process ends in it."""
    runner = import_module(RUNNER)
    called = runner.run_clientapp.__code__.co_names
    gone = [name for name in REPLACED if not hasattr(runner, name) or name not in called]
    if gone:
        sys.exit(f"flwr-clientapp: this Flower's runner does not call {gone[0]}; install the tested release")
    refused: list[Refusal] = []

    def check(bundle: bytes, **_: object) -> None:
        try:
            check_bundle(bundle)
        except Refusal as refusal:
            refused.append(refusal)

    def loader(**_: object) -> Callable[..., Callable[..., Message]]:
        return lambda *_: _refusing(refused[0]) if refused else _installed()

    def install(*_: object, **__: object) -> None:
        raise Refusal("bundle-forbidden", "nothing is installed at run time")

    def nowhere(*_: object) -> Path:
        return Path()

    for name, ours in zip(REPLACED, (check, loader, install, nowhere, nowhere), strict=True):
        setattr(runner, name, ours)
    use_hub(default_home())
    vars(import_module(HEARTBEAT))["HEARTBEAT_DEFAULT_INTERVAL"] = BEAT_S
    from flwr.supernode.cli import flwr_clientapp

    flwr_clientapp()


def _installed() -> Callable[..., Message]:
    try:
        from polyclinic.client.app import app
    except (ImportError, OSError) as error:  # its text names the site's folders; Flower would send it
        raise LoadClientAppError from error

    def respond(message: Message, context: Context) -> Message:
        if message.metadata.message_type not in ("train", "query.idle", "query.release", "query.final"):
            return _refusing(Refusal("bad-message", "type"))(message, context)
        return app(message, context)

    return respond


def _refusing(refusal: Refusal) -> Callable[..., Message]:
    """Answer a message with the refusal, by way of log and journal."""
    _installed()
    from polyclinic.client.app import answer

    def refuse(*_: object) -> Any:
        raise refusal

    def respond(message: Message, context: Context) -> Message:
        return answer(message, context, refuse)

    return respond


if __name__ == "__main__":
    main()
