"""What the public port must do: ours, and nginx with the configuration we write, as real processes."""

import http.client
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from polyclinic.common.certificates import new_key, sign_server
from polyclinic.server.gateway_door import key_fingerprint
from tests.server.gateways import (
    NGINX,
    PATH,
    Gateway,
    answer,
    ask,
    closed,
    connect,
    head,
    nginx_gateway,
    python_gateway,
    second_nginx,
    second_python,
)
from tests.server.pki import (
    Keys,
    authority,
    client,
    coordinator,
    expired,
    free_port,
    read_log,
    superlink,
    wait_for,
    write_pair,
)

MIB = 2**20


@pytest.fixture(scope="module", params=["python", "nginx"])
def gateway(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """A gateway in front of a stand-in, with clinic-a and clinic-b admitted; shared by the tests."""
    if request.param == "nginx" and NGINX is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs nginx: apt install nginx-light")
        pytest.skip("nginx is not installed")
    # Outside pytest's folder, which root alone can enter: nginx runs as nobody.
    with tempfile.TemporaryDirectory(prefix="gateway-") as name:
        made = coordinator(Path(name), "clinic-a", "clinic-b", "clinic-c", "clinic-d")
        made.admit("clinic-a", "clinic-b", "clinic-c")
        with superlink(made.home) as link:
            start = python_gateway if request.param == "python" else nginx_gateway
            with start(made, link) as running:
                yield running


# -- what passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_calls_of_the_fleet_api_pass_and_bodies_come_back_whole(
    gateway: Gateway, tls: ssl.TLSVersion
) -> None:
    keys, body = gateway["clinic-a"], os.urandom(5 * MIB)
    asked, connections = len(gateway.link.asked), gateway.link.connections
    hops = ("Connection: keep-alive, X-Hop", "X-Hop: 1", "X-Forwarded-For: 1.2.3.4", "X-Real-IP: 1.2.3.4")
    with closing(connect(gateway, keys, tls)) as connection:
        for number in range(3):
            # The names that a hop lists, and what a web server behind a proxy believes, stay behind.
            more = (*(hops if gateway.kind == "python" else hops[2:]), f"Flwr-Timestamp: {number}")
            connection.sendall(head(f"POST {PATH} HTTP/1.1", keys, *more, length=len(body)) + body)
            status, _, back = answer(connection)
            assert (status, back) == (200, body)
        connection.sendall(head(f"POST {PATH} HTTP/1.1", keys, "Transfer-Encoding: chunked", length=None))
        connection.sendall(b"3\r\nabc\r\n400\r\n" + body[:1024] + b"\r\n0\r\n\r\n")
        assert answer(connection)[2] == b"abc" + body[:1024]
    for number, (method, path, headers, _) in enumerate(gateway.link.asked[asked:]):
        assert (method, path, headers["host"]) == ("POST", PATH, "localhost")
        assert headers["flwr-public-key"] == keys.header
        assert headers.get("flwr-timestamp") == (str(number) if number < 3 else None)
        assert not headers.keys() & {"x-hop", "x-forwarded-for", "x-real-ip"}
    assert len(gateway.link.asked) == asked + 4
    assert gateway.link.connections - connections <= 2, "the connection to the SuperLink is not used again"


def test_the_largest_body_passes_and_one_more_byte_does_not(gateway: Gateway) -> None:
    keys, asked = gateway["clinic-a"], len(gateway.link.asked)
    body = bytes(16 * MIB)
    assert ask(gateway, keys, head(keys=keys, length=len(body)) + body) == 200
    assert ask(gateway, keys, head(keys=keys, length=len(body) + 1)) == 413
    with closing(connect(gateway, keys)) as connection, suppress(OSError, http.client.HTTPException):
        connection.sendall(head(f"POST {PATH} HTTP/1.1", keys, "Transfer-Encoding: chunked", length=None))
        for _ in range(17):
            connection.sendall(b"100000\r\n" + bytes(MIB) + b"\r\n")
        assert answer(connection)[0] == 413
    assert [size for *_, size in gateway.link.asked[asked:]] == [len(body)]
    assert any(str(line["status"]) == "413" for line in gateway.refusals())


def test_an_answer_is_passed_on_while_it_is_made(gateway: Gateway) -> None:
    keys = gateway["clinic-a"]
    with closing(connect(gateway, keys)) as connection:
        connection.sendall(head("POST /v1/fleet/slow HTTP/1.1", keys))
        seen = b""
        while b"first" not in seen:  # a gateway that waits for the whole answer never gets it
            seen += connection.recv(4096)
        gateway.link.go_on.set()
        while b"last" not in seen:
            seen += connection.recv(4096)
    gateway.link.go_on.clear()


def test_expecting_a_go_on_gets_one(gateway: Gateway) -> None:
    keys = gateway["clinic-a"]
    with closing(connect(gateway, keys)) as connection:
        connection.sendall(head(f"POST {PATH} HTTP/1.1", keys, "Expect: 100-continue", length=4))
        assert connection.recv(4096).startswith(b"HTTP/1.1 100")
        connection.sendall(b"body")
        assert answer(connection)[2] == b"body"


