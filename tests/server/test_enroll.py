"""Enrolment, revocation and re-issue at the coordinator: who gets in, and who never again."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509

from polyclinic.client.enrolment import init
from polyclinic.common.certificates import (
    PrivateKey,
    certificate_pem,
    certificate_sha256,
    load_certificate,
    load_key,
    new_key,
    sign_client,
)
from polyclinic.common.kit import Kit, Request
from polyclinic.common.node_keys import node_key_header, node_key_text, node_signature, parse_node_key
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.server.provisioning import enroll, enrolled, reissue, revoke, sites_facts
from polyclinic.server.register import read_register, write_register
from tests.client.ledger_home import in_child, kill_at_flush, wait_for
from tests.server.joining import Joining, copied, snapshot


def set_expiry(made: Joining, site: str, **ago: float) -> None:
    register = read_register(made.home)
    assert register is not None
    register.sites[site].invitation.expires = datetime.now(UTC) - timedelta(**ago)
    write_register(made.home, register)


def prove(request: Request, node: PrivateKey, secret: str) -> str:
    """Sign and prove a request again, as somebody could who holds the node key and the secret."""
    signature = node_signature(node, request.signed_bytes())
    request = request.model_copy(update={"node_signature": signature})
    return request.model_copy(update={"proof": request.proof_with(secret)}).model_dump_json()


# -- requests that are refused --------------------------------------------------------------------


def swap_node_key(values: dict[str, Any]) -> None:
    values["node_key"] = node_key_text(new_key().public_key())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (swap_node_key, Refusal, "request-not-proven"),
        (lambda v: v.update(site="b"), Refusal, "request-not-proven"),
        (lambda v: v.update(certificate_request="x"), Refusal, "request-not-proven"),
        (lambda v: v.update(node_signature=""), Refusal, "request-not-proven"),
        (lambda v: v.update(proof=""), Refusal, "request-not-proven"),
        (lambda v: v.update(proof="0" * 64), Refusal, "request-not-proven"),
        (lambda v: v.update(site="c"), BadInput, "c: no such site"),
        (lambda v: v.update(host="evil.example.org"), BadInput, "made from a kit for evil"),
        (lambda v: v.update(port=1), BadInput, "made from a kit for gw.example.org:1"),
        (lambda v: v.update(ca_sha256="0" * 64), BadInput, "another federation's kit"),
    ],
)
def test_a_tampered_request_is_refused_and_burns_nothing(
    made: Joining, change: Callable[[dict[str, Any]], None], error: type[Exception], words: str
) -> None:
    made.init("a")
    good, before = made.request("a").read_text(), (made.home / "sites.json").read_bytes()
    made.change_request("a", change)
    with pytest.raises(error, match=words):
        made.enroll("a")
    assert (made.home / "sites.json").read_bytes() == before
    assert made.admitted() == {}
    made.request("a").write_text(good)
    made.enroll("a")
    assert made.admitted().keys() == {"a"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "not a JSON file"),
        (b"[" * 100_000, "not a JSON file"),
        (b"[]", "no enrolment request of this release"),
        (b'{"site": "a"}', "`host` is missing"),
        (b'{"site": "a", "extra": 1}', "no enrolment request of this release"),
        (b" " * (1 << 21), "too large"),
    ],
)
def test_a_file_that_is_no_request_is_named(made: Joining, content: bytes, words: str) -> None:
    path = made.root / "file.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        enroll(made.home, path)
    with pytest.raises(BadInput, match="no such file"):
        enroll(made.home, made.root / "gone.json")


def test_a_secret_opens_once_and_only_in_time(made: Joining) -> None:
    made.init("a")
    made.enroll("a")
    # The same kit in the hands of a second person: other keys, the same secret.
    init(made.site("thief"), made.kit("a"))
    with pytest.raises(Refusal, match="secret-used"):
        enroll(made.home, made.site("thief") / "request-a.json")
    made.init("b")
    set_expiry(made, "b", seconds=1)
    with pytest.raises(Refusal, match="kit-expired"):
        made.enroll("b")
    assert made.admitted().keys() == {"a"}
    assert made.provision("b", reference=None)["left"]["b"].startswith("its kit has expired")
    # A new kit: the old request does not fit it, a new one does.
    reissue(made.home, "b")
    with pytest.raises(Refusal, match="request-not-proven"):
        made.enroll("b")
    made.join("b")


def test_another_sites_node_key_cannot_be_taken(made: Joining) -> None:
    """With a good secret of its own, b asks for a's node key, and for a's TLS key."""
    made.join("a")
    made.init("b")
    secret = json.loads((made.kit("b") / "kit.json").read_text())["secret"]
    request = Request.model_validate_json(made.request("b").read_text())
    stolen = node_key_text(load_key(made.site("a") / "keys" / "node.key").public_key())
    mine = load_key(made.site("b") / "keys" / "next" / "node.key")

    def ask(signer: Any, **changes: Any) -> None:
        made.request("b").write_text(prove(request.model_copy(update=changes), signer, secret))
        made.enroll("b")

    with pytest.raises(Refusal, match="the node key did not sign it"):
        ask(mine, node_key=stolen)
    with pytest.raises(Refusal, match="key-known"):  # even if it had been copied
        ask(load_key(made.site("a") / "keys" / "node.key"), node_key=stolen)
    assert not (made.site("a") / "keys" / "next" / "request.json").exists()  # none is kept once enrolled
    assert made.admitted().keys() == {"a"}


# -- revoke and re-issue --------------------------------------------------------------------------


def test_revoke_puts_out_at_once_and_the_old_keys_never_come_back(made: Joining) -> None:
    for name in ("a", "b"):
        made.join(name)
    old = made.admitted()["a"]
    revoke(made.home, "a")
    revoke(made.home, "a")  # a killed one is run again
    assert made.admitted().keys() == {"b"}
    assert enrolled(made.home).keys() == {"b"}
    assert made.provision("a", reference=None)["left"]["a"].startswith("revoked")
    register = read_register(made.home)
    assert register is not None
    assert register.sites["a"].state == "revoked"
    # Back by a new kit only; its old node key is refused even with the new secret.
    reissue(made.home, "a")
    assert made.admitted().keys() == {"b"}
    made.init("a")
    kit = Kit.model_validate_json((made.kit("a") / "kit.json").read_text())
    request = Request.model_validate_json(made.request("a").read_text())
    node = load_key(made.site("a") / "keys" / "node.key")
    again = request.model_copy(update={"node_key": node_key_text(node.public_key())})
    assert kit.secret is not None
    path = made.root / "again.json"
    path.write_text(prove(again, node, kit.secret))
    with pytest.raises(Refusal, match="key-known"):
        enroll(made.home, path)
    made.enroll("a")
    made.install("a")
    assert made.admitted()["a"]["node_key"] != old["node_key"]
    with pytest.raises(BadInput, match="x: no such site"):
        revoke(made.home, "x")


def test_revoking_an_invited_site_withdraws_its_secret(made: Joining) -> None:
    made.init("a")
    revoke(made.home, "a")
    with pytest.raises(Refusal, match="secret-used"):
        made.enroll("a")
    assert made.admitted() == {}


def test_reissue_keeps_the_old_certificate_until_the_new_request_is_enrolled(made: Joining) -> None:
    made.join("a")
    old, files = made.admitted()["a"], snapshot(made.site("a") / "keys")
    reissue(made.home, "a")
    assert made.admitted()["a"] == old
    made.init("a")
    assert files.items() <= snapshot(made.site("a") / "keys").items()
    made.enroll("a")
    new = made.admitted()["a"]
    assert new["certificate_sha256"] != old["certificate_sha256"]
    assert new["node_key"] != old["node_key"]
    assert made.install("a")["restart"]
    key = load_key(made.site("a") / "keys" / "node.key").public_key()
    assert new["node_key"] == node_key_header(key)
    assert new["certificate_sha256"] == certificate_sha256(
        load_certificate(made.site("a") / "keys" / "tls.crt")
    )


def test_a_certificate_that_ends_soon_is_warned_of(made: Joining) -> None:
    made.join("a")
    register = read_register(made.home)
    assert register is not None
    assert register.sites["a"].enrolled is not None
    pki, mine = made.home / "pki", register.sites["a"].enrolled
    key = load_key(made.site("a") / "keys" / "tls.key").public_key()
    node = parse_node_key(mine.node_key, "register")
    soon = sign_client(load_certificate(pki / "ca.crt"), load_key(pki / "ca.key"), key, "a", node, days=20)
    mine.certificate = certificate_pem(soon).decode()
    write_register(made.home, register)
    facts = sites_facts(made.home)
    assert [row["days_left"] for row in facts["sites"] if row["site"] == "a"] == [20.0]
    (warning,) = facts["warnings"]
    assert "a: its certificate ends in 20 days" in warning


def test_the_list_of_sites_brings_back_what_the_gateway_lost(made: Joining) -> None:
    made.join("a")
    path = made.home / "gateway" / "sites.json"
    good, inode = path.read_bytes(), path.stat().st_ino
    sites_facts(made.home)
    assert path.stat().st_ino == inode  # nothing to do: a gateway need not read it again
    for broken in (b"", b"{", None):
        if broken is None:
            path.unlink()
        else:
            path.write_bytes(broken)
        sites_facts(made.home)
        assert path.read_bytes() == good


# -- kills ----------------------------------------------------------------------------------------


def test_a_killed_enrolment_is_simply_run_again(made: Joining) -> None:
    """Killed at every flush to disk: the secret is burned only together with the registration."""
    made.init("a")
    secret = json.loads((made.kit("a") / "kit.json").read_text())["secret"]
    for instant in range(20):
        here = copied(made, made.root.parent / f"kill-{instant}")

        def work(here: Joining = here, instant: int = instant) -> None:
            kill_at_flush(instant)
            here.enroll("a")

        killed = wait_for(in_child(work)) != 0
        register = read_register(here.home)
        assert register is not None
        site = register.sites["a"]
        assert (site.enrolled is None) == (site.invitation.secret == secret)
        first = site.enrolled.certificate_sha256 if site.enrolled else None
        here.enroll("a")
        certificate = x509.load_pem_x509_certificate(
            json.loads(here.answer("a").read_text())["certificate"].encode()
        )
        assert first in (None, certificate_sha256(certificate))
        assert here.admitted()["a"]["certificate_sha256"] == certificate_sha256(certificate)
        here.install("a")
        if not killed:
            assert instant >= 6  # register, gateway's list, answer: a file and a folder each
            return
    pytest.fail("the enrolment never ended")
