"""The coordinator's processes: a SuperLink on loopback, its superexec, and the gateway in front.

Everything that talks to Flower's SuperLink beside the ServerApp is here, through Flower's own command
line with `--format json`: the Control API behind it moves with every release.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import secrets
import ssl
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from polyclinic.common.cli import QUIET
from polyclinic.common.files import write_atomic, write_json_atomic
from polyclinic.common.launcher_folder import write_launcher
from polyclinic.common.processes import Part, free_port, listens, processes, supervise
from polyclinic.common.refusals import BadInput
from polyclinic.server.provisioning import enrolled

PROBE = "probe"  # a run of this name ends at once: it shows that a run can be launched
PROBE_S = 90.0
APP = """\
# written by polyclinic-server: configuration only, the code is installed on every machine
[project]
name = "polyclinic"
version = "0.1.0"
description = "configuration of a Polyclinic run"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "polyclinic"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "polyclinic.server.app:app"
clientapp = "polyclinic.client.app:app"

[tool.flwr.app.config]
run = ""
"""


def start(home: Path, host: str, port: int) -> None:
    """Run the coordinator's processes until SIGTERM.

    Args:
        home: The coordinator's home; `polyclinic-server provision` was run in it.
        host: Address the gateway listens on.
        port: Its port; 0 takes a free one.

    Raises:
        BadInput: Nothing was provisioned, or it is started already.
    """
    if not (home / "pki" / "link.crt").exists():
        raise BadInput(f"{home}: nothing is provisioned here; run `polyclinic-server provision STUDY` first")
    node = _folder(home)
    home.chmod(0o700)
    node.mkdir(mode=0o700, parents=True, exist_ok=True)
    port = port or free_port()
    write_atomic(node / "gateway.port", str(port).encode())
    _prepare(home)
    supervise(
        node,
        [
            functools.partial(_superlink, home),
            functools.partial(_superexec, home),
            functools.partial(_gateway, home, host, port),
        ],
        f"coordinator ready: sites reach it on {host}:{port}; logs in {node}",
    )


def sync_sites(home: Path) -> dict[str, int]:
    """Tell the SuperLink which node keys belong to enrolled sites, and to nobody else.

    Returns:
        Site name to node id. The key of a revoked or re-enrolled site is taken out: its node is refused
        from now on. So is any node that `nodes.json` does not know: a registration that was killed before
        it was noted, which would keep its key from ever being registered again.
    """
    path = _folder(home) / "nodes.json"
    with (_folder(home) / "nodes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # enroll, revoke, run and start may meet
        keys = enrolled(home)
        known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        known = {site: node for site, node in known.items() if keys.get(site) == node["key"]}
        wanted, there = {str(node["id"]) for node in known.values()}, set()
        for node in flwr(home, "supernode", "ls")["nodes"]:
            if node["status"] == "unregistered":
                continue
            there.add(node["node-id"])
            if node["node-id"] not in wanted:
                flwr(home, "supernode", "unregister", node["node-id"])
        known = {site: node for site, node in known.items() if str(node["id"]) in there}
        write_json_atomic(path, known, mode=0o600)
        for site in sorted(keys.keys() - known.keys()):
            public = _folder(home) / "node.pub"
            write_atomic(public, keys[site].encode())
            answer = flwr(home, "supernode", "register", str(public), "--name", site)
            known[site] = {"id": int(answer["node-id"]), "key": keys[site]}
            write_json_atomic(path, known, mode=0o600)
    return {site: node["id"] for site, node in known.items()}


def sync_if_started(home: Path) -> None:
    """Do the same after an enrolment or a revocation; `start` does it where nothing runs now."""
    if processes(_folder(home)):
        sync_sites(home)


def launch(home: Path, run: str) -> int:
    """Start a ServerApp for a run folder.

    Args:
        home: The coordinator's home.
        run: Name of the folder under `runs`, or `probe`.

    Returns:
        Flower's id of this attempt.
    """
    return int(flwr(home, "run", str(_folder(home) / "app"), "--run-config", f'run="{run}"')["run-id"])


def attempt(home: Path, run_id: int) -> dict[str, Any]:
    """What the SuperLink says of an attempt: `status` is pending, starting, running or finished:..."""
    (facts,) = flwr(home, "list", "--run-id", str(run_id))["runs"]
    return dict(facts)


def stop_attempt(home: Path, run_id: int) -> None:
    """Stop an attempt; its run goes on with `--resume`."""
    flwr(home, "stop", str(run_id))


def health(home: Path) -> list[str]:
    """Ask whether a run can be launched, by launching one that ends at once.

    Returns:
        What is wrong, a sentence each; empty where all is well.
    """
    parts = processes(_folder(home))
    if not parts:
        return [f"{home}: not started; run `polyclinic-server start`"]
    faults = [f"{name} is down" for name, facts in parts.items() if not facts["alive"]]
    if not listens(int((_folder(home) / "gateway.port").read_text())):
        faults.append("the gateway accepts no connection")
    if faults:
        return faults
    try:
        run_id = launch(home, PROBE)
        end = time.monotonic() + PROBE_S
        while (status := attempt(home, run_id)["status"]) != "finished:completed":
            if status.startswith("finished") or time.monotonic() > end:
                return [f"a run was launched and is {status}; see {_folder(home)}/superexec.log"]
            time.sleep(1)
    except BadInput as error:
        return [str(error)]
    return []


def flwr(home: Path, *arguments: str) -> dict[str, Any]:
    """Run Flower's command line against our own SuperLink.

    Raises:
        BadInput: It is not running, or says no; Flower's own words are in it.
    """
    command = [_program("flwr"), *arguments, "--format", "json"]
    done = subprocess.run(command, env=_environment(home), capture_output=True, text=True, check=False)
    start, end = done.stdout.find("{"), done.stdout.rfind("}")
    answer: dict[str, Any] = {}
    with suppress(ValueError):
        answer = json.loads(done.stdout[start : end + 1])
    if not answer.get("success"):
        said = str(answer.get("error-message", "")) or done.stdout + done.stderr
        raise BadInput(
            f"the SuperLink did not do `{' '.join(arguments[:2])}`: {said.strip().splitlines()[-1:]}; "
            "is `polyclinic-server start` running?"
        )
    return answer


def _folder(home: Path) -> Path:
    return home.resolve() / "node"


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(_folder(home) / "flwr"),
        "POLYCLINIC_HOME": str(home.resolve()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "COLUMNS": "400",  # one sentence a line
    }


def _prepare(home: Path) -> None:
    """Write what stays the same over restarts: port, secret, Flower's configuration, the bundle."""
    node = _folder(home)
    if not (node / "link.port").exists():
        write_atomic(node / "link.port", str(free_port()).encode())
    if not (node / "superexec.secret").exists():
        write_atomic(node / "superexec.secret", secrets.token_bytes(32), mode=0o600)
    (node / "flwr").mkdir(exist_ok=True)
    write_atomic(
        node / "flwr" / "config.toml",
        f'[superlink]\ndefault = "coordinator"\n\n[superlink.coordinator]\n'
        f'address = "localhost:{_link_port(home)}"\n'
        f"root-certificates = {json.dumps(str(home.resolve() / 'pki' / 'ca.crt'))}\n".encode(),
    )
    (node / "app").mkdir(exist_ok=True)
    write_atomic(node / "app" / "pyproject.toml", APP.encode())
    write_atomic(node / "app" / "README.md", b"Configuration only: no code travels.\n")


