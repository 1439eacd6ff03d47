"""Between site and coordinator: nginx as it is shipped, links that are cut, a site with a wrong clock.

Sites reach the coordinator through a relay that can cut a connection in the middle of a body. Behind it
stands nginx with the shipped script and configuration where nginx is installed, and our gateway elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.ledger_view import verify
from polyclinic.common.certificates import certificate_pem, key_pem, make_ca, new_key, sign_client
from polyclinic.common.processes import free_port, listens
from tests.deploy.shipped import DEPLOY, tool
from tests.e2e.federation import SITES, Federation, at_once, call, wait_for
from tests.e2e.relay import Relay
from tests.e2e.test_short import ask as knock

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

A, B = SITES
PLAN = ["down", "down", "up", "up", "down", "up"]
WRONG_S = 600
SUMS = """
[releases]
fidelity_epsilon = 3.0
fourier_features = 256
[reference]
pretrain = 0.2
probe = 0.2
evaluate = 0.6
"""


@dataclass
class Line:
    """The federation, and what stands in front of it.

    Attributes:
        federation: Its processes; `federation.port` is the relay's.
        relay: What the sites call.
        nginx: Folder of nginx' configuration and logs; None where our own gateway is in front.
    """

    federation: Federation
    relay: Relay
    nginx: Path | None


@pytest.fixture(scope="module")
def line(federation: Federation) -> Iterator[Line]:
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    front = free_port()
    federation.gateway = free_port() if nginx else front
    folder = federation.root / "nginx"
    relay = Relay(federation.port, front)
    federation.start("server")
    script = None
    if nginx:
        path = f"{Path(sys.executable).parent}:{Path(nginx).parent}:/usr/bin:/bin"
        log = (federation.root / "nginx.start.log").open("ab")
        # As compose/coordinator.nginx.yaml and systemd/polyclinic-nginx.service run it.
        script = subprocess.Popen(
            ["/bin/sh", str(DEPLOY / "nginx" / "serve.sh"), str(federation.server), str(front), str(folder)],
            env={**os.environ, "PATH": path},
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(lambda: listens(front), "the public port is open", 60)
        yield Line(federation, relay, folder if nginx else None)
    finally:
        federation.stop_all()
        relay.close()
        if script:
            script.terminate()
            script.wait(timeout=20)


def log(line: Line, **facts: object) -> list[dict[str, Any]]:
    """Lines of nginx' access log with these values."""
    assert line.nginx
    lines = (line.nginx / "access.log").read_text().splitlines()
    return [x for x in map(json.loads, lines) if all(x.get(key) == value for key, value in facts.items())]


def test_the_shipped_nginx_keeps_strangers_and_other_apis_out(line: Line) -> None:
    tool("nginx", "apt install nginx-light")  # skips without it, and fails in CI
    federation, home = line.federation, line.federation.home("stranger")
    path = "/v1/fleet/activate-node"
    assert knock(federation, path) == "403"  # nginx answers in HTTP who shows no certificate
    assert log(line, status="403", verified="NONE", site="")
    # Another CA's certificate in clinic-a's name; then clinic-a's own, with a node key that is not its own.
    node, tls, other_ca = new_key(), new_key(), new_key()
    forged = sign_client(make_ca(other_ca, "another CA"), other_ca, tls.public_key(), A, node.public_key())
    (home / "keys").mkdir(parents=True)
    (home / "keys" / "tls.key").write_bytes(key_pem(tls))
    (home / "keys" / "tls.crt").write_bytes(certificate_pem(forged))
    assert knock(federation, path, "stranger") in ("403", "refused")
    assert [x for x in log(line, site="") if x["verified"].startswith("FAILED") and f"CN={A}" in x["subject"]]
    assert knock(federation, path, A) == "403"
    assert knock(federation, path, A, "0" * 192) == "403"
    assert log(line, site=A, verified="SUCCESS", node_key="0" * 192, status="403")
    for api in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/pull-messages", "/health",
                "/v1/fleet/../control/stop-run", "/v1/fleet/%2e%2e/control/stop-run"):  # fmt: skip
        assert knock(federation, api) == "403", api
        assert knock(federation, api, A) == "403", api


