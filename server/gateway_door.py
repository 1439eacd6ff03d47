"""TLS handshakes at the gateway, and what a peer showed of itself, the refused one most of all.

Python shows a peer's certificate only after a good handshake, and asyncio drops the alert that names
the fault. Here both are kept: the log can say who was refused, and the refused one is told why.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import socket
import ssl
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import h11
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from polyclinic.common.sockets import CHUNK
from polyclinic.server.admission import NODE_KEY_HEADER
from polyclinic.server.gateway_http import Limits

_HANDSHAKE = 22  # content type
_CERTIFICATE = 11  # the handshake message of that name: RFC 8446, 4.4.2; RFC 5246, 7.4.6

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Failed:
    """A handshake that failed: why, and the certificate that was offered, if any (see `identity`).

    The reason is empty where the peer went away without a word, as whoever looks if the port is open.
    """

    reason: str
    offered: dict[str, str]


async def handshake(connection: socket.socket, context: ssl.SSLContext, limits: Limits) -> Streams | Failed:
    """Speak TLS as a server; a peer that fails gets the alert.

    Args:
        connection: Just accepted; the caller closes it, the streams have one of their own.
        context: A `DoorContext`.
        limits: `handshake_s` and `linger_s` count.
    """
    loop = asyncio.get_running_loop()
    door = _Door()
    _DOOR.set(door)
    reader = asyncio.StreamReader(limit=CHUNK, loop=loop)
    try:
        # asyncio closes its socket before the alert has left: that goes out through the other one.
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop),
            connection.dup(),
            ssl=context,
            ssl_handshake_timeout=limits.handshake_s,
            ssl_shutdown_timeout=1,
        )
    except OSError as error:
        if isinstance(error, ConnectionResetError) and not door.spoke:
            return Failed("", {})
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(limits.linger_s):
                await _say_why(connection, door.alert)
        reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or str(error)
        return Failed(reason or type(error).__name__, identity(door.certificate) if door.certificate else {})
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def identity(der: bytes) -> dict[str, str]:
    """Name a certificate, which may be anybody's: `subject` and `certificate_sha256`."""
    try:
        subject = x509.load_der_x509_certificate(der).subject.rfc4514_string()
    except ValueError:
        subject = "(unreadable)"
    return {"subject": subject, "certificate_sha256": hashlib.sha256(der).hexdigest()}


def asked(request: h11.Request | None) -> dict[str, str]:
    """Say what a request asked for: `method`, `path` and `node_key_sha256`, where there are any."""
    if request is None:
        return {}
    facts = {"method": request.method.decode("latin-1"), "path": request.target.decode("latin-1")}
    keys = [value for name, value in request.headers if name == NODE_KEY_HEADER.encode()]
    if keys:
        facts["node_key_sha256"] = " ".join(key_fingerprint(key) for key in keys[:2])
    return facts


def key_fingerprint(header: bytes) -> str:
    """Hash a node key as a SuperNode sends it: SHA-256 of its SubjectPublicKeyInfo, in hexadecimal."""
    try:
        key = load_pem_public_key(base64.b64decode(header, validate=True))
    except (ValueError, UnsupportedAlgorithm):
        return "(unreadable)"
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


class _Door:
    """One handshake as it goes on: what we still have to tell the peer, and what it showed."""

    def __init__(self) -> None:
        self.outgoing = ssl.MemoryBIO()
        self.alert = self.certificate = b""
        self.spoke = False


# asyncio runs a connection's callbacks in the context in which it was made, so each finds its own.
_DOOR: ContextVar[_Door] = ContextVar("door")


class _DoorObject(ssl.SSLObject):
    """Takes the alert out of a failed handshake, before asyncio throws it away."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            _DOOR.get().alert = _DOOR.get().outgoing.read()
            raise


class DoorContext(ssl.SSLContext):
    """An SSLContext that lets `handshake` see what goes on.

    `_msg_callback` is CPython's debugging hook, private and there since 3.8; a test watches it.
    """

    sslobject_class = _DoorObject

    def __init__(self, _protocol: int) -> None:
        self._msg_callback = _see_message

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *rest: Any, **more: Any
    ) -> ssl.SSLObject:
        """Remember where an alert will lie."""
        _DOOR.get().outgoing = outgoing
        return super().wrap_bio(incoming, outgoing, *rest, **more)


def _see_message(
    _connection: object, direction: str, _version: int, content: int, message: int, data: bytes
) -> None:
    """Keep the first certificate of a Certificate message."""
    _DOOR.get().spoke = True
    if (direction, content, message) != ("read", _HANDSHAKE, _CERTIFICATE):
        return
    # Type and length take 4 bytes; TLS 1.3 puts a context before the list, empty in a handshake.
    tls_1_3 = len(data) > 8 and data[4] == 0 and int.from_bytes(data[5:8], "big") == len(data) - 8
    first = 8 if tls_1_3 else 7
    length = int.from_bytes(data[first : first + 3], "big")
    _DOOR.get().certificate = bytes(data[first + 3 : first + 3 + length])


async def _say_why(connection: socket.socket, alert: bytes) -> None:
    """Send the alert, and take what the peer still sends: a reset would overtake it."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, alert)
    connection.shutdown(socket.SHUT_WR)
    while await loop.sock_recv(connection, CHUNK):
        pass
