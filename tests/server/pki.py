"""A coordinator's home with keys, sites and their admission, and a stand-in for the SuperLink."""

import json
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from polyclinic.common.certificates import (
    PrivateKey,
    certificate_pem,
    certificate_sha256,
    key_pem,
    key_sha256,
    make_ca,
    new_key,
    sign_client,
    sign_local,
    sign_server,
)
from polyclinic.common.node_keys import node_key_header, node_key_private, node_key_text
from polyclinic.server.register import Enrolled, Invitation, Register, Site, locked, now, write_register

T = TypeVar("T")


@dataclass
class Authority:
    """A CA and its key."""

    key: PrivateKey
    certificate: x509.Certificate


def authority() -> Authority:
    key = new_key()
    return Authority(key, make_ca(key, "Polyclinic test"))


@dataclass
class Keys:
    """A certificate with its key, as files, and the node key it is bound to."""

    crt: Path
    key: Path
    certificate: x509.Certificate
    node: PrivateKey

    @property
    def header(self) -> str:
        return node_key_header(self.node.public_key())


def write_pair(folder: Path, name: str, certificate: x509.Certificate, key: PrivateKey) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    crt, pem = folder / f"{name}.crt", folder / f"{name}.key"
    crt.write_bytes(certificate_pem(certificate))
    pem.write_bytes(key_pem(key))
    return crt, pem


def client(ca: Authority, folder: Path, name: str, days: int = 365) -> Keys:
    key, node = new_key(), new_key()
    certificate = sign_client(ca.certificate, ca.key, key.public_key(), name, node.public_key(), days)
    return Keys(*write_pair(folder, name, certificate, key), certificate, node)


def expired(ca: Authority, folder: Path, name: str) -> Keys:
    """A certificate that was good until yesterday."""
    key, end = new_key(), datetime.now(UTC) - timedelta(days=1)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(ca.certificate.subject, subject, key.public_key(), 7)
    builder = builder.not_valid_before(end - timedelta(days=30)).not_valid_after(end)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    certificate = builder.sign(ca.key, hashes.SHA384())
    return Keys(*write_pair(folder, name, certificate, key), certificate, new_key())


@dataclass
class Coordinator:
    """A coordinator's home."""

    home: Path
    ca: Authority
    sites: dict[str, Keys] = field(default_factory=dict)

    def admit(self, *names: str) -> None:
        """Write register and `gateway/sites.json` as enrolment and revocation do."""
        register = Register(host="localhost", port=8443, ca_sha256="0" * 64, run="")
        for name in names:
            keys = self.sites[name]
            register.sites[name] = Site(
                invitation=Invitation(secret=None, secret_sha256="0" * 64, expires=now()),
                enrolled=Enrolled(
                    certificate=certificate_pem(keys.certificate).decode(),
                    certificate_sha256=certificate_sha256(keys.certificate),
                    serial=f"{keys.certificate.serial_number:x}",
                    tls_key_sha256="0" * 64,
                    node_key=node_key_text(keys.node.public_key()),
                    node_key_sha256=key_sha256(keys.node.public_key()),
                    request_sha256="0" * 64,
                    since=now(),
                ),
            )
        with locked(self.home):
            write_register(self.home, register)

    def site_home(self, folder: Path, name: str) -> Path:
        """A site's home as `init` and `certificate` leave it, as far as the sidecar reads it."""
        (folder / "kit").mkdir(parents=True)
        shutil.copy(self.home / "pki" / "ca.crt", folder / "kit")
        local = new_key()
        write_pair(folder / "keys", "local", sign_local(local), local)
        shutil.copy(self.sites[name].crt, folder / "keys" / "tls.crt")
        shutil.copy(self.sites[name].key, folder / "keys" / "tls.key")
        (folder / "keys" / "node.key").write_bytes(node_key_private(self.sites[name].node))
        return folder


def coordinator(folder: Path, *sites: str) -> Coordinator:
    home = folder / "home"
    ca = authority()
    for name, hosts in (("gateway", ["localhost", "127.0.0.1", "::1"]), ("link", ["localhost", "127.0.0.1"])):
        key = new_key()
        certificate = sign_server(ca.certificate, ca.key, key.public_key(), hosts)
        write_pair(home / "pki", name, certificate, key)
    write_pair(home / "pki", "ca", ca.certificate, ca.key)
    made = Coordinator(home, ca, {name: client(ca, folder / "clients", name) for name in sites})
    made.admit(*sites)
    return made


@dataclass
class Link:
    """What a stand-in for the SuperLink was asked."""

    port: int
    asked: list[tuple[str, str, dict[str, str], int]] = field(default_factory=list)
    connections: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)


@contextmanager
def superlink(home: Path, certificate: str = "link", port: int = 0) -> Iterator[Link]:
    """Serve HTTPS as the SuperLink does, echo bodies, and write down every whole request."""
    link = Link(port)
    live: set[ssl.SSLSocket] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20

        def setup(self) -> None:
            link.connections += 1
            live.add(self.request)
            super().setup()

        def finish(self) -> None:
            live.discard(self.request)
            super().finish()

        def answer(self) -> None:
            body = self.body()
            link.asked.append(
                (self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, len(body))
            )
            self.send_response(200)
            if self.path.endswith("/slow"):
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"5\r\nfirst\r\n")
                assert link.go_on.wait(20)
                self.wfile.write(b"4\r\nlast\r\n0\r\n\r\n")
                return
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "keep-alive")
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_CONNECT = answer

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.exactly(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.exactly(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def exactly(self, size: int) -> bytes:
            data = self.rfile.read(size)
            if len(data) < size:
                raise ConnectionError("the request was cut off")
            return data

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a body that is cut off is the gateway's doing here

    with Server(("127.0.0.1", port), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(home / "pki" / f"{certificate}.crt", home / "pki" / f"{certificate}.key")
        # The handshake belongs to the connection's thread: a peer that stops in it stops nobody else.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        link.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield link
        finally:
            link.go_on.set()
            server.shutdown()
            for connection in list(live):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join()


def read_log(path: Path) -> list[dict[str, object]]:
    """Lines of an access log."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(value: Callable[[], T], what: str, seconds: float = 10) -> T:
    end = time.monotonic() + seconds
    while not (found := value()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