def _link_port(home: Path) -> int:
    return int((_folder(home) / "link.port").read_text())


def _superlink(home: Path) -> Part:
    pki, node = home.resolve() / "pki", _folder(home)
    argv = [
        _program("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(_link_port(home))),
        *("--ssl-certfile", str(pki / "link.crt"), "--ssl-keyfile", str(pki / "link.key")),
        *("--ssl-ca-certfile", str(pki / "ca.crt")),
        *("--isolation", "process", "--superexec-auth-secret-file", str(node / "superexec.secret")),
        *("--database", str(node / "superlink.db")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]

    def ready() -> bool:
        context = ssl.create_default_context(cafile=pki / "ca.crt")
        url = f"https://localhost:{_link_port(home)}/health"
        with suppress(OSError), urllib.request.urlopen(url, context=context, timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    return Part("superlink", argv, _environment(home), ready)


def _superexec(home: Path) -> Part:
    sync_sites(home)  # the SuperLink is up by now, the gateway is not: nobody came in between
    launcher = write_launcher(_folder(home) / "bin", "flwr-serverapp", "polyclinic.server.launcher")
    argv = [
        _program("flower-superexec"),
        *("--runtime-api-address", f"localhost:{_link_port(home)}"),
        *("--root-certificates", str(home.resolve() / "pki" / "ca.crt")),
        *("--superexec-auth-secret-file", str(_folder(home) / "superexec.secret")),
    ]
    path = f"{launcher.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return Part("superexec", argv, {**_environment(home), "PATH": path})


def _gateway(home: Path, host: str, port: int) -> Part:
    node = _folder(home)
    argv = [
        *(sys.executable, "-P", "-m", "polyclinic.server.gateway", "--home", str(home.resolve())),
        *("--host", host, "--port", str(port), "--upstream", f"127.0.0.1:{_link_port(home)}"),
        *("--log", str(node / "gateway-access.log")),
    ]
    return Part("gateway", argv, ready=lambda: listens(port))
