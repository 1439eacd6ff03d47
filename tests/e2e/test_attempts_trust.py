"""Attempts on trust: strangers at the door, code and settings from a coordinator, a site that was put out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.client.journal_view import read_journal
from polyclinic.client.ledger_view import verify
from polyclinic.common.certificates import (
    certificate_pem,
    certificate_sha256,
    key_pem,
    key_sha256,
    make_ca,
    new_key,
    sign_client,
)
from polyclinic.common.cli import QUIET
from polyclinic.common.node_keys import node_key_private
from polyclinic.common.refusals import REASONS, BadInput
from polyclinic.server.node import APP, flwr, launch
from polyclinic.server.progress_file import read_progress
from tests.e2e.federation import SITES, Federation, at_once, call, wait_for
from tests.e2e.test_short import ask as knock
from tests.e2e.trust import (
    FLOOR,
    HAND,
    MARK,
    SHADOW,
    A,
    B,
    Hand,
    Standing,
    ended,
    everything_drifted,
    other_code,
    speak,
    superlink_refuses,
    unguarded_coordinator,
    write_app,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def standing(federation: Federation) -> Iterator[Standing]:
    policy = federation.home(A) / "policy.toml"
    policy.write_text(policy.read_text() + f"min_sigma = {FLOOR}\n")
    code = federation.root / "coordinators-code"
    code.mkdir()
    shutil.copy(Path(__file__).with_name("hand.py"), code / "e2e_hand.py")
    first = federation.write_study("first", rounds=2, deadline=300)
    more: dict[str, object] = {"deadline": 300, "grace": 30, "federation": "quorum = 1"}
    second = federation.write_study("second", rounds=2, min_sites=1, **more)
    resolved = {}
    for study in (first, second):
        resolved[study] = federation.root / f"{study.stem}.json"
        shutil.copy(federation.resolved(study), resolved[study])
        at_once(partial(federation.approve, resolved=resolved[study]), SITES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(code))  # of the coordinator: no site looks there
        for who in ("server", *SITES):
            federation.start(who)
        yield Standing(federation, first, second, resolved)


# -- at the door ----------------------------------------------------------------------------------


def test_strangers_are_refused_at_the_door_and_named(standing: Standing) -> None:
    federation, port = standing.federation, standing.federation.port
    http = b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    anonymous = ssl.create_default_context(cafile=federation.server / "pki" / "ca.crt")
    for context in (None, anonymous):
        mine, said = speak(port, http, context)
        assert not said.startswith(b"HTTP/1.1 2"), said
        (line,) = wait_for(lambda: standing.log(event="refused", peer=f"127.0.0.1:{mine}"), "logged")  # noqa: B023
        assert line["outcome"].startswith("handshake: ")

    # A whole node of a stranger: the kit and the name of clinic-a, a node key of its own, another CA.
    home = federation.home("stranger")
    left = shutil.ignore_patterns("node", "cache", "approvals", "journal*", "replies")
    shutil.copytree(federation.home(A), home, ignore=left)
    node, tls, other_ca = new_key(), new_key(), new_key()
    forged = sign_client(make_ca(other_ca, "another CA"), other_ca, tls.public_key(), A, node.public_key())
    (home / "keys" / "node.key").write_bytes(node_key_private(node))
    (home / "keys" / "tls.key").write_bytes(key_pem(tls))
    (home / "keys" / "tls.crt").write_bytes(certificate_pem(forged))
    federation.start("stranger", wait=False)
    offered = {"event": "refused", "certificate_sha256": certificate_sha256(forged)}
    line = wait_for(lambda: standing.log(**offered), "another CA's certificate is refused")[0]
    assert line["outcome"].startswith("handshake: ")
    assert f"CN={A}" in line["subject"]

    # Now it has stolen clinic-a's certificate; its node key is still nobody's.
    for name in ("tls.key", "tls.crt"):
        shutil.copy(federation.home(A) / "keys" / name, home / "keys" / name)
    offered = {"event": "refused", "node_key_sha256": key_sha256(node.public_key())}
    line = wait_for(lambda: standing.log(**offered), "another node key is refused")[0]
    assert (line["site"], line["status"], line["outcome"]) == (A, 403, "wrong-node-key")
    federation.stop("stranger")
    assert "SuperNode ID" not in (home / "node" / "supernode.log").read_text()
    assert "refuses this site's certificate" in (home / "node" / "sidecar.log").read_text()
    # Nor does the SuperLink know it, should it ever come so far.
    assert superlink_refuses(federation, home / "keys" / "node.key")
    assert not standing.log(event="close", outcome="revoked")  # the real clinic-a noticed nothing
    assert len(federation.parts(A)) == 3


def test_other_apis_are_closed_at_the_public_port_and_a_run_goes_on(standing: Standing) -> None:
    federation = standing.federation
    running = federation.run_in_background(standing.first)
    wait_for(lambda: standing.rounds(B, "reserve", standing.first), "round 1 is trained", 120)
    paths = [f"/v1/control/{name}" for name in ("list-runs", "start-run", "stop-run", "register-node")]
    paths += [f"/v1/runtime/{name}" for name in ("acquire-task", "pull-task-input", "pull-messages")]
    paths += ["/health", "/", "/v1/fleet/../control/stop-run", "/v1/fleet/%2e%2e/control/stop-run"]
    for path in paths:
        assert knock(federation, path) == "refused"
        assert knock(federation, path, A) == "403", path
    # Flower's own command line: without a certificate, and with clinic-a's, through its own sidecar.
    app = write_app(federation, "from-outside", APP)
    argv = Path(f"/proc/{federation.parts(A)['sidecar']['pid']}/cmdline").read_bytes().split(b"\0")
    sidecar = argv[argv.index(b"--port") + 1].decode()
    local = federation.home(A) / "keys" / "local.crt"
    for where, ca in ((federation.port, federation.server / "pki" / "ca.crt"), (sidecar, local)):
        home = federation.root / f"flwr-{where}"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "it"\n[superlink.it]\naddress = "localhost:{where}"\n'
            f"root-certificates = {json.dumps(str(ca))}\n"
        )
        done = subprocess.run(
            [str(Path(sys.executable).parent / "flwr"), "run", str(app), "--format", "json"],
            env={**QUIET, "FLWR_HOME": str(home), "PATH": "", "HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        said = json.loads(done.stdout[done.stdout.index("{") :])
        assert not said["success"], said
        assert "Invalid Flower App" not in done.stdout, said
    asked = [x["path"] for x in standing.log(event="refused", site=A, status=403)]
    assert asked.count("/v1/control/start-run") > 1
    assert running.wait(timeout=500) == 0
    for number in (1, 2):
        record = federation.record(standing.first, number)
        assert sorted(record["replied"]) == [A, B]
        assert not record["refused"]
        assert not record["rejected"]
        assert not record["absent"]
    for site in SITES:
        assert standing.rounds(site, "reserve", standing.first) == [1, 2]
    # Nobody but the coordinator has started, or stopped, anything.
    assert len(json.loads((federation.run_dir(standing.first) / "attempts.json").read_text())) == 1
    assert len(flwr(federation.server, "list")["runs"]) == 1


# -- an edited study ------------------------------------------------------------------------------


def test_a_study_edited_after_approval_does_not_run(standing: Standing, random_vae: Path) -> None:
    federation, study = standing.federation, standing.second
    other_vae = random_vae.with_name("other-vae")
    shutil.copytree(random_vae, other_vae)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(other_vae)
    with torch.no_grad():
        next(vae.parameters()).mul_(1.01)
    vae.save_pretrained(other_vae)
    was, before = study.read_text(), standing.books()
    runs = len(flwr(federation.server, "list")["runs"])
    for old, new, *named in (
        ("epsilon = 8.0", "epsilon = 9.0", "privacy.epsilon: 8.0 -> 9.0"),
        ("rounds = 2", "rounds = 4", "training.rounds: 2 -> 4"),
        (str(random_vae), str(other_vae), "base_hash: ", "generator.vae: "),
        ("max_tokens = 16", "max_tokens = 12", "generator.max_tokens: 16 -> 12"),
        ("", "", 'code_version: "0.1.0" -> "0.0.1"'),
    ):
        study.write_text(was.replace(old, new) if old else was)
        more: dict[str, Any] = {} if old else {"PYTHONPATH": str(other_code(federation))}
        line = ("run", study, "--reference", federation.reference, "--home", federation.server)
        said = call("server", *line, code=2, **more).stderr
        for name in named:
            assert name in said
    study.write_text(was)
    assert standing.books() == before
    assert len(flwr(federation.server, "list")["runs"]) == runs


def test_a_coordinator_who_edits_the_run_or_the_kit_is_refused_by_the_sites(standing: Standing) -> None:
    federation, study = standing.federation, standing.second
    before = standing.books()
    edited = standing.changed(study, study__privacy__epsilon=9.0, study__training__rounds=4)
    # clinic-a is sent the edited study as if it were the one it knows.
    kit = federation.root / "edited-kit"
    shutil.copytree(federation.server / "kits" / A, kit)
    (kit / "study.json").write_text(json.dumps(edited.model_dump(mode="json")))
    call("client", "init", kit, "--home", federation.home(A))
    line = ("approve", "--data", federation.data(A), "--home", federation.home(A))
    done = call("client", *line, typed="no\n", code=2)
    assert "privacy.epsilon: 8.0 -> 9.0" in done.stdout
    assert "training.rounds: 2 -> 4" in done.stdout
    assert "nothing was done" in done.stderr

    # The coordinator's own ServerApp runs it: the hash is another one.
    first, run_dir = federation.run_dir(standing.first), federation.server / "runs" / "second-00000000"
    run_dir.mkdir()
    (run_dir / "study.json").write_text(json.dumps(edited.model_dump(mode="json")))
    (run_dir / "sites.json").write_text(json.dumps(SITES))
    shutil.copytree(first / "checkpoints" / "round-0000", run_dir / "checkpoints" / "round-0000")
    run_id = launch(federation.server, run_dir.name)
    wait_for(partial(ended, federation.server, run_id), "it ended", 120)
    progress = read_progress(run_dir)
    assert progress is not None
    assert progress.phase.startswith("failed")
    assert progress.sites == dict.fromkeys(SITES, "refused: 1001 not-approved")
    assert not list((run_dir / "checkpoints").glob("round-0001*"))
    said = (federation.home(A) / "site.log").read_text()
    assert "privacy.epsilon: 8.0 -> 9.0; training.rounds: 2 -> 4" in said
    for site in SITES:
        assert read_journal(federation.home(site))[0][-1]["outcome"] == "1001 not-approved"
    assert standing.books() == before
    shutil.rmtree(run_dir)


# -- what a coordinator's messages and bundles may not do -------------------------------------------


def test_no_message_changes_a_rule(standing: Standing) -> None:
    federation, study = standing.federation, standing.first
    before, good = standing.books(), standing.hash(standing.first)
    with unguarded_coordinator(federation):
        hand = Hand(standing, "messages", write_app(federation, "messages", HAND))
        wait_for((hand.folder / "there").exists, "the hand is there", 60)
    off = {"study__privacy__enabled": False}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("bad-message", {"study": good, "records": {"round": {"sigma": 0.0}}}),
        ("bad-message", {"study": good, "records": {"round": {"enabled": False, "epsilon": 99.0}}}),
        ("bad-message", {"study": good, "records": {"round": {"test_key": "known"}}}),
        (
            "bad-message",
            {"study": good, "records": {"policy": {"allow_not_private": True, "min_sigma": 0.0}}},
        ),
        ("bad-message", {"study": good, "round": 3}),
        ("bad-message", {"study": "../../../../etc/passwd"}),
        ("bad-message", {"study": good, "type": "evaluate"}),
        ("bad-message", {"study": good, "type": "query.ledger"}),
        ("not-approved", {"study": standing.hash(study, **off)}),
        ("not-approved", {"study": standing.hash(study, **off, study__training__test_key="known")}),
        ("not-approved", {"study": standing.hash(study, study__privacy__epsilon=80.0)}),
        ("not-approved", {"study": standing.hash(study, study__training__rounds=3)}),
        ("not-approved", {"study": standing.hash(study, base_hash="0" * 64)}),
        ("not-approved", {"study": standing.hash(study, study__generator__prediction="v_prediction")}),
        ("not-approved", {"study": standing.hash(study, code_version="0.0.1")}),
    ]
    sent = [(name, site := SITES[i % 2], hand.send(site, **more)) for i, (name, more) in enumerate(bad)]
    for name, site, path in sent:
        reason = REASONS[name]
        expected = {"code": reason.code, "reason": f"{name}: {reason.cause}"}
        assert hand.answer(path) == expected, (path.with_name(path.name.replace("answer", "ask")), site)
    with everything_drifted(standing):
        assert hand.ask(A, good)["code"] == REASONS["approval-drift"].code
    said = (federation.home(A) / "site.log").read_text().splitlines()[-1]
    assert said.count("the installed code; policy.toml; the base's files; the data") == 1, said
    assert standing.books() == before
    # With nothing added, and everything as it was approved, such a message is answered: from the store.
    state = federation.run_dir(study) / "checkpoints" / "round-0000" / "state.safetensors"
    answer = hand.ask(A, good, state=str(state))
    assert answer["code"] == 0, answer
    assert answer["facts"]["sigma"] >= FLOOR
    assert read_journal(federation.home(A))[0][-1]["outcome"] == "answered again"
    assert standing.books() == before
    hand.end()


def test_no_code_of_a_bundle_runs_at_a_site(standing: Standing) -> None:
    federation, before = standing.federation, standing.books()
    marks = federation.root / "marks"
    marks.mkdir()
    mark, shadow = MARK.format(marks=str(marks)), SHADOW.format(marks=str(marks))
    coded = HAND.replace('["README.md"]', '["README.md", "**/*.py"]')
    other, evil = coded.replace("polyclinic.client.app:app", "evil:app"), mark + "app = None\n"
    shadows = dict.fromkeys(("torch.py", "numpy/__init__.py", "flwr/__init__.py"), shadow)
    ours = dict.fromkeys(("polyclinic/__init__.py", "polyclinic/client/app.py", "sitecustomize.py"), evil)
    settings = HAND.replace('run = ""', 'run = ""\nepsilon = 99.0\nallow_not_private = true\ntest_key = "k"')
    assert settings != HAND
    apps = {
        "code": write_app(federation, "code", other, {"evil.py": evil}),
        "shadow": write_app(federation, "shadow", coded, {"evil.py": evil, **shadows, **ours}),
        "settings": write_app(federation, "settings", settings),
    }
    # Our coordinator does not run them itself, whoever launched them.
    server = federation.server
    ids = [int(flwr(server, "run", str(app))["run-id"]) for app in apps.values()]
    for run_id in ids:
        facts = wait_for(partial(ended, server, run_id), "it is refused", 60)
        assert "1060 bundle-forbidden" in facts["status-details"]
    assert {path.name.split()[:2] == ["coordinator", "flwr"] for path in marks.iterdir()} <= {True}
    # Another one would; it still gets nowhere.
    with unguarded_coordinator(federation):
        hands = [Hand(standing, name, app) for name, app in apps.items()]
        sent = [(hand, hand.send(site, records={"round": {"round": 1}})) for hand in hands for site in SITES]
        reason = REASONS["bundle-forbidden"]
        for hand, path in sent:
            assert hand.answer(path) == {"code": 1060, "reason": f"{reason.name}: {reason.cause}"}
        for hand in hands:
            hand.end()
    # Of those marks only the coordinator's are there: what was sent does run, where it is let.
    found = sorted(path.name for path in marks.iterdir())
    assert "coordinator flwr-serverapp evil" in found
    assert [name for name in found if not name.startswith("coordinator ")] == []
    for site in SITES:
        home = federation.home(site)
        assert [x["outcome"] for x in read_journal(home)[0] if x["kind"] == "out"][-3:] == [
            "1060 bundle-forbidden"
        ] * 3
        log = (home / "site.log").read_text()
        assert "evil.py" in log
        assert "torch.py" in log
        assert "allow_not_private" in log
        assert not [x for x in home.rglob("*") if x.name in ("evil.py", "torch.py") or x.suffix == ".fab"]
    assert standing.books() == before
    # Nor do settings that a run is launched with, beside its name.
    with pytest.raises(BadInput, match="Invalid run configuration"):
        flwr(server, "run", str(server / "node" / "app"), "--run-config", 'run="probe" epsilon=99.0')


def test_a_study_that_breaks_a_sites_rules_is_not_approved(standing: Standing) -> None:
    federation, before = standing.federation, standing.books()
    bare = federation.write_study("bare", private=False, rounds=1)
    path = federation.resolved(bare)
    assert "[1004 not-private-forbidden]" in federation.approve(A, path, code=3).stderr
    policy = federation.home(A) / "policy.toml"
    was = policy.read_bytes()
    policy.write_bytes(was + b"allow_not_private = true\n")
    assert "[1005 test-randomness-forbidden]" in federation.approve(A, path, code=3).stderr
    policy.write_bytes(was)
    path = federation.resolved(federation.write_study("weak", rounds=1, steps=1))
    said = federation.approve(A, path, code=3).stderr
    assert "[1063 noise-below-floor]" in said
    assert f"min_sigma = {FLOOR}" in said
    assert standing.books() == before
    assert len(list((federation.home(A) / "approvals").glob("*.json"))) == 2


# -- the next honest study, and a site that is put out ----------------------------------------------


def test_the_next_study_runs_and_a_revoked_site_stays_out(standing: Standing) -> None:
    federation, study = standing.federation, standing.second
    running = federation.run_in_background(study)
    wait_for(lambda: 2 in standing.rounds(B, "reserve", study), "round 2 is trained", 200)
    held = wait_for(partial(federation.task, B), "its ClientApp is found", 10)
    os.kill(held, signal.SIGSTOP)  # so that its reply does not come first
    call("server", "revoke", B, "--home", federation.server)
    (line, *_) = wait_for(lambda: standing.log(event="close", site=B, outcome="revoked"), "it is dropped", 20)
    os.kill(held, signal.SIGCONT)
    cut = line["time"]
    assert running.wait(timeout=400) == 0
    record = federation.record(study, 1)
    assert sorted(record["replied"]) == [A, B]
    record = federation.record(study, 2)
    assert (list(record["replied"]), record["absent"]) == ([A], [B])
    assert (federation.run_dir(study) / "report.html").stat().st_size > 10_000
    assert standing.rounds(A, "settle", study) == [1, 2]

    # It starts anew, with all its keys; the door, and behind it the SuperLink, know it no more.
    federation.stop(B)
    tried = len(standing.log(event="refused", outcome="not-admitted"))
    federation.start(B, wait=False)
    wait_for(lambda: len(standing.log(event="refused", outcome="not-admitted")) > tried, "it is refused")
    line = standing.log(event="refused", outcome="not-admitted")[-1]
    assert f"CN={B}" in line["subject"]
    assert not [x for x in standing.log(event="open", site=B) if x["time"] > cut]
    assert knock(federation, "/v1/fleet/activate-node", B) == "refused"
    assert superlink_refuses(federation, federation.home(B) / "keys" / "node.key")
    request = federation.root / f"request-{B}.json"
    said = call("server", "enroll", request, "--home", federation.server, code=3).stderr
    assert "1031 secret-used" in said
    for site in SITES:
        assert verify(federation.home(site), [])["lines"] >= 8
        call("client", "journal", "verify", "--home", federation.home(site))