# -- who is refused ------------------------------------------------------------------------------------


def test_nobody_else_comes_through_the_door_and_the_log_says_who_tried(
    gateway: Gateway, tmp_path: Path
) -> None:
    known = gateway["clinic-a"]
    server = gateway.coordinator.home / "pki"
    tried = {
        "no certificate": None,
        "another CA": client(authority(), tmp_path, "clinic-x"),
        "our CA, but not admitted": gateway["clinic-d"],
        "expired": expired(gateway.coordinator.ca, tmp_path, "clinic-old"),
        "a server's certificate": Keys(
            server / "link.crt", server / "link.key", known.certificate, known.node
        ),
    }
    asked = len(gateway.link.asked)
    raw = head(keys=known)
    statuses = {what: ask(gateway, keys, raw) for what, keys in tried.items()}
    with socket.create_connection(("127.0.0.1", gateway.port), 10) as plain:
        plain.sendall(raw)
        first = plain.recv(4096)
    assert b" 200 " not in first
    # Ours breaks off, nginx says 403.
    assert set(statuses.values()) == ({None} if gateway.kind == "python" else {403}), statuses
    assert len(gateway.link.asked) == asked
    names = {"clinic-x", "clinic-old", "clinic-d", "CN=localhost"}
    wait_for(lambda: all(name in str(gateway.refusals()) for name in names), f"the log names {names}")
    assert ask(gateway, known, raw) == 200


@pytest.mark.parametrize(
    "line",
    [
        "GET /v1/fleet/pull-messages HTTP/1.1",
        "PUT /v1/fleet/pull-messages HTTP/1.1",
        "POST / HTTP/1.1",
        "GET /health HTTP/1.1",
        "POST /v1/control/start-run HTTP/1.1",
        "POST /v1/control/register-node HTTP/1.1",
        "POST /v1/runtime/acquire-task HTTP/1.1",
        "POST /v1/fleet HTTP/1.1",
        "POST /v1/fleet/ HTTP/1.1",
        "POST /v1/fleet/../control/start-run HTTP/1.1",
        "POST /v1/fleet/..%2fcontrol/start-run HTTP/1.1",
        "POST /v1/fleet/%2e%2e/control/start-run HTTP/1.1",
        "POST /v1/fleet/%2e%2e%2fcontrol HTTP/1.1",
        "POST /v1/fleet//pull-messages HTTP/1.1",
        "POST //v1/fleet/pull-messages HTTP/1.1",
        "POST /v1/control/../fleet/pull-messages HTTP/1.1",
        "POST /v1/./fleet/pull-messages HTTP/1.1",
        "POST /V1/FLEET/pull-messages HTTP/1.1",
        "POST /v1/fleet/pull-messages?a=/v1/control HTTP/1.1",
        "POST /v1/fleet/pull-messages;x HTTP/1.1",
        "POST /v1/fleet/pull-messages/ HTTP/1.1",
        "POST /v1\\fleet\\pull-messages HTTP/1.1",
        "POST https://localhost/v1/fleet/pull-messages HTTP/1.1",
        "POST https://localhost/v1/control/start-run HTTP/1.1",
        "CONNECT localhost:8000 HTTP/1.1",
        "OPTIONS * HTTP/1.1",
    ],
)
def test_only_posts_to_the_fleet_api_pass(gateway: Gateway, line: str) -> None:
    keys, asked = gateway["clinic-a"], len(gateway.link.asked)
    # nginx takes these two for no HTTP at all.
    odd = gateway.kind == "nginx" and not line.startswith(("POST", "GET", "PUT"))
    assert ask(gateway, keys, head(line, keys)) in ((400,) if odd else (403,))
    assert len(gateway.link.asked) == asked
    if gateway.kind == "python":
        last = gateway.refusals()[-1]
        assert (last["site"], last["path"], last["status"]) == ("clinic-a", line.split()[1], 403)


def test_another_protocol_is_not_switched_to(gateway: Gateway) -> None:
    keys, asked = gateway["clinic-a"], len(gateway.link.asked)
    more = ("Connection: upgrade", "Upgrade: websocket")
    assert ask(gateway, keys, head(f"POST {PATH} HTTP/1.1", keys, *more)) == 403
    assert len(gateway.link.asked) == asked


