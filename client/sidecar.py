"""The sidecar: what the site's SuperNode talks to instead of the gateway.

A SuperNode cannot show a client certificate. So it speaks TLS to this process on loopback, which opens
one TLS connection to the gateway for each of its own, shows the site's certificate there, checks the
gateway's against the CA from the kit, and copies bytes both ways. It reads no HTTP and keeps nothing.

Run it with `python -m polyclinic.client.sidecar --home HOME --gateway HOST:PORT`.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from polyclinic.common.cli import run_command
from polyclinic.common.files import write_atomic
from polyclinic.common.progress import say
from polyclinic.common.refusals import BadInput
from polyclinic.common.sockets import (
    CHUNK,
    client_context,
    keep_alive,
    listen,
    parse_address,
    server_context,
    stop_at_signals,
)

CONNECT_S = 15.0
CLOSE_S = 2.0
CONNECTIONS = 64
AGAIN_S = 60.0  # the same trouble is not said more often

# The other end names the fault in an alert (RFC 8446, 6.2), which OpenSSL puts into its error's name.
_ADVICE = {
    "ALERT": "the gateway at {gateway} refuses this site's certificate ({why}); ask the coordinator whether "
    "it was revoked or replaced",
    "CERTIFICATE_VERIFY_FAILED": "{gateway} does not prove to be the gateway of this kit ({why}); something "
    "else answers at that address, or the clock here is wrong",
}
_SILENT = (
    "the gateway at {gateway} ended a connection without an answer; if that goes on, ask the coordinator "
    "whether this site's certificate was revoked or replaced"
)


async def serve(
    home: Path,
    gateway: tuple[str, int],
    port: int = 0,
    *,
    ready: Callable[[int], None] = lambda port: None,
    stop: asyncio.Event | None = None,
    log: Callable[[str], None] = say,
) -> None:
    """Serve on 127.0.0.1 until told to stop.

    Args:
        home: The site's home, with `keys/` and `kit/ca.crt`. The site's certificate is read anew for
            every connection: one that is replaced needs no restart.
        gateway: Host and port of the gateway.
        port: Port on loopback; 0 takes a free one.
        ready: Called with the port once connections are taken.
        stop: Ends it when set; none: it never ends.
        log: Takes a sentence when the gateway is lost, refuses us, or is there again.

    Raises:
        BadInput: A certificate or key is missing or broken, or the port cannot be had.
    """
    keys = home / "keys"
    local = server_context(keys / "local.crt", keys / "local.key")
    _context(home)  # says at once what is missing
    sidecar = _Sidecar(home, gateway, log)
    server = await asyncio.start_server(
        sidecar.connection,
        sock=listen("127.0.0.1", port),
        ssl=local,
        ssl_handshake_timeout=CONNECT_S,
        ssl_shutdown_timeout=CLOSE_S,
    )
    async with server:
        ready(server.sockets[0].getsockname()[1])
        await (stop or asyncio.Event()).wait()
        server.close()
        for task in list(sidecar.tasks):
            task.cancel()
        await asyncio.gather(*sidecar.tasks, return_exceptions=True)


class _Sidecar:
    def __init__(self, home: Path, gateway: tuple[str, int], log: Callable[[str], None]) -> None:
        self.home, self.gateway, self.log = home, gateway, log
        self.tasks: set[asyncio.Task[None]] = set()
        self._trouble, self._said = "", 0.0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of the SuperNode, from first to last byte.

        However it ends, the SuperNode sees a TLS connection that was closed in order: it tries such a
        one again, but gives up for good where TLS itself is broken.
        """
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            if len(self.tasks) > CONNECTIONS:
                self._say(f"more than {CONNECTIONS} connections at a time from this machine; one is refused")
            else:
                await self._to_gateway(reader, writer)
        except asyncio.CancelledError:
            pass  # the sidecar stops
        finally:
            self.tasks.discard(task)
            await _close(writer)

    async def _to_gateway(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.gateway
        name = f"{host}:{port}"
        try:
            async with asyncio.timeout(CONNECT_S):
                # A name of several addresses, IPv6 and IPv4, is tried in turn.
                far_reader, far_writer = await asyncio.open_connection(
                    host, port, ssl=_context(self.home), limit=CHUNK, ssl_shutdown_timeout=CLOSE_S
                )
        except BadInput as error:
            self._say(str(error))
            return
        except ssl.SSLError as error:
            self._say(_explain(error, name))
            return
        except (OSError, TimeoutError) as error:
            why = str(error) or "it does not answer"
            self._say(f"cannot reach the gateway at {name} ({why}); is the firewall open for it?")
            return
        keep_alive(far_writer.transport)
        try:
            await self._copy_both(reader, writer, far_reader, far_writer, name)
        finally:
            await _close(far_writer)

    async def _copy_both(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
        name: str,
    ) -> None:
        """Copy until either side ends, and say what the gateway's end means."""
        up, down = _Copy(reader, far_writer), _Copy(far_reader, writer, first=self._is_there)
        tasks = [asyncio.create_task(up.run()), asyncio.create_task(down.run())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # Where the gateway ended it, our own write may have failed first: its last words tell why.
            if tasks[1] not in done and up.broke:
                with suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_S):
                        await asyncio.shield(tasks[1])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(down.error, ssl.SSLError):
            self._say(_explain(down.error, name))
        elif down.ended and not down.count:
            self._say(_SILENT.format(gateway=name))

    def _is_there(self) -> None:
        """The gateway has answered."""
        if self._trouble:
            self.log(f"the gateway at {self.gateway[0]}:{self.gateway[1]} answers again")
            self._trouble = ""

    def _say(self, trouble: str) -> None:
        """Say what is wrong, unless it was said just now."""
        if trouble != self._trouble or time.monotonic() - self._said > AGAIN_S:
            self.log(trouble)
            self._trouble, self._said = trouble, time.monotonic()


class _Copy:
    """One direction of a connection.

    Attributes:
        count: Bytes copied.
        ended: The reading side has ended it.
        error: How, where it was not in order.
        broke: The writing side has.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        self._reader, self._writer, self._first = reader, writer, first
        self.count, self.ended, self.broke = 0, False, False
        self.error: OSError | None = None

    async def run(self) -> None:
        """Copy to the end."""
        while True:
            try:
                data = await self._reader.read(CHUNK)
            except OSError as error:
                self.error, self.ended = error, True
                return
            if not data:
                self.ended = True
                return
            if not self.count:
                self._first()
            self.count += len(data)
            try:
                self._writer.write(data)
                await self._writer.drain()
            except OSError:
                self.broke = True
                return


def _context(home: Path) -> ssl.SSLContext:
    keys = home / "keys"
    if not (keys / "tls.crt").exists():
        raise BadInput(
            f"{keys / 'tls.crt'}: no certificate yet; send the request file to the coordinator and run "
            "`polyclinic-client certificate FILE` with the answer"
        )
    return client_context(home / "kit" / "ca.crt", keys / "tls.crt", keys / "tls.key")


def _explain(error: ssl.SSLError, gateway: str) -> str:
    """Say what a TLS error means for a person at the site."""
    reason = error.reason or str(error)
    why = getattr(error, "verify_message", "") or reason.replace("_", " ").lower()
    for mark, sentence in _ADVICE.items():
        if mark in reason:
            return sentence.format(gateway=gateway, why=why)
    return (
        f"TLS with the gateway at {gateway} failed ({why}); does something between here and there alter it?"
    )


async def _close(writer: asyncio.StreamWriter) -> None:
    """End a TLS connection in order, but not for ever."""
    writer.close()
    try:
        async with asyncio.timeout(CLOSE_S):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="polyclinic.client.sidecar", description="shows the site's certificate to the gateway"
    )
    parser.add_argument("--home", type=Path, required=True, help="the site's home")
    parser.add_argument("--gateway", required=True, metavar="HOST:PORT", help="where the gateway listens")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--port-file", type=Path, help="the port is written here when it is open")
    parser.set_defaults(act=_act)
    return run_command(parser, argv)


def _act(arguments: argparse.Namespace) -> None:
    def ready(port: int) -> None:
        if arguments.port_file is not None:
            write_atomic(arguments.port_file, f"{port}\n".encode())
        print(f"sidecar ready on 127.0.0.1 port {port}", flush=True)

    async def run() -> None:
        gateway = parse_address(arguments.gateway, "--gateway")
        await serve(arguments.home, gateway, arguments.port, ready=ready, stop=stop_at_signals())

    asyncio.run(run())


if __name__ == "__main__":
    raise SystemExit(main())
