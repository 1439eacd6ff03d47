"""The gateway: the one public port of a federation, in front of a SuperLink that listens on loopback.

Flower's Control and Runtime APIs share the SuperLink's port and have no authentication of people. So
nobody reaches it but through here: TLS with a certificate of the federation's CA that `gateway/sites.json`
names at this moment, for calls of the Fleet API, with the node key that belongs to that certificate.

Run it with `python -m polyclinic.server.gateway --home HOME --upstream 127.0.0.1:PORT --log FILE`.
`gateway_nginx.py` writes a configuration with which nginx does the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import h11

from polyclinic.common.cli import run_command
from polyclinic.common.files import write_atomic
from polyclinic.common.refusals import BadInput
from polyclinic.common.sockets import (
    client_context,
    keep_alive,
    listen,
    parse_address,
    server_context,
    stop_at_signals,
)
from polyclinic.server.admission import Watched
from polyclinic.server.gateway_door import DoorContext, Failed, asked, handshake, identity
from polyclinic.server.gateway_http import Conversation, Limits, Upstream

LOG_BYTES = 10 * 2**20
LOG_FILES = 5
_LONGEST = 200  # characters of anything a peer chose, in the log


async def serve(
    home: Path,
    host: str,
    port: int,
    upstream: tuple[str, int],
    log: Path,
    *,
    limits: Limits | None = None,
    ready: Callable[[int], None] = lambda port: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until told to stop.

    Args:
        home: The coordinator's home, with `pki/` and `gateway/sites.json`.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        upstream: Address and port of the SuperLink.
        log: One line of JSON a connection opened, closed or refused, and a request refused.
        limits: What a peer may take; default: `Limits()`.
        ready: Called with the port once connections are taken.
        stop: Ends it when set; none: it never ends.

    Raises:
        BadInput: A certificate or key is missing or broken, or the port cannot be had.
    """
    limits = limits or Limits()
    pki = home / "pki"
    context = server_context(pki / "gateway.crt", pki / "gateway.key", pki / "ca.crt", kind=DoorContext)
    context.set_alpn_protocols(["http/1.1"])
    link = Upstream(*upstream, client_context(pki / "ca.crt"), limits)
    listener = listen(host, port)
    gateway = _Gateway(context, link, Watched(home), AccessLog(log), limits)
    with listener:
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(gateway.follow()),
            asyncio.create_task(gateway.accept(listener)),
            asyncio.create_task((stop or asyncio.Event()).wait()),
        ]
        try:
            gateway.log.write("start", address=f"{host}:{listener.getsockname()[1]}")
            ready(listener.getsockname()[1])
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            tasks += gateway.tasks
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            gateway.log.write("stop")