def test_a_study_is_trained_over_links_that_are_cut_in_the_middle_of_a_message(line: Line) -> None:
    federation = line.federation
    # After its rounds it asks once for DP-CMMD: that, too, goes through the doors and the books.
    study = federation.write_study("cut", rounds=2, federation=SUMS)
    resolved = federation.resolved(study)
    at_once(lambda site: federation.approve(site, resolved), SITES)
    at_once(federation.start, SITES)
    line.relay.plan = list(PLAN)
    federation.run(study)
    assert (line.relay.cut, line.relay.plan) == (PLAN, [])
    for number in (1, 2):
        found = federation.record(study, number)
        assert sorted(found["replied"]) == sorted(SITES)
        assert [found["refused"], found["rejected"], found["absent"]] == [{}, {}, []]
    for site in SITES:
        for kind in ("reserve", "settle"):
            assert [x["round"] for x in federation.lines(site, study, kind)] == [1, 2, "fidelity"]
        verify(federation.home(site), [])
    run_dir = federation.run_dir(study)
    assert (run_dir / "report.html").stat().st_size > 10_000
    told = json.loads((run_dir / "metrics.json").read_text())["federated_fidelity"]
    assert sorted(told["sites"]) == sorted(SITES)
    if line.nginx:
        assert {x["site"] for x in log(line, status="200")} == set(SITES)


def test_a_link_that_stands_still_in_the_middle_of_a_reply_holds_up_nobody_else(line: Line) -> None:
    federation = line.federation
    study = federation.write_study("still", rounds=1, min_sites=1, deadline=150, grace=10)
    resolved = federation.resolved(study)
    at_once(lambda site: federation.approve(site, resolved), SITES)
    line.relay.plan, line.relay.cut = ["hold"], []
    running = federation.run_in_background(study)
    # The slow link's reply is begun first; the other site answers while it stands still.
    wait_for(lambda: federation.task(A), "the site with the good link has begun", 120)
    with frozen(federation.task(A)):
        wait_for(lambda: line.relay.cut == ["hold"], "a reply stands still", 120)
        sidecar = federation.parts(B)["sidecar"]["pid"]
        os.kill(sidecar, signal.SIGSTOP)
    assert running.wait(timeout=240) == 0
    found = federation.record(study, 1)
    assert list(found["replied"]) == [A]
    assert [found["refused"], found["rejected"], found["absent"]] == [{}, {}, [B]]
    assert found["seconds"] < 170
    os.kill(sidecar, signal.SIGCONT)
    line.relay.go_on.set()
    # What was set aside was spent, once, and is in the store.
    for kind in ("reserve", "settle"):
        assert [x["round"] for x in federation.lines(B, study, kind)] == [1]


@contextmanager
def frozen(process: int) -> Iterator[None]:
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes a process's clock wrong; a machine's clock is everybody's."""
    compiler = tool("cc", "apt install gcc", everywhere=False)
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def test_a_site_with_a_wrong_clock_is_told_so_and_loses_nothing(line: Line, wrong_clock: Path) -> None:
    federation = line.federation
    study = federation.write_study("clock", rounds=2, min_sites=1, deadline=600)
    resolved = federation.resolved(study)
    at_once(lambda site: federation.approve(site, resolved), SITES)
    federation.stop(B)
    before = (federation.home(B) / "ledger.jsonl").read_bytes()
    federation.start(B, wait=False, LD_PRELOAD=str(wrong_clock), CLOCK_OFF_S=str(WRONG_S))
    running = federation.run_in_background(study)
    said = federation.home(B) / "node" / "supernode.log"
    sentence = rf"the clock here is ({WRONG_S}|{WRONG_S + 1}) s ahead of the coordinator's; set it"
    wait_for(lambda: re.search(sentence, said.read_text()), "the site is told", 120)
    # The other site has answered; the coordinator reads whom the round waits for, and what can be done.
    wait_for(lambda: f"for {B} (not here)" in federation.server_log(study), "the coordinator is told", 180)
    assert federation.released(study) == 0
    assert (federation.home(B) / "ledger.jsonl").read_bytes() == before
    # Its clock is set: it comes in time for the very round.
    federation.stop(B)
    federation.start(B)
    wait_for(lambda: federation.released(study) >= 1, "round 1 is over", 180)
    first = federation.record(study, 1)
    assert (sorted(first["replied"]), first["refused"], first["absent"]) == (sorted(SITES), {}, [])

    # In round 2 it never comes; once it is revoked, the round waits for it no more.
    federation.stop(B)
    call("server", "revoke", B, "--home", federation.server)
    assert running.wait(timeout=300) == 0  # half the deadline
    second = federation.record(study, 2)
    assert (list(second["replied"]), second["refused"]) == ([A], {})
    assert [x["round"] for x in federation.lines(A, study, "settle")] == [1, 2]
    if line.nginx:
        wait_for(
            lambda: knock(federation, "/v1/fleet/activate-node", B) == "403", "nginx knows it no more", 20
        )
