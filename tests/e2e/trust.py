"""What the attempts on trust are made with: approved studies, and the tools of a bad coordinator."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.common.cli import QUIET
from polyclinic.common.processes import free_port
from polyclinic.common.study import Resolved
from polyclinic.server.node import APP, attempt, flwr
from tests.e2e.federation import SITES, Federation, wait_for

A, B = SITES
FLOOR = 0.45  # sigma; two rounds of two steps have 0.57 here, one step 0.40
HAND = APP.replace("polyclinic.server.app:app", "e2e_hand:app")
assert HAND != APP


@dataclass
class Standing:
    """The federation, running, and two studies that both sites have approved.

    Attributes:
        federation: Its processes.
        first: Study file; both sites must answer.
        second: Study file; one site is enough.
        resolved: Path of each as the sites were given it.
    """

    federation: Federation
    first: Path
    second: Path
    resolved: dict[Path, Path]

    def hash(self, study: Path, **changes: object) -> str:
        """The hash of a study as it was given to the sites, or of that study with fields changed."""
        return self.changed(study, **changes).hash

    def changed(self, study: Path, **changes: object) -> Resolved:
        """A resolved study with other values; `a__b` stands for a field b of a."""
        whole = json.loads(self.resolved[study].read_text())
        for name, value in changes.items():
            *parts, last = name.split("__")
            table = whole
            for part in parts:
                table = table[part]
            assert table[last] != value
            table[last] = value
        return Resolved.model_validate(whole)

    def rounds(self, site: str, kind: str, study: Path) -> list[int]:
        """Rounds of a study in a site's ledger, in its order."""
        path = self.federation.home(site) / "approvals" / f"{self.hash(study)}.json"
        approval = json.loads(path.read_text())["id"]
        return [x["round"] for x in self.federation.ledger(site, kind) if x["approval"] == approval]

    def log(self, **facts: object) -> list[dict[str, Any]]:
        """Lines of the gateway's log with these values."""
        lines = (self.federation.server / "node" / "gateway-access.log").read_text().splitlines()
        return [x for x in map(json.loads, lines) if all(x.get(key) == y for key, y in facts.items())]

    def books(self) -> dict[str, object]:
        """What a site's privacy budget is written in, and the replies it bought."""
        found: dict[str, object] = {}
        for site in SITES:
            home = self.federation.home(site)
            for path in (home / "ledger.jsonl", home / "ledger.head", home / "cost.jsonl"):
                found[f"{site} {path.name}"] = path.read_bytes() if path.exists() else b""
            found[f"{site} replies"] = sorted(path.name for path in (home / "replies").glob("*"))
        return found


