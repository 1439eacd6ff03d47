"""One admitted connection at the gateway: HTTP/1.1 requests are judged, passed on and answered in order.

Both sides are parsed and written anew by h11, so no byte of framing is passed on: what the gateway took
for one request is one request to the SuperLink. Bodies stream; nothing of them is kept.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import h11

from polyclinic.common.sockets import CHUNK
from polyclinic.server.admission import NODE_KEY_HEADER

# Every call of Flower's Fleet API is one POST to one name under this path. No other character can come,
# so no decoding, normalising or joining of paths behind the gateway can lead elsewhere.
FLEET = r"/v1/fleet/[a-z0-9-]{1,64}"

_PATH = re.compile(FLEET.encode("ascii"))
_KEY = NODE_KEY_HEADER.encode("ascii")
# RFC 9110, section 7.6.1, and what the SuperLink's web server believes from a proxy on its own machine.
_NOT_PASSED_ON = {
    *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization"),
    *(b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"host"),
    *(b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip"),
}
_RETRY_S = 5
# uvicorn, the SuperLink's web server, closes a connection that was idle for 5 s.
_REUSE_S = 3.0

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Limits:
    """What one peer may take of the gateway; seconds and bytes.

    Attributes:
        body_bytes: Of one request.
        header_bytes: Request line and headers together; up to twice as much may be looked at.
        handshake_s: For TLS.
        header_s: From a request's first byte to the end of its headers.
        idle_s: Between two requests.
        stall_s: Without any progress of a body, in either direction.
        body_s: For a whole request body.
        upstream_s: Until the SuperLink begins to answer.
        linger_s: In which a refused peer may take the refusal.
        site_connections: At one time.
        handshakes: Unfinished ones at one time, of everybody.
        address_handshakes: The same of one address.
        reload_s: Between two looks at the list of sites.
    """

    body_bytes: int = 16 * 2**20
    header_bytes: int = 16 * 2**10
    handshake_s: float = 10.0
    header_s: float = 10.0
    idle_s: float = 75.0
    stall_s: float = 30.0
    body_s: float = 600.0
    upstream_s: float = 60.0
    linger_s: float = 2.0
    site_connections: int = 64
    handshakes: int = 256
    address_handshakes: int = 32
    reload_s: float = 0.5


class Leg:
    """A connection to the SuperLink."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits) -> None:
        self._reader, self._writer, self._limits = reader, writer, limits
        self._parser = h11.Connection(h11.CLIENT)
        self._used = asyncio.get_running_loop().time()

    async def send(self, event: h11.Event) -> None:
        """Write one part of a request."""
        await write(self._writer, self._parser.send(event), self._limits.stall_s)

    async def next(self, seconds: float) -> h11.Event:
        """Read the next part of the answer."""
        return await read(self._parser, self._reader, seconds, CHUNK)

    def again(self) -> bool:
        """Make ready for another request; false where this connection can carry none."""
        if (self._parser.our_state, self._parser.their_state) != (h11.DONE, h11.DONE):
            return False
        self._parser.start_next_cycle()
        self._used = asyncio.get_running_loop().time()
        return True

    def fresh(self) -> bool:
        """Tell whether the SuperLink still listens at the other end, as far as one can know."""
        young = asyncio.get_running_loop().time() - self._used < _REUSE_S
        return young and not (self._reader.at_eof() or self._writer.is_closing())

    def abort(self) -> None:
        """Close at once; what was sent of a request is lost to the SuperLink."""
        self._writer.transport.abort()


@dataclass(frozen=True)
class Upstream:
    """Where the SuperLink listens, and how it is known to be ours."""

    host: str
    port: int
    context: ssl.SSLContext
    limits: Limits

    async def connect(self) -> Leg:
        """Open a connection; its certificate must be our CA's and name `localhost`."""
        async with asyncio.timeout(self.limits.handshake_s):
            reader, writer = await asyncio.open_connection(
                self.host, self.port, ssl=self.context, server_hostname="localhost", ssl_shutdown_timeout=1
            )
        return Leg(reader, writer, self.limits)


