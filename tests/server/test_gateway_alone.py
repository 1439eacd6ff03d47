"""Our own gateway's limits, log and list of sites, and the mistakes a person can make."""

import re
import socket
import ssl
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from polyclinic.common.refusals import BadInput
from polyclinic.common.sockets import parse_address
from polyclinic.server import admission
from polyclinic.server.admission import Watched, read_admitted
from polyclinic.server.gateway import AccessLog
from polyclinic.server.gateway_http import FLEET, Limits
from polyclinic.server.gateway_nginx import render
from tests.server.gateways import (
    Gateway,
    answer,
    ask,
    at,
    closed,
    connect,
    head,
    in_process,
)
from tests.server.pki import (
    Coordinator,
    authority,
    client,
    coordinator,
    expired,
    read_log,
    superlink,
    wait_for,
)


def test_who_is_slow_or_many_is_sent_away(tmp_path: Path) -> None:
    made = coordinator(tmp_path, "clinic-a", "clinic-b")
    limits = Limits(header_s=0.4, idle_s=0.8, stall_s=0.4, handshake_s=0.4, linger_s=0.1, site_connections=2)
    with superlink(made.home) as link, in_process(made.home, link.port, limits) as port:
        gateway = at(made, link, port)
        keys = gateway["clinic-a"]
        with socket.create_connection(("127.0.0.1", port), 5) as silent:
            assert silent.recv(1) == b""
        with closing(connect(gateway, keys)) as drip:
            began = time.monotonic()
            with suppress(OSError):
                for byte in head(keys=keys) + bytes(100):  # a byte now and then is not progress
                    drip.sendall(bytes([byte]))
                    time.sleep(0.05)
            assert time.monotonic() - began < 3
        with closing(connect(gateway, keys)) as stuck:
            stuck.sendall(head(keys=keys, length=100) + b"half")
            assert closed(stuck, 3)
        with closing(connect(gateway, keys)) as idle:
            idle.sendall(head(keys=keys))
            assert answer(idle)[0] == 200
            assert closed(idle, 3)
        wait_for(lambda: not _live(gateway), "all are closed")
        with closing(connect(gateway, keys)), closing(connect(gateway, keys)):
            wait_for(lambda: _live(gateway) == 2, "two are open")
            assert ask(gateway, keys, head(keys=keys)) is None
            assert ask(gateway, gateway["clinic-b"], head(keys=gateway["clinic-b"])) == 200
        outcomes = {str(line["outcome"]) for line in gateway.refusals()}
        assert {"too-slow", "too-many-connections"} <= outcomes
        assert any("longer than" in outcome for outcome in outcomes)


def _live(gateway: Gateway) -> int:
    events = [line["event"] for line in read_log(gateway.log)]
    return events.count("open") - events.count("close")


def test_unfinished_handshakes_of_one_address_are_limited(tmp_path: Path) -> None:
    made = coordinator(tmp_path, "clinic-a")
    limits = Limits(address_handshakes=2, handshake_s=1.0, linger_s=0.1)
    with superlink(made.home) as link, in_process(made.home, link.port, limits) as port:
        gateway = at(made, link, port)
        halves = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(3)]
        assert halves[2].recv(1) == b""
        for half in halves:
            half.close()
        wait_for(
            lambda: ask(gateway, gateway["clinic-a"], head(keys=gateway["clinic-a"])) == 200, "room again"
        )


def test_a_list_of_sites_that_cannot_be_read_admits_nobody(tmp_path: Path) -> None:
    made = coordinator(tmp_path, "clinic-a")
    path = admission.admission_path(made.home)
    good = path.read_text()
    watched = Watched(made.home)
    assert set(watched.admitted.sites) == {"clinic-a"}
    assert not watched.changed()
    for bad in ("", "[]", good[:-9], good.replace('"node_key"', '"revoked": true, "node_key"')):
        path.write_text(bad)
        assert watched.changed()
        assert not watched.admitted.sites
        assert str(path) in watched.fault
    path.unlink()
    assert watched.changed()
    assert "provision" in watched.fault
    path.write_text(good)
    assert watched.changed()
    assert not watched.fault
    assert set(watched.admitted.sites) == {"clinic-a"}
    twice = read_admitted(path).model_dump()
    twice["sites"]["clinic-b"] = twice["sites"]["clinic-a"]
    with pytest.raises(ValueError, match="same certificate"):
        admission.Admitted.model_validate(twice)