def speak(port: int, data: bytes, context: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    """Send bytes to the gateway, over TLS or not; our own port, and what came back."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        mine = plain.getsockname()[1]
        try:
            link = context.wrap_socket(plain, server_hostname="localhost") if context else plain
            link.sendall(data)
            return mine, link.recv(1000)
        except OSError:  # refused: an alert, or a closed connection
            return mine, b""


def superlink_refuses(federation: Federation, key: Path) -> bool:
    """Let a real SuperNode with this key call the SuperLink itself, past the gateway: is it refused?"""
    link = (federation.server / "node" / "link.port").read_text()
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "flower-supernode"), "--superlink", f"localhost:{link}"),
            *("--root-certificates", str(federation.server / "pki" / "ca.crt")),
            *("--auth-supernode-private-key", str(key), "--isolation", "process"),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        ],
        env={**QUIET, "FLWR_HOME": str(federation.root / "flwr"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    said = done.stdout + done.stderr
    return done.returncode != 0 and "Exit Code: 305" in said and "Failed to activate SuperNode" in said


def write_app(
    federation: Federation, name: str, pyproject: str, files: Mapping[str, str] | None = None
) -> Path:
    """Write what `flwr run` makes a bundle of; any code is packed."""
    app = federation.root / "apps" / name
    for path, text in {"pyproject.toml": pyproject, "README.md": "nothing\n", **(files or {})}.items():
        (app / path).parent.mkdir(parents=True, exist_ok=True)
        (app / path).write_text(text)
    return app


def ended(home: Path, run_id: int) -> dict[str, Any]:
    """What the SuperLink says of a run that is over; empty where it is not."""
    facts = attempt(home, run_id)
    return facts if facts["status"].startswith("finished") else {}


class Hand:
    """A dishonest coordinator's ServerApp (hand.py), which sends what it is told to."""

    def __init__(self, standing: Standing, name: str, app: Path) -> None:
        self.standing, self.count = standing, 0
        self.folder = standing.federation.root / f"hand-{name}"
        self.folder.mkdir()
        home = standing.federation.server
        self.run_id = int(flwr(home, "run", str(app), "--run-config", f'run="{self.folder}"')["run-id"])

    def send(self, site: str, study: str = "", **more: Any) -> Path:
        """Have a message sent; returns where its answer will be."""
        self.count += 1
        ask = {"site": site, "study": study, "type": "train", "round": 1, "state": "", "records": {}, **more}
        part = self.folder / f"{self.count:03d}.part"
        part.write_text(json.dumps(ask))
        part.rename(self.folder / f"ask-{self.count:03d}.json")
        return self.folder / f"answer-{self.count:03d}.json"

    def answer(self, path: Path) -> dict[str, Any]:
        """Wait for an answer."""
        wait_for(path.exists, f"{path.name} of {self.folder.name}", 180)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def ask(self, site: str, study: str = "", **more: Any) -> dict[str, Any]:
        return self.answer(self.send(site, study, **more))

    def end(self) -> None:
        """Let the run end."""
        (self.folder / "stop").touch()
        home = self.standing.federation.server
        wait_for(lambda: ended(home, self.run_id), "the hand ended", 60)


def other_code(federation: Federation) -> Path:
    """A folder that, first on the path, makes this another release of Polyclinic."""
    folder, rooms = federation.root / "other-release", Path(__file__).parents[2]
    if folder.exists():
        return folder
    for room in ("common", "client", "server"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(rooms / room, folder / "polyclinic" / room, ignore=ignored)
    path = folder / "polyclinic" / "common" / "study.py"
    text, count = re.subn(r'CODE_VERSION = "[^"]*"', 'CODE_VERSION = "0.0.1"', path.read_text())
    assert count == 1
    path.write_text(text)
    return folder


@contextmanager
def unguarded_coordinator(federation: Federation) -> Iterator[None]:
    """Let the coordinator's superexec start Flower's own ServerApp, which runs whatever a bundle holds."""
    launcher = federation.server / "node" / "bin" / "flwr-serverapp"
    was, flower = launcher.read_bytes(), Path(sys.executable).parent / "flwr-serverapp"
    launcher.write_text(f'#!/bin/sh\nexec {flower} "$@"\n')
    try:
        yield
    finally:
        launcher.write_bytes(was)


@contextmanager
def everything_drifted(standing: Standing) -> Iterator[None]:
    """At clinic-a, other code, another policy, another base and other data than was approved."""
    home, data = standing.federation.home(A), standing.federation.data(A)
    (vae,) = (home / "kit" / "base").glob("vae-*/config.json")
    table, launcher = data / "images.csv", home / "node" / "bin" / "flwr-clientapp"
    was = {path: path.read_bytes() for path in (home / "policy.toml", vae, table, launcher)}
    for path in (home / "policy.toml", vae):
        path.write_bytes(was[path] + b"\n")
    table.write_bytes(was[table].replace(b"AP ", b"PA ", 1))
    assert table.read_bytes() != was[table]
    release = other_code(standing.federation)
    launcher.write_text(
        f'#!/bin/sh\nexec {sys.executable} -I -c \'import sys; sys.path.insert(0, "{release}")\n'
        'from polyclinic.client.launcher import main\nmain()\' "$@"\n'
    )
    try:
        yield
    finally:
        for path, text in was.items():
            path.write_bytes(text)


# Whose process imported what.
MARK = """
import os, pathlib, sys
who = pathlib.Path(os.environ["POLYCLINIC_HOME"]).name, pathlib.Path(sys.argv[0]).name
pathlib.Path({marks!r}, " ".join([*who, __name__])).touch()
"""
# What is shadowed still works, so that only the mark tells.
SHADOW = (
    MARK
    + """
import importlib
sys.path[:] = [place for place in sys.path if place not in {{str(pathlib.Path(__file__).parent),
    str(pathlib.Path(__file__).parent.parent)}}]
del sys.modules[__name__]
sys.modules[__name__] = importlib.import_module(__name__)
"""
)
