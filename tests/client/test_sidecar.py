"""The sidecar as a real process, between a client with TLS and gateways of every kind."""

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from polyclinic.common.sockets import server_context
from polyclinic.server.gateway_http import Limits
from tests.server.gateways import in_process
from tests.server.pki import (
    Coordinator,
    authority,
    client,
    coordinator,
    free_port,
    superlink,
    wait_for,
)

PATH = "/v1/fleet/push-object"


@dataclass
class Sidecar:
    """A running sidecar, its site's home and what it said."""

    home: Path
    port: int
    said: Path

    def text(self) -> str:
        return self.said.read_text()

    def must_say(self, words: str) -> None:
        wait_for(lambda: words in self.text(), f"the sidecar says {words!r}")

    def connect(self) -> ssl.SSLSocket:
        """Speak TLS as the SuperNode does, but take a connection that just breaks off for an error."""
        context = ssl.create_default_context(cafile=self.home / "keys" / "local.crt")
        raw = socket.create_connection(("127.0.0.1", self.port), 10)
        return context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False)

    def http(self, key: str) -> httpx.Client:
        return httpx.Client(
            base_url=f"https://localhost:{self.port}",
            verify=ssl.create_default_context(cafile=self.home / "keys" / "local.crt"),
            headers={"flwr-public-key": key},
            timeout=10,
        )


@contextmanager
def sidecar(made: Coordinator, folder: Path, gateway: str, name: str = "clinic-a") -> Iterator[Sidecar]:
    home = made.site_home(folder, name)
    said, port = folder / "said", folder / "port"
    command = [
        *(sys.executable, "-m", "polyclinic.client.sidecar", "--home", str(home)),
        *("--gateway", gateway, "--port-file", str(port)),
    ]
    with said.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream)
        try:
            wait_for(port.exists, "the sidecar's port file")
            yield Sidecar(home, int(port.read_text()), said)
        finally:
            process.terminate()
            assert process.wait(10) == 0
    assert "Traceback" not in said.read_text()


def ended(connection: ssl.SSLSocket, raw: bytes = b"POST") -> bool:
    """Is it ended in order, with TLS's own goodbye? A SuperNode gives up for good on anything else."""
    connection.sendall(raw)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True  # the SuperNode tries this again, too


@pytest.fixture
def made(tmp_path: Path) -> Coordinator:
    return coordinator(tmp_path / "coordinator", "clinic-a", "clinic-b")


def test_requests_reach_the_superlink_through_sidecar_and_gateway(made: Coordinator, tmp_path: Path) -> None:
    body = os.urandom(5 * 2**20)
    with (
        superlink(made.home) as link,
        in_process(made.home, link.port, Limits()) as port,
        sidecar(made, tmp_path / "a", f"localhost:{port}") as near,
    ):
        with near.http(made.sites["clinic-a"].header) as http:
            for _ in range(2):
                assert http.post(PATH, content=body).content == body
            assert http.post("/v1/control/start-run").status_code == 403
        with near.http(made.sites["clinic-b"].header) as http:
            assert http.post(PATH).status_code == 403
        assert len(link.asked) == 2
        assert not near.text()
        # Revoked: the site's people read why nothing works any more; admitted again, it goes on by itself.
        made.admit("clinic-b")

        def sent_away() -> bool:
            with closing(near.connect()) as connection:
                return ended(connection) and "without an answer" in near.text()

        wait_for(sent_away, "the sidecar says so")
        made.admit("clinic-a")

        def works() -> bool:
            try:
                with near.http(made.sites["clinic-a"].header) as http:
                    return http.post(PATH, content=b"x").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(works, "it is admitted again")
        assert "answers again" in near.text()


def test_a_gateway_that_is_not_there_is_named_once_and_found_when_it_comes(
    made: Coordinator, tmp_path: Path
) -> None:
    port = free_port()
    with superlink(made.home) as link, sidecar(made, tmp_path / "a", f"127.0.0.1:{port}") as near:
        for _ in range(3):
            with closing(near.connect()) as connection:
                assert ended(connection)
        assert near.text().count("cannot reach the gateway at 127.0.0.1") == 1
        with (
            in_process(made.home, link.port, Limits(), port),
            near.http(made.sites["clinic-a"].header) as http,
        ):
            assert http.post(PATH, content=b"x").content == b"x"
        assert "answers again" in near.text()


