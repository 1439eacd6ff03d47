"""Both gateways as a test starts them, and a client that sends them bytes as they are."""

import asyncio
import http.client
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.server.gateway import serve
from polyclinic.server.gateway_http import Limits
from polyclinic.server.gateway_nginx import render
from tests.server.pki import Coordinator, Keys, Link, free_port, read_log, wait_for

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
PATH = "/v1/fleet/pull-messages"


@dataclass
class Gateway:
    """A running gateway with its home, its upstream and its log."""

    kind: str
    port: int
    coordinator: Coordinator
    link: Link
    log: Path

    def __getitem__(self, name: str) -> Keys:
        return self.coordinator.sites[name]

    def refusals(self) -> list[dict[str, Any]]:
        refused = {"403", "400", "413", "405", "408", "503", "429"}
        return [
            line
            for line in read_log(self.log)
            if line.get("event") == "refused" or line.get("status") in refused
        ]


@contextmanager
def python_gateway(made: Coordinator, link: Link) -> Iterator[Gateway]:
    log, port = made.home / "access.log", made.home / "port"
    command = [
        *(sys.executable, "-m", "polyclinic.server.gateway", "--home", str(made.home)),
        *("--host", "127.0.0.1", "--port", "0", "--upstream", f"127.0.0.1:{link.port}"),
        *("--log", str(log), "--port-file", str(port)),
    ]
    with running(command):
        wait_for(port.exists, "the gateway's port file")
        yield Gateway("python", int(port.read_text()), made, link, log)


@contextmanager
def nginx_gateway(made: Coordinator, link: Link) -> Iterator[Gateway]:
    assert NGINX
    out, user = made.home / "nginx", dict[str, Any]()
    out.mkdir()
    port = free_port()
    conf = out / "nginx.conf"
    watch = [
        *(sys.executable, "-m", "polyclinic.server.gateway_nginx", "--home", str(made.home)),
        *("--host", "127.0.0.1", "--port", str(port), "--upstream", f"127.0.0.1:{link.port}"),
        *("--out", str(out), "--watch"),
    ]
    with running(watch):
        wait_for(conf.exists, "the configuration")
        if os.geteuid() == 0:
            user = {"user": 65534, "group": 65534, "extra_groups": []}
            for path in (made.home.parent, made.home, *made.home.glob("pki/**"), out):
                path.chmod(0o755 if path.is_dir() else 0o600)
                shutil.chown(path, 65534, 65534)
        done = subprocess.run(
            [NGINX, "-t", "-p", out, "-c", conf], capture_output=True, text=True, check=False, **user
        )
        assert done.returncode == 0, done.stderr
        assert "warn" not in done.stderr
        with running([NGINX, "-p", str(out), "-c", str(conf)], **user):
            wait_for(lambda: _open(port), "nginx")
            yield Gateway("nginx", port, made, link, out / "access.log")


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, text=True, stderr=said, **options)
        try:
            yield process
        finally:
            process.terminate()
            assert process.wait(10) == 0
        said.seek(0)
        assert "Traceback" not in said.read()


def _open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def connect(gateway: Gateway, keys: Keys | None, tls: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=gateway.coordinator.home / "pki" / "ca.crt")
    if tls:
        context.maximum_version = tls
    if keys:
        context.load_cert_chain(keys.crt, keys.key)
    raw = socket.create_connection(("127.0.0.1", gateway.port), 10)
    return context.wrap_socket(raw, server_hostname="localhost")


def head(
    line: str = f"POST {PATH} HTTP/1.1", keys: Keys | None = None, *more: str, length: int | None = 0
) -> bytes:
    lines = [line, "Host: gateway"]
    lines += [f"flwr-public-key: {keys.header}"] if keys else []
    lines += [f"Content-Length: {length}"] if length is not None else []
    return "\r\n".join([*lines, *more, "", ""]).encode()


def answer(connection: ssl.SSLSocket) -> tuple[int, dict[str, str], bytes]:
    response = http.client.HTTPResponse(connection, method="POST")
    response.begin()
    body = response.read()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, body


def ask(gateway: Gateway, keys: Keys | None, raw: bytes) -> int | None:
    """Send bytes on a new connection; the status, or None where it is closed without any."""
    try:
        with closing(connect(gateway, keys)) as connection:
            connection.sendall(raw)
            return answer(connection)[0]
    except (OSError, http.client.HTTPException):
        return None


def closed(connection: ssl.SSLSocket, seconds: float) -> bool:
    """Is a connection ended by the other side within these seconds?"""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@contextmanager
def in_process(home: Path, upstream: int, limits: Limits, port: int = 0) -> Iterator[int]:
    """Our gateway in a thread, with limits a test can wait for."""
    ports: list[int] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    run = serve(
        *(home, "127.0.0.1", port, ("127.0.0.1", upstream), home / "log"),
        limits=limits,
        ready=ports.append,
        stop=stop,
    )
    thread = threading.Thread(target=loop.run_until_complete, args=(run,))
    thread.start()
    try:
        wait_for(lambda: ports, "the gateway")
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()
        loop.close()


def at(made: Coordinator, link: Link, port: int) -> Gateway:
    """A gateway that another started."""
    return Gateway("python", port, made, link, made.home / "log")


@contextmanager
def second_python(made: Coordinator, upstream: int) -> Iterator[Gateway]:
    with in_process(made.home, upstream, Limits()) as port:
        yield at(made, Link(upstream), port)


@contextmanager
def second_nginx(made: Coordinator, upstream: int) -> Iterator[Gateway]:
    assert NGINX
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        out = Path(name)
        conf = out / "nginx.conf"
        conf.write_text(render(made.home, out, ("127.0.0.1", upstream), "127.0.0.1", port))
        with running([NGINX, "-p", name, "-c", str(conf)]):
            wait_for(lambda: _open(port), "nginx")
            yield at(made, Link(upstream), port)