def test_a_certificate_is_good_for_its_own_node_key_only(gateway: Gateway) -> None:
    keys, other = gateway["clinic-a"], gateway["clinic-b"]
    asked = len(gateway.link.asked)
    line = f"POST {PATH} HTTP/1.1"
    assert ask(gateway, keys, head(line)) == 403
    assert ask(gateway, keys, head(line, other)) == 403
    assert ask(gateway, keys, head(line, None, f"flwr-public-key: {keys.header.swapcase()}")) == 403
    assert ask(gateway, keys, head(line, None, "flwr-public-key: ")) == 403
    assert ask(gateway, keys, head(line, other, f"flwr-public-key: {keys.header}")) == 403
    assert len(gateway.link.asked) == asked
    whose = key_fingerprint(other.header.encode()) if gateway.kind == "python" else other.header
    tried = wait_for(
        lambda: [line for line in gateway.refusals() if whose in line.values()],
        "the log says whose key it was",
    )
    assert {line["subject"] for line in tried} == {"CN=clinic-a"}
    # Two of them: whatever passes carries the right one alone.
    ask(gateway, keys, head(line, keys, f"flwr-public-key: {other.header}"))
    for _, _, headers, _ in gateway.link.asked[asked:]:
        assert headers["flwr-public-key"] == keys.header


@pytest.mark.parametrize(
    "body",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        "Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        "Content-Length: -1\r\n\r\n",
        "Content-Length: 0x5\r\n\r\nabcde",
        "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
    ],
)
def test_requests_that_two_parsers_could_read_differently_are_refused(gateway: Gateway, body: str) -> None:
    keys, asked = gateway["clinic-a"], len(gateway.link.asked)
    raw = head(f"POST {PATH} HTTP/1.1", keys, length=None)[:-2] + body.encode()
    status = ask(gateway, keys, raw + head("POST /v1/control/start-run HTTP/1.1", keys))
    assert status in (400, 501, None)
    assert len(gateway.link.asked) == asked


def test_headers_without_end_are_refused(gateway: Gateway) -> None:
    keys, asked = gateway["clinic-a"], len(gateway.link.asked)
    raw = head(f"POST {PATH} HTTP/1.1", keys, f"X-Long: {'x' * 40_000}")
    assert ask(gateway, keys, raw) in (400, 431, 494)
    assert len(gateway.link.asked) == asked


def test_a_revoked_site_is_cut_off_and_no_other(gateway: Gateway) -> None:
    revoked, other = gateway["clinic-c"], gateway["clinic-b"]
    with closing(connect(gateway, revoked)) as live, closing(connect(gateway, revoked)) as busy:
        live.sendall(head(keys=revoked))
        assert answer(live)[0] == 200
        # In the middle of a body.
        busy.sendall(head(keys=revoked, length=1000) + b"half")
        with closing(connect(gateway, other)) as stays:
            stays.sendall(head(keys=other))
            assert answer(stays)[0] == 200
            gateway.coordinator.admit("clinic-a", "clinic-b")
            assert closed(live, 4)
            assert closed(busy, 4)
            if gateway.kind == "python":  # a reload of nginx ends idle connections of everybody
                stays.sendall(head(keys=other))
                assert answer(stays)[0] == 200
    asked = len(gateway.link.asked)
    assert ask(gateway, revoked, head(keys=revoked)) != 200
    assert len(gateway.link.asked) == asked
    assert ask(gateway, other, head(keys=other)) == 200
    if gateway.kind == "python":
        assert {"event": "close", "site": "clinic-c", "outcome": "revoked"}.items() <= wait_for(
            lambda: [line for line in read_log(gateway.log) if line.get("outcome") == "revoked"],
            "the log names the revoked site",
        )[0].items()


def test_a_superlink_that_is_away_comes_back_on_the_same_connection(gateway: Gateway, tmp_path: Path) -> None:
    made, keys, port = gateway.coordinator, gateway["clinic-a"], free_port()
    # nginx reads no body for nobody, and closes where there is one.
    body = os.urandom(MIB if gateway.kind == "python" else 0)
    raw = head(keys=keys, length=len(body)) + body
    start = second_python if gateway.kind == "python" else second_nginx
    with start(made, port) as second, closing(connect(second, keys)) as connection:
        for _ in range(2):
            connection.sendall(raw)
            status, headers, _ = answer(connection)
            assert (status, headers["retry-after"]) == (503, "5")
            with superlink(made.home, port=port):
                connection.sendall(raw)
                assert answer(connection)[::2] == (200, body)
        connection.sendall(raw)
        assert answer(connection)[0] == 503


def test_whoever_took_the_superlinks_port_gets_nothing(gateway: Gateway, tmp_path: Path) -> None:
    made, keys, port = gateway.coordinator, gateway["clinic-a"], free_port()
    # Another CA's; ours, but for another host.
    signed_elsewhere = coordinator(tmp_path).home
    key = new_key()
    elsewhere = sign_server(made.ca.certificate, made.ca.key, key.public_key(), ["elsewhere"])
    write_pair(tmp_path / "pki", "link", elsewhere, key)
    start = second_python if gateway.kind == "python" else second_nginx
    with start(made, port) as second:
        for home in (signed_elsewhere, tmp_path):
            with superlink(home, port=port) as wrong:
                assert ask(second, keys, head(keys=keys)) == 503
                assert wrong.connections
                assert not wrong.asked