@contextmanager
def echo(made: Coordinator, certificate: str = "gateway", host: str = "127.0.0.1") -> Iterator[int]:
    """A gateway's stand-in that demands a certificate and sends back what it gets."""
    pki = made.home / "pki"
    context = server_context(pki / f"{certificate}.crt", pki / f"{certificate}.key", pki / "ca.crt")
    loop, ports = asyncio.new_event_loop(), list[int]()
    stop = asyncio.Event()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(copy, host, 0, ssl=context) as server:
            ports.append(server.sockets[0].getsockname()[1])
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        yield wait_for(lambda: ports, "the echo")[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_bytes_go_both_ways_untouched_whatever_they_are(made: Coordinator, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)

    async def talk(near: Sidecar) -> bytes:
        context = ssl.create_default_context(cafile=near.home / "keys" / "local.crt")
        reader, writer = await asyncio.open_connection("localhost", near.port, ssl=context)
        writer.write(data)
        back, _ = await asyncio.gather(reader.readexactly(len(data)), writer.drain())
        writer.close()
        return back

    with echo(made) as port, sidecar(made, tmp_path / "a", f"localhost:{port}") as near:
        assert asyncio.run(talk(near)) == data


def test_only_this_machine_can_reach_it_and_only_with_tls(made: Coordinator, tmp_path: Path) -> None:
    with echo(made) as port, sidecar(made, tmp_path / "a", f"localhost:{port}") as near:
        listening = [
            line.split()[1]
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
            if line.split()[3] == "0A" and line.split()[1].endswith(f":{near.port:04X}")
        ]
        assert listening == [f"0100007F:{near.port:04X}"]
        with socket.create_connection(("127.0.0.1", near.port), 10) as plain:
            plain.sendall(b"POST / HTTP/1.1\r\n\r\n")
            plain.settimeout(10)
            with suppress(ConnectionResetError):
                assert not plain.recv(100).startswith(b"HTTP")


def test_ipv6(made: Coordinator, tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 on loopback")
    with (
        echo(made, host="::1") as port,
        sidecar(made, tmp_path / "a", f"[::1]:{port}") as near,
        closing(near.connect()) as connection,
    ):
        connection.sendall(b"six")
        assert connection.recv(10) == b"six"


def test_a_gateway_that_is_not_the_kits_own_gets_no_byte(made: Coordinator, tmp_path: Path) -> None:
    other = coordinator(tmp_path / "other")
    # Another federation's; and ours, but for another name than the one that was called.
    with (
        echo(other) as port,
        echo(made, "link") as wrong_name,
        sidecar(made, tmp_path / "a", f"localhost:{port}") as near,
        sidecar(made, tmp_path / "b", f"[::ffff:127.0.0.1]:{wrong_name}") as named,
    ):
        for each in (near, named):
            with closing(each.connect()) as connection:
                assert ended(connection)
            each.must_say("does not prove to be the gateway")


def test_a_certificate_of_another_ca_is_named_as_the_reason(made: Coordinator, tmp_path: Path) -> None:
    wrong = client(authority(), tmp_path, "clinic-a")
    with (
        in_process(made.home, free_port(), Limits()) as port,
        sidecar(made, tmp_path / "a", f"localhost:{port}") as near,
    ):
        shutil.copy(wrong.crt, near.home / "keys" / "tls.crt")
        shutil.copy(wrong.key, near.home / "keys" / "tls.key")
        with closing(near.connect()) as connection:
            assert ended(connection)
        near.must_say("refuses this site's certificate (tlsv1 alert unknown ca)")


def test_a_certificate_is_read_anew_for_every_connection(made: Coordinator, tmp_path: Path) -> None:
    wrong = client(authority(), tmp_path, "clinic-a")
    with echo(made) as port, sidecar(made, tmp_path / "a", f"localhost:{port}") as near:
        shutil.copy(wrong.key, near.home / "keys" / "tls.key")
        # A key that does not fit, as in the middle of a swap, ends one connection and not the sidecar.
        with closing(near.connect()) as connection:
            assert ended(connection)
        assert "tls.crt" in near.text()
        # The right pair is used from the next connection on.
        shutil.copy(made.sites["clinic-a"].key, near.home / "keys" / "tls.key")
        with closing(near.connect()) as connection:
            connection.sendall(b"now")
            assert connection.recv(10) == b"now"


def test_it_does_not_start_without_a_certificate(made: Coordinator, tmp_path: Path) -> None:
    home = made.site_home(tmp_path / "a", "clinic-a")
    (home / "keys" / "tls.crt").unlink()
    command = [sys.executable, "-m", "polyclinic.client.sidecar", "--home", str(home), "--gateway", "h:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "polyclinic-client certificate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_real_superlink_knows_its_node_through_sidecar_and_gateway(
    made: Coordinator, tmp_path: Path
) -> None:
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    port, pki = free_port(), made.home / "pki"
    program = Path(sys.executable).parent
    environment = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    command: list[str | Path] = [
        *(program / "flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-certfile", pki / "link.crt", "--ssl-keyfile", pki / "link.key"),
        *("--ssl-ca-certfile", pki / "ca.crt", "--enable-supernode-auth", "--isolation", "process"),
        "--disable-runtime-dependency-installation",
    ]
    with (tmp_path / "superlink").open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            with (
                in_process(made.home, port, Limits()) as gateway,
                sidecar(made, tmp_path / "a", f"localhost:{gateway}") as near,
            ):
                keys = made.sites["clinic-a"]
                signs = NodeAuthHttpInterceptor(keys.node, keys.node.public_key())
                request = ActivateNodeRequest(
                    public_key=public_key_to_bytes(keys.node.public_key()), heartbeat_interval=30
                )
                with FleetHttpClient.from_server_address(
                    f"localhost:{near.port}", False, str(near.home / "keys" / "local.crt"), [signs]
                ) as fleet:

                    def activate() -> int:
                        try:
                            fleet.ActivateNode(request)
                        except httpx.HTTPStatusError as error:
                            status = error.response.status_code
                            return 0 if status == 503 else status
                        return 200

                    # Our own 503 until it listens; then its own word: a key that nobody registered.
                    assert wait_for(activate, "the SuperLink answers", 60) not in (200, 403)
                    public = tmp_path / "node.pub"
                    from polyclinic.common.node_keys import node_key_text

                    public.write_text(node_key_text(keys.node.public_key()))
                    (tmp_path / "flwr").mkdir(exist_ok=True)
                    (tmp_path / "flwr" / "config.toml").write_text(
                        f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "localhost:{port}"\n'
                        f'root-certificates = "{pki / "ca.crt"}"\n'
                    )
                    done = subprocess.run(
                        [program / "flwr", "supernode", "register", public, "lab", "--name", "clinic-a"],
                        env=environment,
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    assert done.returncode == 0, done.stdout + done.stderr
                    assert activate() == 200
        finally:
            process.terminate()
            process.wait(20)
