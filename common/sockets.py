"""Listening, TLS and stopping: what the gateway and a site's sidecar do alike."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from pathlib import Path

from polyclinic.common.refusals import BadInput

# TLS 1.3 has only good ones; of TLS 1.2 we take those with forward secrecy and authenticated encryption.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
CHUNK = 2**16
# A dead link is noticed after idle + interval x count seconds, whatever the firewalls between forget.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}


def parse_address(text: str, field: str) -> tuple[str, int]:
    """Split `host:port`; an IPv6 address stands in brackets.

    Args:
        text: For example `gateway.example.org:8443`, `[::1]:8443`.
        field: Where it was written, for the message.

    Raises:
        BadInput: There is no host, or no port between 1 and 65535.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    decimal = port.isascii() and port.isdecimal() and len(port) <= 5
    if not (colon and host and decimal and 0 < int(port) < 2**16) or (":" in host) != bracketed:
        raise BadInput(f"{field} {text!r}: write host:port, with an IPv6 address in brackets")
    return host, int(port)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening TCP socket that does not block.

    Args:
        host: Address or name; `::` takes IPv4 as well.
        port: 0 lets the system choose a free one.

    Raises:
        BadInput: The address is not this machine's, the port is taken, or it needs root.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server(
            (host, port), family=family, backlog=128, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise BadInput(f"cannot listen on {host} port {port} ({error.strerror}); choose another") from error
    listener.setblocking(False)
    return listener


def server_context(
    certificate: Path, key: Path, clients: Path | None = None, kind: type[ssl.SSLContext] = ssl.SSLContext
) -> ssl.SSLContext:
    """Make the TLS settings of a server: TLS 1.2 or later, no session to resume.

    Args:
        certificate: PEM of the certificate.
        key: PEM of its private key.
        clients: PEM of the CA whose client certificates are demanded; none: nobody is asked for one.
        kind: Class of the context.

    Raises:
        BadInput: A file is missing or does not hold what it should.
    """
    context = kind(ssl.PROTOCOL_TLS_SERVER)
    _load(context, certificate, key, clients)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    # Whoever was revoked must not come back on an old session.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    return context


def client_context(ca: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Make the TLS settings of a client: only `ca` is trusted, and the host's name is checked.

    Args:
        ca: PEM of the CA.
        certificate: PEM of the client's own certificate, if it has one.
        key: PEM of its private key.

    Raises:
        BadInput: A file is missing or does not hold what it should.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(context, certificate, key, ca)
    return context


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Let the kernel find out when the other side of a TCP connection is gone."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def stop_at_signals() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set; to be called inside the running loop."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _load(context: ssl.SSLContext, certificate: Path | None, key: Path | None, ca: Path | None) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    names = " or ".join(str(path) for path in (certificate, key, ca) if path is not None)
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        if ca is not None:
            context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise BadInput(
            f"{names}: not a PEM certificate with its own key ({error.reason or error}); restore them from "
            "a backup"
        ) from error
    except OSError as error:
        raise BadInput(f"cannot read {names} ({error.strerror}); is this the right --home?") from error
