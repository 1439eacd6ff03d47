"""The hospital's processes: sidecar, SuperNode and its superexec, which finds only our launcher.

Nothing listens outside loopback; the sidecar opens the one outbound connection.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import sys
from pathlib import Path

from polyclinic.client.enrolment import read_kit
from polyclinic.client.journal import note
from polyclinic.common.cli import QUIET
from polyclinic.common.files import write_atomic
from polyclinic.common.kit import Kit
from polyclinic.common.launcher_folder import write_launcher
from polyclinic.common.processes import Part, free_port, listens, processes, supervise
from polyclinic.common.refusals import BadInput


def start(home: Path) -> None:
    """Run the site's processes until SIGTERM.

    Raises:
        BadInput: The site is not enrolled, or it is started already.
    """
    kit = _kit(home)
    node = _folder(home)
    home.chmod(0o700)
    node.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (node / "superexec.secret").exists():
        write_atomic(node / "superexec.secret", secrets.token_bytes(32), mode=0o600)
    write_launcher(node / "bin", "flwr-clientapp", "polyclinic.client.launcher")
    # Chosen once, so that a part that is started again is found where it was.
    sidecar, port = free_port(), free_port()
    note(home, "start")
    try:
        _supervise(home, node, kit, sidecar, port)
    finally:
        note(home, "stop")


def _supervise(home: Path, node: Path, kit: Kit, sidecar: int, port: int) -> None:
    gateway = f"[{kit.host}]:{kit.port}" if ":" in kit.host else f"{kit.host}:{kit.port}"
    supervise(
        node,
        [
            functools.partial(_sidecar, home, sidecar, gateway),
            functools.partial(_supernode, home, port, sidecar),
            functools.partial(_superexec, home, port),
        ],
        f"site {kit.site} ready: it calls {gateway}; logs in {node}",
    )


def health(home: Path) -> list[str]:
    """Say what is wrong with the site's processes, a sentence each; empty where all is well."""
    parts = processes(_folder(home))
    if not parts:
        return [f"{home}: not started; run `polyclinic-client start`"]
    return [f"{name} is down" for name, facts in parts.items() if not facts["alive"]]


def _folder(home: Path) -> Path:
    return home.resolve() / "node"


def _kit(home: Path) -> Kit:
    kit = read_kit(home)
    if not (home / "keys" / "tls.crt").exists():
        raise BadInput(
            f"{home / 'keys' / 'tls.crt'}: no certificate yet; send the request file to the coordinator and "
            "run `polyclinic-client certificate FILE` with the answer"
        )
    return kit


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _environment(home: Path) -> dict[str, str]:
    return {
        **QUIET,
        "FLWR_HOME": str(_folder(home) / "flwr"),
        "POLYCLINIC_HOME": str(home.resolve()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _sidecar(home: Path, port: int, gateway: str) -> Part:
    argv = [
        *(sys.executable, "-P", "-m", "polyclinic.client.sidecar", "--home", str(home.resolve())),
        *("--gateway", gateway, "--port", str(port)),
    ]
    return Part("sidecar", argv, _environment(home), lambda: listens(port))


def _supernode(home: Path, port: int, sidecar: int) -> Part:
    keys, node = home.resolve() / "keys", _folder(home)
    argv = [
        *(sys.executable, "-I", "-m", "polyclinic.client.supernode"),
        *("--superlink", f"localhost:{sidecar}"),
        *("--root-certificates", str(keys / "local.crt")),
        *("--auth-supernode-private-key", str(keys / "node.key")),
        *("--node-config", f"home={json.dumps(str(home.resolve()))}"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(node / "superexec.secret")),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-certfile", str(keys / "local.crt"), "--ssl-keyfile", str(keys / "local.key")),
        *("--ssl-ca-certfile", str(keys / "local.crt")),
    ]
    return Part("supernode", argv, _environment(home), lambda: listens(port))


def _superexec(home: Path, port: int) -> Part:
    keys, node = home.resolve() / "keys", _folder(home)
    argv = [
        _program("flower-superexec"),
        *("--runtime-api-address", f"localhost:{port}"),
        *("--root-certificates", str(keys / "local.crt")),
        *("--superexec-auth-secret-file", str(node / "superexec.secret")),
    ]
    # Our launcher comes first under every name that Flower could start.
    path = f"{node / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return Part("superexec", argv, {**_environment(home), "PATH": path})