class AccessLog:
    """Lines of JSON in a file that is rotated by size. No body is ever in it.

    `event` is `start`, `stop`, `sites` (the list was read again), `open`, `close` or `refused`; beside
    `time` stand, where they are known, `peer`, `site`, `subject` and `certificate_sha256` of the
    certificate that was offered, `method`, `path`, `node_key_sha256`, `status` and `outcome`.

    Args:
        path: The file; older ones stand beside it with a number.

    Raises:
        BadInput: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
        except OSError as error:
            raise BadInput(f"--log {path}: cannot be opened ({error.strerror}); name another file") from error
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._logger = logging.Logger("polyclinic.gateway")
        self._logger.addHandler(handler)

    def write(self, event: str, **facts: object) -> None:
        """Write one line; what is None is left out, and what is long is cut."""
        line: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
        }
        for name, value in facts.items():
            if value is not None:
                line[name] = value[:_LONGEST] if isinstance(value, str) else value
        self._logger.info(json.dumps(line))


@dataclass(eq=False)
class _Session:
    """A live connection of an admitted site."""

    task: asyncio.Task[Any]
    site: str
    certificate_sha256: str
    node_key: str
    revoked: bool = False


@dataclass(eq=False)
class _Gateway:
    context: ssl.SSLContext
    link: Upstream
    watched: Watched
    log: AccessLog
    limits: Limits
    sessions: set[_Session] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    handshakes: Counter[str] = field(default_factory=Counter)

    async def accept(self, listener: socket.socket) -> None:
        """Take connections, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:
                # The peer is gone already, or there are no more file descriptors: neither ends the gateway.
                self.log.write("refused", outcome=f"accept: {error.strerror}")
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._connection(connection, address[0], address[1]))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def follow(self) -> None:
        """Follow the list of sites, for ever, and cut whoever is no longer on it."""
        if self.watched.fault:
            self.log.write("sites", fault=self.watched.fault)
        while True:
            await asyncio.sleep(self.limits.reload_s)
            if not self.watched.changed():
                continue
            admitted = self.watched.admitted.sites
            self.log.write("sites", admitted=sorted(admitted), fault=self.watched.fault or None)
            for session in list(self.sessions):
                now = admitted.get(session.site)
                if now is None or (now.certificate_sha256, now.node_key) != (
                    session.certificate_sha256,
                    session.node_key,
                ):
                    session.revoked = True
                    session.task.cancel()

    async def _connection(self, connection: socket.socket, address: str, port: int) -> None:
        peer = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        with connection:
            if (
                self.handshakes.total() >= self.limits.handshakes
                or self.handshakes[address] >= self.limits.address_handshakes
            ):
                self.log.write("refused", peer=peer, outcome="too-many-handshakes")
                return
            self.handshakes[address] += 1
            try:
                made = await handshake(connection, self.context, self.limits)
            finally:
                self.handshakes[address] -= 1
                self.handshakes += Counter()  # forgets who has none
        if isinstance(made, Failed):
            if made.reason:
                self.log.write("refused", peer=peer, outcome=f"handshake: {made.reason}", **made.offered)
            return
        try:
            await self._admit(*made, peer)
        finally:
            made[1].transport.abort()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        """Look the certificate up and serve its requests."""
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        offered = identity(der)
        admitted = self.watched.admitted
        site = admitted.site_of(offered["certificate_sha256"])
        outcome = None
        if site is None:
            outcome = "not-admitted"
        elif sum(session.site == site for session in self.sessions) >= self.limits.site_connections:
            outcome = "too-many-connections"
        if site is None or outcome:
            self.log.write("refused", peer=peer, site=site, outcome=outcome, **offered)
            writer.close()
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(self.limits.linger_s):
                    await writer.wait_closed()
            return
        keep_alive(writer.transport)
        key = admitted.sites[site].node_key

        def refused(request: h11.Request | None, status: int, word: str) -> None:
            facts = {**offered, **asked(request)}
            self.log.write("refused", peer=peer, site=site, status=status, outcome=word, **facts)

        task = asyncio.current_task()
        assert task is not None
        session = _Session(task, site, offered["certificate_sha256"], key)
        talk = Conversation(reader, writer, key, self.link, self.limits, refused)
        self.log.write("open", peer=peer, site=site, **offered)
        began, outcome = time.monotonic(), "stopped"
        self.sessions.add(session)
        try:
            outcome = await talk.run()
        finally:
            self.sessions.discard(session)
            self.log.write(
                "close",
                peer=peer,
                site=site,
                outcome="revoked" if session.revoked else outcome,
                requests=talk.requests,
                bytes_in=talk.bytes_in,
                bytes_out=talk.bytes_out,
                seconds=round(time.monotonic() - began, 3),
            )
            with suppress(OSError, TimeoutError):
                if not session.revoked:
                    writer.close()
                    async with asyncio.timeout(self.limits.linger_s):
                        await writer.wait_closed()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="polyclinic.server.gateway", description="the public port")
    parser.add_argument("--home", type=Path, required=True, help="the coordinator's home")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8443, help="0 takes a free one (%(default)s)")
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT", help="where the SuperLink listens")
    parser.add_argument("--log", type=Path, required=True, help="access log, one line of JSON an event")
    parser.add_argument("--port-file", type=Path, help="the port is written here when it is open")
    parser.set_defaults(act=_act)
    return run_command(parser, argv)


def _act(arguments: argparse.Namespace) -> None:
    def ready(port: int) -> None:
        if arguments.port_file is not None:
            write_atomic(arguments.port_file, f"{port}\n".encode())
        print(f"gateway ready on {arguments.host} port {port}", flush=True)

    async def run() -> None:
        await serve(
            arguments.home,
            arguments.host,
            arguments.port,
            parse_address(arguments.upstream, "--upstream"),
            arguments.log,
            ready=ready,
            stop=stop_at_signals(),
        )

    os.umask(0o077)  # the log names people's machines
    # Two a connection; the usual 1024 are for programs with few.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if 0 <= hard < 2**16 else 2**16, hard))
    asyncio.run(run())


if __name__ == "__main__":
    raise SystemExit(main())
