"""A hospital takes a kit in, gets its certificate, and renews it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.cli import main as client
from polyclinic.client.enrolment import enrolment_facts, expiry_warning, init, install_certificate
from polyclinic.client.ledger_books import create_ledger
from polyclinic.client.ledger_chain import read_lines
from polyclinic.client.policy import load_policy
from polyclinic.common.certificates import (
    certificate_key,
    certificate_pem,
    load_certificate,
    load_key,
    sign_client,
)
from polyclinic.common.kit import Answer, Kit
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.server.provisioning import reissue
from tests.server.joining import Joining, check_keys


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- init -----------------------------------------------------------------------------------------


def test_init_again_with_the_same_kit_writes_the_same_request(made: Joining) -> None:
    made.init("a")
    keys = made.site("a") / "keys" / "next"
    before = {path.name: path.read_bytes() for path in keys.iterdir()}
    request = made.request("a").read_bytes()
    made.request("a").unlink()
    made.init("a", Path(f"{made.kit('a')}.zip"))
    assert made.request("a").read_bytes() == request
    assert {path.name: path.read_bytes() for path in keys.iterdir()} == before
    assert enrolment_facts(made.site("a"))["state"] == "waiting for its certificate"
    assert expiry_warning(made.site("a")) is None


def test_the_policy_waits_for_a_person(made: Joining) -> None:
    made.init("a")
    path = made.site("a") / "policy.toml"
    with pytest.raises(BadInput, match=r"policy\.toml: field `declared_patients` is missing"):
        load_policy(made.site("a"))
    path.write_text(path.read_text().replace("# declared_patients = ", "declared_patients = 200"))
    policy = load_policy(made.site("a"))
    assert policy.declared_patients == 200
    assert not policy.allow_not_private
    assert not policy.allow_test_randomness
    # Every limit is shown with its default: taking all the # away changes nothing.
    lines = [line.removeprefix("# ") for line in path.read_text().splitlines()]
    path.write_text("\n".join(x for x in lines if " = " in x and not x.endswith("= ")))
    assert load_policy(made.site("a")) == policy
    made.init("a")
    assert load_policy(made.site("a")) == policy  # what a person wrote is never touched


def test_a_real_site_gets_a_real_ledger(made: Joining) -> None:
    made.init("a")
    (line,) = read_lines(made.site("a"))
    assert (line["kind"], line["site"], line["simulated"]) == ("open", "a", False)
    made.site("b").mkdir()
    create_ledger(made.site("b"), "b", simulated=True)
    with pytest.raises(BadInput, match="the ledger of simulated site b, not of b"):
        made.init("b")
    lost = made.root / "lost"
    (lost / "approvals").mkdir(parents=True)
    with pytest.raises(Refusal, match="ledger-missing"):
        init(lost, made.kit("b"))


def test_a_home_belongs_to_one_site_and_one_federation(made: Joining, provisioned: Joining) -> None:
    made.join("a")
    with pytest.raises(BadInput, match="a kit for site b, but"):
        made.init("a", made.kit("b"))
    with pytest.raises(BadInput, match="keys and certificate from this kit already"):
        made.init("a")
    other = Joining(made.root / "elsewhere", made.vae)
    other.root.mkdir()
    other.provision("a", reference=made.root / "reference")
    with pytest.raises(BadInput, match="not a kit of the federation"):
        made.init("a", other.kit("a"))
    check_keys(made)


def test_an_expired_kit_and_one_without_a_secret_open_nothing(made: Joining) -> None:
    edit(made.kit("a") / "kit.json", expires=(datetime.now(UTC) - timedelta(minutes=1)).isoformat())
    with pytest.raises(Refusal, match="kit-expired"):
        made.init("a")
    edit(made.kit("a") / "kit.json", expires=None, secret=None)
    with pytest.raises(BadInput, match=r"no secret, and .* is not enrolled"):
        made.init("a")
    assert not made.site("a").exists()


def test_a_request_says_nothing_that_is_not_needed(made: Joining) -> None:
    made.init("a")
    kit = Kit.model_validate_json((made.kit("a") / "kit.json").read_text())
    request = json.loads(made.request("a").read_text())
    assert request.keys() == {
        *("version", "site", "host", "port", "ca_sha256"),
        *("node_key", "certificate_request", "node_signature", "proof"),
    }
    assert (request["site"], request["host"], request["port"]) == (kit.site, kit.host, kit.port)


# -- the answer -----------------------------------------------------------------------------------


def test_only_the_answer_to_this_sites_request_is_installed(made: Joining, tmp_path: Path) -> None:
    for name in ("a", "b"):
        made.init(name)
        made.enroll(name)
    good = made.answer("a").read_text()
    answer, other = Answer.model_validate_json(good), Answer.model_validate_json(made.answer("b").read_text())
    pki = made.home / "pki"
    ca, ca_key = load_certificate(pki / "ca.crt"), load_key(pki / "ca.key")
    tls = load_key(made.site("a") / "keys" / "next" / "tls.key").public_key()
    node = load_key(made.site("b") / "keys" / "next" / "node.key").public_key()
    bound_wrong = certificate_pem(sign_client(ca, ca_key, tls, "a", node)).decode()
    forged = certificate_pem(sign_client(ca, load_key(pki / "link.key"), tls, "a", node)).decode()

    def changed(**values: str) -> str:
        return answer.model_copy(update=values).model_dump_json()

    for text, error, words in (
        (made.answer("b").read_text(), BadInput, "it is for site b"),
        (made.request("a").read_text(), BadInput, "no answer to a request of this release"),
        ("hello", BadInput, "not a JSON file"),
        (changed(certificate="x"), BadInput, "not a certificate"),
        (changed(certificate=other.certificate), Refusal, "b's, not a's"),
        (changed(ca_sha256="0" * 64), Refusal, "another federation's"),
        (changed(certificate=bound_wrong), Refusal, "another node key"),
        (changed(certificate=forged), Refusal, "not signed by this"),
    ):
        made.answer("a").write_text(text)
        with pytest.raises(error, match=words):
            made.install("a")
        assert not (made.site("a") / "keys" / "tls.crt").exists()
    made.answer("a").write_text(good)
    assert not made.install("a")["restart"]
    check_keys(made)
    assert not made.install("a")["restart"]  # once more does no harm
    check_keys(made)
    with pytest.raises(BadInput, match="run `polyclinic-client init KIT` first"):
        install_certificate(tmp_path / "empty", made.answer("a"))


def test_exit_codes_and_one_sentence(made: Joining, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(made.site("a"))]
    assert client(["init", str(made.root / "gone"), *home]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    edit(made.kit("a") / "kit.json", expires="2020-01-01T00:00:00Z")
    assert client(["init", str(made.kit("a")), *home]) == 3
    assert "[1032 kit-expired]" in capsys.readouterr().err


# -- new keys -------------------------------------------------------------------------------------


def test_a_node_keeps_its_old_keys_until_the_new_certificate_is_there(made: Joining) -> None:
    made.join("a")
    keys = made.site("a") / "keys"
    old = {name: (keys / name).read_bytes() for name in ("node.key", "node.pub", "tls.key", "tls.crt")}
    ledger = (made.site("a") / "ledger.jsonl").read_bytes()
    reissue(made.home, "a")
    first = made.init("a")["node_key"]
    assert {name: (keys / name).read_bytes() for name in old} == old
    # That kit is lost and another one comes: the keys made from the first are never offered.
    reissue(made.home, "a")
    assert made.init("a")["node_key"] != first
    made.enroll("a")
    assert {name: (keys / name).read_bytes() for name in old} == old
    assert made.install("a")["restart"]
    assert all((keys / name).read_bytes() != content for name, content in old.items())
    check_keys(made)
    assert (made.site("a") / "ledger.jsonl").read_bytes() == ledger


def test_a_certificate_that_ends_soon_is_warned_of(made: Joining) -> None:
    made.join("a")
    assert expiry_warning(made.site("a")) is None
    assert enrolment_facts(made.site("a"))["days_left"] == pytest.approx(365, abs=0.1)
    pki, path = made.home / "pki", made.site("a") / "keys" / "tls.crt"
    node = load_key(made.site("a") / "keys" / "node.key").public_key()
    key = certificate_key(load_certificate(path))
    for days, words in ((20, "ends in 20 days"), (0, "has ended")):
        soon = sign_client(load_certificate(pki / "ca.crt"), load_key(pki / "ca.key"), key, "a", node, days)
        path.write_bytes(certificate_pem(soon))
        warning = expiry_warning(made.site("a"))
        assert warning is not None
        assert words in warning
        assert "reissue" in warning
