"""The short form: a study from kits to a report, who is refused at the door, an edited study, one kill."""

from __future__ import annotations

import json
import os
import signal
import ssl
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from polyclinic.client.ledger_view import verify
from tests.e2e.federation import SITES, Federation, at_once, call, wait_for


def ask(federation: Federation, path: str, certificate: str = "", key: str = "") -> str:
    """Knock at the gateway: the HTTP status, or `refused` where TLS ends it."""
    context = ssl.create_default_context(cafile=federation.server / "pki" / "ca.crt")
    if certificate:
        keys = federation.home(certificate) / "keys"
        context.load_cert_chain(keys / "tls.crt", keys / "tls.key")
    url = f"https://localhost:{federation.port}{path}"
    request = urllib.request.Request(url, data=b"", headers={"flwr-public-key": key} if key else {})
    try:
        with urllib.request.urlopen(request, context=context, timeout=20) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError:  # with TLS 1.3 the refusal of a certificate comes as a closed connection
        return "refused"


def door_is_closed(federation: Federation) -> None:
    """No certificate, no key, another key, another API: none of them reaches the SuperLink."""
    log = federation.server / "node" / "gateway-access.log"
    assert ask(federation, "/v1/fleet/activate-node") == "refused"
    assert ask(federation, "/v1/fleet/activate-node", SITES[0]) == "403"
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert ask(federation, "/v1/fleet/activate-node", SITES[0], pem.hex()) == "403"
    for path in ("/v1/control/list-runs", "/v1/runtime/pull-messages", "/v1/fleet/../control/list-runs"):
        assert ask(federation, path) == "refused"
        assert ask(federation, path, SITES[0]) == "403"
    said = log.read_text()
    assert "/v1/control/list-runs" in said
    assert SITES[0] in said


def coordinator_is_up(federation: Federation) -> None:
    federation.start("server")
    call("server", "health", "--home", federation.server)
    door_is_closed(federation)


def study_is_approved(federation: Federation, study: Path) -> None:
    resolved = federation.resolved(study)
    for done in at_once(lambda site: federation.approve(site, resolved), SITES):
        assert "epsilon" in done.stdout
        assert "leaves" in done.stdout


def study_runs_over_a_killed_client(federation: Federation, study: Path) -> None:
    """Three rounds; one site's ClientApp is killed in the second, and no budget is spent twice."""
    running = federation.run_in_background(study)
    victim = SITES[0]

    def in_round_two() -> bool:
        reserved = federation.ledger(victim, "reserve")
        return bool(reserved) and reserved[-1]["round"] == 2 and bool(federation.task(victim))

    wait_for(in_round_two, "round 2 is being trained", 150)
    os.kill(federation.task(victim), signal.SIGKILL)
    assert running.wait(timeout=400) == 0
    run_dir = federation.run_dir(study)
    assert (run_dir / "report.html").stat().st_size > 10_000
    for number in (1, 2, 3):
        record = federation.record(study, number)
        assert sorted(record["replied"]) == sorted(SITES), record

    def books_are_right(site: str) -> None:
        assert [line["round"] for line in federation.ledger(site, "reserve")] == [1, 2, 3]
        assert [line["round"] for line in federation.ledger(site, "settle")] == [1, 2, 3]
        assert verify(federation.home(site), [])["lines"] >= 8
        call("client", "journal", "verify", "--home", federation.home(site))
        # What was reported is what the site's own ledger says.
        shown = json.loads(call("client", "ledger", "show", "--json", "--home", federation.home(site)).stdout)
        assert federation.record(study, 3)["replied"][site]["epsilon"] == pytest.approx(
            shown["studies"][0]["epsilon"]
        )

    at_once(books_are_right, SITES)
    status = json.loads(call("server", "status", "clean", "--json", "--home", federation.server).stdout)
    assert status["progress"]["phase"] == "finished"


def edited_study_is_refused(federation: Federation) -> None:
    """The coordinator changes epsilon after approval: named at once, and refused by the sites as well."""
    before = {site: (federation.home(site) / "ledger.jsonl").read_bytes() for site in SITES}
    study = federation.write_study("clean", epsilon=9.0)
    said = federation.run(study, code=2).stderr
    assert "privacy.epsilon" in said
    assert "8.0" in said
    assert "9.0" in said
    assert {site: (federation.home(site) / "ledger.jsonl").read_bytes() for site in SITES} == before


@pytest.mark.timeout(900)
def test_a_study_from_kits_to_a_report(federation: Federation) -> None:
    study = federation.write_study("clean")
    with ThreadPoolExecutor() as people:  # the coordinator's engineer, and the hospitals'
        parts = [
            people.submit(coordinator_is_up, federation),
            people.submit(study_is_approved, federation, study),
        ]
        for part in parts:
            part.result()
    at_once(federation.start, SITES)
    study_runs_over_a_killed_client(federation, study)
    edited_study_is_refused(federation)