def judge(request: h11.Request, node_key: str, body_bytes: int) -> tuple[int, str] | None:
    """Say why a request is not passed on.

    Args:
        request: Its line and headers.
        node_key: What the connection's certificate is bound to.
        body_bytes: The most a body may have.

    Returns:
        Status and a word for the log, or None where it may pass.
    """
    headers = list(request.headers)
    lengths = [value for name, value in headers if name == b"content-length"]
    if lengths and any(name == b"transfer-encoding" for name, _ in headers):
        return 400, "two-lengths"
    if request.method != b"POST" or not _PATH.fullmatch(request.target):
        return 403, "forbidden-path"
    if any(name == b"upgrade" for name, _ in headers):
        return 403, "forbidden-upgrade"
    if [value for name, value in headers if name == _KEY] != [node_key.encode("ascii")]:
        return 403, "wrong-node-key"
    if lengths and int(lengths[0]) > body_bytes:
        return 413, "body-too-large"
    return None


class Conversation:
    """The requests of one connection.

    Args:
        reader: From the site.
        writer: To the site.
        node_key: What the site's certificate is bound to.
        upstream: The SuperLink.
        limits: What the site may take.
        refused: Called with the request, where one was read, the status sent and a word for the log.

    Attributes:
        requests: How many were passed on.
        bytes_in: Of their bodies.
        bytes_out: Of the answers' bodies.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        node_key: str,
        upstream: Upstream,
        limits: Limits,
        refused: Callable[[h11.Request | None, int, str], None],
    ) -> None:
        self._reader, self._writer, self._limits = reader, writer, limits
        self._node_key, self._upstream, self._refused = node_key, upstream, refused
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self._leg: Leg | None = None
        self._request: h11.Request | None = None
        self.requests = self.bytes_in = self.bytes_out = 0

    async def run(self) -> str:
        """Serve until either side is done; returns a word that says why."""
        try:
            while True:
                self._request = None
                if not self._parser.trailing_data[0]:
                    async with asyncio.timeout(self._limits.idle_s):
                        self._parser.receive_data(await self._reader.read(CHUNK // 4))
                event = await read(self._parser, self._reader, self._limits.header_s, CHUNK // 4, whole=True)
                if not isinstance(event, h11.Request):
                    return "done"
                self._request = event
                if (said := judge(event, self._node_key, self._limits.body_bytes)) is not None:
                    return await self._refuse(*said)
                if (word := await self._pass_on(event)) is not None:
                    return word
                if (self._parser.our_state, self._parser.their_state) != (h11.DONE, h11.DONE):
                    return "done"
                self._parser.start_next_cycle()
        except h11.RemoteProtocolError as error:
            return (
                "lost"
                if self._reader.at_eof()
                else await self._refuse(error.error_status_hint, "bad-request")
            )
        except TimeoutError:
            if self._parser.their_state is h11.IDLE and not self._parser.trailing_data[0]:
                return "idle"
            self._refused(self._request, 408, "too-slow")
            return "too-slow"
        except OSError:
            return "lost"
        finally:
            self._drop_leg()

    async def _pass_on(self, request: h11.Request) -> str | None:
        """Pass one request on and its answer back; returns a word where the connection must end."""
        fault = ""
        try:
            await self._begin(request)
        except (OSError, TimeoutError) as error:
            fault = _words(error)
        if self._parser.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            await write(self._writer, self._parser.send(go_on), self._limits.stall_s)
        size = 0
        async with asyncio.timeout(self._limits.body_s):
            while isinstance(event := await self._next(), h11.Data):
                size += len(event.data)
                if size > self._limits.body_bytes:
                    return await self._refuse(413, "body-too-large")
                # With the SuperLink away the body is read to its end all the same: the connection stays.
                fault = fault or await self._send(h11.Data(data=event.data))
        self.bytes_in += size
        fault = fault or await self._send(h11.EndOfMessage())
        answer = None
        if not fault:
            try:
                answer = await self._head()
            except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
                fault = _words(error)
        if answer is None:
            self._drop_leg()
            self._refused(request, 503, f"superlink-away: {fault}")
            await self._answer(503, "the SuperLink is away; ask again", [(b"retry-after", b"%d" % _RETRY_S)])
            return None
        self.requests += 1
        return await self._pass_back(answer)

    async def _begin(self, request: h11.Request) -> None:
        """Send the request's head over the connection we have, or a new one."""
        if self._leg is not None and not self._leg.fresh():
            self._drop_leg()
        self._leg = self._leg or await self._upstream.connect()
        framing = [h for h in request.headers if h[0] == b"transfer-encoding"]
        headers = [(b"host", b"localhost"), *_passed_on(request.headers), *framing]
        await self._leg.send(h11.Request(method=request.method, target=request.target, headers=headers))

    async def _send(self, event: h11.Event) -> str:
        """Send a part of the request; returns what went wrong, or ""."""
        assert self._leg is not None
        try:
            await self._leg.send(event)
        except (OSError, TimeoutError) as error:
            return _words(error)
        return ""

    async def _head(self) -> h11.Response:
        """Wait for the answer's head."""
        assert self._leg is not None
        while not isinstance(event := await self._leg.next(self._limits.upstream_s), h11.Response):
            assert isinstance(event, h11.InformationalResponse)
        return event

    async def _pass_back(self, answer: h11.Response) -> str | None:
        """Stream the answer to the site; returns a word where the connection must end."""
        assert self._leg is not None
        head = h11.Response(
            status_code=answer.status_code, reason=answer.reason, headers=_passed_on(answer.headers)
        )
        await write(self._writer, self._parser.send(head), self._limits.stall_s)
        while True:
            try:
                event = await self._leg.next(self._limits.upstream_s)
            except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
                # Half an answer is out: only a broken connection can say that the rest will not come.
                self._refused(self._request, 502, f"superlink-broke-off: {_words(error)}")
                self._writer.transport.abort()
                return "superlink-broke-off"
            if not isinstance(event, h11.Data):
                break
            self.bytes_out += len(event.data)
            await write(self._writer, self._parser.send(h11.Data(data=event.data)), self._limits.stall_s)
        await write(self._writer, self._parser.send(h11.EndOfMessage()), self._limits.stall_s)
        if not self._leg.again():
            self._drop_leg()
        return None

    async def _refuse(self, status: int, word: str) -> str:
        """Say no and end the connection."""
        self._refused(self._request, status, word)
        self._drop_leg()
        with suppress(OSError, TimeoutError):
            if self._parser.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await self._answer(status, f"refused by the gateway: {word}", [(b"connection", b"close")])
            # To close with bytes unread would reset the connection and could take the answer back.
            async with asyncio.timeout(self._limits.linger_s):
                while await self._reader.read(CHUNK):
                    pass
        return word

    async def _answer(self, status: int, detail: str, headers: Headers) -> None:
        """Send an answer of our own, in the form of Flower's errors."""
        body = json.dumps({"detail": detail}).encode()
        headers = [*headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        for event in (
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            await write(self._writer, self._parser.send(event), self._limits.stall_s)

    async def _next(self) -> h11.Event:
        return await read(self._parser, self._reader, self._limits.stall_s, CHUNK)

    def _drop_leg(self) -> None:
        if self._leg is not None:
            self._leg.abort()
            self._leg = None


async def read(
    parser: h11.Connection, reader: asyncio.StreamReader, seconds: float, size: int, *, whole: bool = False
) -> h11.Event:
    """Read until the parser has the next event.

    Args:
        parser: Of this side.
        reader: Its bytes.
        seconds: For each piece, or with `whole` for all of them.
        size: The most to take at once.
        whole: See `seconds`.

    Raises:
        TimeoutError: It took too long.
        OSError: The connection broke.
        h11.RemoteProtocolError: It is not HTTP.
    """
    async with asyncio.timeout(seconds) as limit:
        while (event := parser.next_event()) is h11.NEED_DATA:
            parser.receive_data(await reader.read(size))
            if not whole:
                limit.reschedule(asyncio.get_running_loop().time() + seconds)
    assert isinstance(event, h11.Event)  # h11 pauses only where a cycle was not begun anew
    return event


async def write(writer: asyncio.StreamWriter, data: bytes | None, seconds: float) -> None:
    """Write and wait until the other side takes it.

    Raises:
        TimeoutError: It does not.
        OSError: The connection broke.
    """
    if data:
        writer.write(data)
        async with asyncio.timeout(seconds):
            await writer.drain()


def _passed_on(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Take out what concerns one hop only, named ones included."""
    listed = list(headers)
    options = b",".join(value for name, value in listed if name == b"connection")
    named = {option.strip().lower() for option in options.split(b",")}
    # No `Connection` header can take away how long a body is, or whose request it is.
    dropped = _NOT_PASSED_ON | (named - {b"content-length", _KEY})
    return [(name, value) for name, value in listed if name not in dropped]


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
