"""Provisioning: CA, certificates and kits; what a person gets wrong; what survives a kill."""

import json
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.cli import main as client
from polyclinic.common.certificates import (
    certificate_pem,
    certificate_sha256,
    covers,
    load_certificate,
    load_key,
    sign_server,
)
from polyclinic.common.kit import open_kit
from polyclinic.common.node_keys import node_key_header, node_key_text
from polyclinic.common.refusals import BadInput
from polyclinic.server.cli import main as server
from polyclinic.server.provisioning import enrolled, provision, sites_facts
from polyclinic.server.register import sites_of_run
from tests.client.ledger_home import in_child, kill_at_flush, wait_for
from tests.server.joining import Joining, copied, snapshot

# -- the whole way --------------------------------------------------------------------------------


def test_from_kit_to_certificate_by_the_commands_people_type(
    made: Joining, capsys: pytest.CaptureFixture[str]
) -> None:
    home, site = ["--home", str(made.home)], ["--home", str(made.site("a"))]
    assert client(["init", f"{made.kit('a')}.zip", *site]) == 0
    asked = capsys.readouterr().out
    assert server(["enroll", str(made.request("a")), *home]) == 0
    signed = capsys.readouterr().out
    assert client(["certificate", str(made.answer("a")), *site]) == 0
    installed = capsys.readouterr().out
    # Both sides print the same to compare by telephone.
    prints = re.compile(r"(node key|TLS key|certificate|federation's CA) +((?:[0-9A-F]{4} ?){16})")
    ours, theirs = dict(prints.findall(signed)), dict(prints.findall(installed))
    assert len(ours) == 4
    assert ours == theirs
    assert dict(prints.findall(asked)).items() <= ours.items()
    # What the gateway and the SuperLink are told is what this site's node will show.
    key = load_key(made.site("a") / "keys" / "node.key").public_key()
    certificate = load_certificate(made.site("a") / "keys" / "tls.crt")
    assert made.admitted() == {
        "a": {"certificate_sha256": certificate_sha256(certificate), "node_key": node_key_header(key)}
    }
    assert enrolled(made.home) == {"a": node_key_text(key)}
    assert server(["sites", *home]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^a +enrolled +used +365 ", table, re.MULTILINE)
    assert re.search(r"^b +invited +open +- ", table, re.MULTILINE)


def test_no_private_key_and_no_secret_travels(made: Joining) -> None:
    made.init("a")
    secret = json.loads((made.kit("a") / "kit.json").read_text())["secret"]
    request = made.request("a").read_text()
    assert secret not in request
    assert bytes.fromhex(secret) not in request.encode()
    assert "PRIVATE" not in request
    made.enroll("a")
    for path in [made.answer("a"), *(x for x in made.kit("a").rglob("*") if x.is_file())]:
        assert b"PRIVATE KEY" not in path.read_bytes(), path
    # Burned: neither side keeps it.
    assert secret not in (made.home / "sites.json").read_text()
    made.install("a")
    assert secret not in (made.site("a") / "kit" / "kit.json").read_text()


def test_a_kit_holds_its_closed_list_of_names_and_no_code(made: Joining) -> None:
    with open_kit(made.kit("a")) as folder, open_kit(Path(f"{made.kit('a')}.zip")) as zipped:
        assert folder.names == zipped.names
        assert all(folder.read(name) == zipped.read(name) for name in folder.names if "vae" not in name)
        vae = {name.split("/")[2] for name in folder.names if name.startswith("base/vae-")}
        rest = {name for name in folder.names if not name.startswith("base/vae-")}
    assert vae == {path.name for path in made.vae.iterdir()}
    pages = {"INSTRUCTIONS.html", "INSTRUCTIONS.txt"}
    assert rest == {"kit.json", "ca.crt", "study.json", "base/base.json"} | pages
    for page in pages:
        text = (made.kit("a") / page).read_text()
        for word in ("gw.example.org", "8443", "outbound only; nothing inbound", "telemetry"):
            assert word in text
        assert not re.search(r"(src|href)=|<script", text)  # it calls nobody


def test_instructions_escape_what_a_person_typed(made: Joining) -> None:
    made.provision("a", contact="<b>Ann & Co</b>, +1 555")
    assert "&lt;b&gt;Ann &amp; Co" in (made.kit("a") / "INSTRUCTIONS.html").read_text()
    assert "<b>Ann & Co</b>, +1 555" in (made.kit("a") / "INSTRUCTIONS.txt").read_text()


def test_secrets_and_keys_are_readable_by_their_owner_alone(made: Joining) -> None:
    made.join("a")
    home, site = made.home, made.site("a")
    secret = [home / "sites.json", home / "kits" / "a.zip", made.kit("b") / "kit.json", site / "policy.toml"]
    secret += [*(home / "pki").glob("*.key"), *(site / "keys").glob("*.key"), site / "kit" / "kit.json"]
    assert len(secret) == 11
    for path in secret:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for folder in (home / "pki", home / "kits", made.kit("b"), site, site / "keys"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def test_a_zip_on_its_way_is_whole_or_not_there(made: Joining) -> None:
    with zipfile.ZipFile(f"{made.kit('a')}.zip") as archive:
        assert archive.testzip() is None


# -- provision again ------------------------------------------------------------------------------


def test_more_sites_later_change_nothing_that_is_there(made: Joining) -> None:
    made.join("a")
    pki, site = snapshot(made.home / "pki"), snapshot(made.site("a"))
    register = json.loads((made.home / "sites.json").read_text())
    secret = json.loads((made.kit("b") / "kit.json").read_text())["secret"]
    # The study was resolved here before, so neither --reference nor --host is needed again.
    facts = made.provision("a", "b", "c", host=None, reference=None)
    assert snapshot(made.home / "pki") == pki
    after = json.loads((made.home / "sites.json").read_text())
    assert after["sites"]["a"] == register["sites"]["a"]
    assert facts["kits"].keys() == {"a", "b", "c"}
    assert json.loads((made.kit("b") / "kit.json").read_text())["secret"] == secret
    # The enrolled site's kit has no secret; taking it in changes nothing.
    assert json.loads((made.kit("a") / "kit.json").read_text())["secret"] is None
    assert made.init("a")["request"] is None
    assert snapshot(made.site("a")) == site
    for name in ("b", "c"):
        made.join(name)
    assert made.admitted().keys() == {"a", "b", "c"}
    assert sites_of_run(made.home, facts["run"]) == ["a", "b", "c"]


def test_another_host_name_is_added_to_the_certificate(made: Joining) -> None:
    key = (made.home / "pki" / "gateway.key").read_bytes()
    made.join("a")
    made.provision("b", host="new.example.org")
    gateway = load_certificate(made.home / "pki" / "gateway.crt")
    assert covers(gateway, ["new.example.org", "gw.example.org", "127.0.0.1"])
    assert (made.home / "pki" / "gateway.key").read_bytes() == key
    assert json.loads((made.kit("b") / "kit.json").read_text())["host"] == "new.example.org"


def test_a_server_certificate_that_ends_soon_is_renewed_with_its_names(made: Joining) -> None:
    pki = made.home / "pki"
    ca, ca_key = load_certificate(pki / "ca.crt"), load_key(pki / "ca.key")
    key = load_key(pki / "gateway.key").public_key()
    names = ["gw.example.org", "127.0.0.1", "old.example.org"]
    (pki / "gateway.crt").write_bytes(certificate_pem(sign_server(ca, ca_key, key, names, days=20)))
    assert any("gateway.crt ends in" in warning for warning in sites_facts(made.home)["warnings"])
    made.provision("a", host=None, reference=None)
    assert covers(load_certificate(pki / "gateway.crt"), names)
    assert sites_facts(made.home)["warnings"] == []


def test_another_study_reaches_an_enrolled_site_without_new_keys(made: Joining) -> None:
    made.join("a")
    keys = snapshot(made.site("a") / "keys")
    first = (made.site("a") / "kit" / "study.json").read_bytes()
    facts = made.provision("a", study=made.study("second", seed=5))
    assert made.init("a")["study"] == "second"
    assert snapshot(made.site("a") / "keys") == keys
    assert (made.site("a") / "kit" / "study.json").read_bytes() != first
    assert enrolled(made.home, facts["run"]).keys() == {"a"}
    # And the first study again: its kit is written anew, not the second's left lying.
    made.provision("a", reference=None)
    assert (made.kit("a") / "study.json").read_bytes() == first


def test_a_lost_ca_is_never_made_anew(made: Joining) -> None:
    made.join("a")
    for name, words in (("ca.crt", "no such file"), ("ca.key", "no such file")):
        path = made.home / "pki" / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(BadInput, match=words):
            made.provision("c", reference=None)
        assert not path.exists()
        path.write_bytes(content)
    other = copied(made, made.root / "other")
    (other.home / "sites.json").unlink()
    for path in (other.home / "pki").iterdir():
        path.unlink()
    other.provision("x", reference=None)
    for name in ("ca.crt", "ca.key"):
        (made.home / "pki" / name).write_bytes((other.home / "pki" / name).read_bytes())
    with pytest.raises(BadInput, match="not the CA of this federation's kits"):
        made.provision("c", reference=None)


# -- what a person gets wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "changes", "words"),
    [
        ((), {}, "--sites is empty"),
        (("A",), {}, "--sites 'A'"),
        (("../x",), {}, "--sites '../x'"),
        (("a",), {"host": "https://gw"}, "--host 'https://gw'"),
        (("a",), {"host": "gw:8443"}, "--host 'gw:8443'"),
        (("a",), {"host": "1.2.3"}, "--host '1.2.3'"),
        (("a",), {"host": "gw,,x"}, "--host ''"),
        (("a",), {"port": 70000}, "--port 70000"),
        (("a",), {"expires_days": 0}, "--expires-days 0"),
    ],
)
def test_provision_names_the_mistake(
    made: Joining, sites: tuple[str, ...], changes: dict[str, Any], words: str
) -> None:
    before = snapshot(made.home)
    with pytest.raises(BadInput, match=re.escape(words)):
        made.provision(*sites, **changes)
    assert snapshot(made.home) == before


def test_provision_says_what_is_missing(made: Joining, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--host is missing"):
        provision(tmp_path / "new", made.study(), ["a"], reference=made.root / "reference")
    with pytest.raises(BadInput, match="polyclinic-simulate reference"):
        provision(tmp_path / "new", "phantom-demo", ["a"], host="gw")
    with pytest.raises(BadInput, match="nothing is provisioned"):
        sites_facts(tmp_path / "new")
    facts = provision(tmp_path / "one", made.study(), ["a"], host="::1", reference=made.root / "reference")
    assert facts["warnings"] == ["1 sites have a kit; federation.min_sites = 2: provision more"]


def test_a_vae_that_a_kit_may_not_carry_is_refused_here(made: Joining, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    for path in made.vae.iterdir():
        (vae / path.name).write_bytes(path.read_bytes())
    (vae / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(BadInput, match=r"modeling\.py' does not belong in a kit"):
        made.provision("c", study=made.study("odd", vae=vae))
    assert not made.kit("c").exists()


# -- kills ---


@pytest.mark.parametrize("instant", [0, 2, 5, 9, 13, 16, 20, 26])
def test_a_killed_first_provision_is_simply_run_again(
    provisioned: Joining, tmp_path: Path, instant: int
) -> None:
    here = copied(provisioned, tmp_path / "j")
    made_before = [*(here.home / "pki").iterdir(), *(here.home / "kits").glob("*.zip")]
    for path in (here.home / "sites.json", here.home / "gateway" / "sites.json", *made_before):
        path.unlink()

    def work() -> None:
        kill_at_flush(instant)
        here.provision("a", "b", reference=None)

    assert wait_for(in_child(work)) != 0
    ca = here.home / "pki" / "ca.crt"
    before = ca.read_bytes() if ca.exists() else None
    here.provision("a", "b", reference=None)
    assert before in (None, ca.read_bytes())
    for name in ("a", "b"):
        here.join(name)
    assert here.admitted().keys() == {"a", "b"}