def test_nginx_is_not_given_what_it_would_read_as_its_own(tmp_path: Path) -> None:
    made = coordinator(tmp_path / "a;b", "clinic-a")
    with pytest.raises(BadInput, match="choose another folder"):
        render(made.home, tmp_path, ("127.0.0.1", 1))


def test_nginx_needs_register_and_admission_to_agree(tmp_path: Path) -> None:
    made = coordinator(tmp_path, "clinic-a")
    path = admission.admission_path(made.home)
    path.write_text(path.read_text().replace('"certificate_sha256": "', '"certificate_sha256": "00')[:-2])
    broken = read_admitted_text(made, "0" * 64)
    path.write_text(broken)
    with pytest.raises(BadInput, match="clinic-a: the register has another certificate"):
        render(made.home, tmp_path, ("127.0.0.1", 1))


def read_admitted_text(made: Coordinator, certificate: str) -> str:
    key = made.sites["clinic-a"].header
    site = admission.Admission(certificate_sha256=certificate, node_key=key)
    return admission.Admitted(sites={"clinic-a": site}).model_dump_json()


def test_the_log_is_rotated_and_takes_no_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.server.gateway.LOG_BYTES", 2000)
    log = AccessLog(tmp_path / "log")
    for _ in range(20):
        log.write("refused", path="/" + "x" * 5000, site=None)
    assert (tmp_path / "log.1").exists()
    line = read_log(tmp_path / "log")[-1]
    assert len(str(line["path"])) == 200
    assert "site" not in line


def test_what_we_took_from_flower_and_python_is_still_so() -> None:
    from flwr.supercore import constant
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    assert admission.NODE_KEY_HEADER == constant.FLEET_HTTP_PUBLIC_KEY_HEADER
    passing = {path for _, path in PROTOBUF_REQUEST_TYPES if re.fullmatch(FLEET, path)}
    fleet = {path for method, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert passing == fleet
    assert len(fleet) >= 12
    assert {method for method, path in PROTOBUF_REQUEST_TYPES if path in fleet} == {"POST"}
    assert hasattr(ssl.SSLContext, "_msg_callback")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("host:1", ("host", 1)),
        ("[::1]:8443", ("::1", 8443)),
        ("::1:8443", None),
        ("host", None),
        ("host:0", None),
        ("host:65536", None),
        (":80", None),
        ("host:٣", None),
    ],
)
def test_addresses(text: str, found: tuple[str, int] | None) -> None:
    if found:
        assert parse_address(text, "--upstream") == found
    else:
        with pytest.raises(BadInput, match="host:port"):
            parse_address(text, "--upstream")


def test_mistakes_of_a_person_are_one_sentence(tmp_path: Path) -> None:
    made = coordinator(tmp_path, "clinic-a")
    command = [sys.executable, "-m", "polyclinic.server.gateway", "--upstream", "127.0.0.1:1"]
    log = ("--log", str(tmp_path / "log"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, word in (
            (("--home", str(tmp_path / "nowhere")), "--home"),
            (("--home", str(made.home), "--host", "127.0.0.1", "--port", port), "choose another"),
        ):
            done = subprocess.run([*command, *options, *log], capture_output=True, text=True, check=False)
            assert done.returncode == 2
            assert word in done.stderr
            assert len(done.stderr.splitlines()) == 1


def test_a_refused_peer_is_told_why_in_a_tls_alert(tmp_path: Path) -> None:
    made = coordinator(tmp_path)
    with superlink(made.home) as link, in_process(made.home, link.port, Limits()) as port:
        # Who only looks if the port is open is no refusal; `status` does.
        socket.create_connection(("127.0.0.1", port), 5).close()
        for keys, word in (
            (None, "CERTIFICATE_REQUIRED"),
            (client(authority(), tmp_path, "clinic-x"), "UNKNOWN_CA"),
            (expired(made.ca, tmp_path, "clinic-old"), "CERTIFICATE_EXPIRED"),
        ):
            with closing(connect(at(made, link, port), keys)) as connection:
                connection.sendall(head())
                with pytest.raises(ssl.SSLError, match=word):
                    connection.recv(1)
        wait_for(lambda: len(at(made, link, port).refusals()) >= 3, "the log has them")
    refused = at(made, link, port).refusals()
    assert [line.get("subject") for line in refused] == [None, "CN=clinic-x", "CN=clinic-old"]
