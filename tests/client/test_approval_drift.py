"""PRIVACY.md, rule 18: drift of packages, base, data or study is refused by name and spends nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from packaging.requirements import Requirement

from polyclinic.client import binding
from polyclinic.client.app import app
from polyclinic.client.approval import noise_of, prepare_and_approve, require_approval
from polyclinic.client.approval_terms import FIELDS, PARTS
from polyclinic.client.binding import dependencies
from polyclinic.client.cli import main
from polyclinic.client.journal_view import read_journal
from polyclinic.client.ledger_books import open_books
from polyclinic.client.ledger_chain import read_lines
from polyclinic.client.policy import load_policy
from polyclinic.common.data.pixels import snapshot_hash
from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.kit import BASE_INDEX
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.refusals import REASONS, BadInput, Refusal
from polyclinic.common.rounding import SCALE
from polyclinic.common.study import CODE_VERSION, differences
from polyclinic.common.wire import DIFFERENCE, FACTS, HASHES, TAP, ReplyFacts
from polyclinic.common.wire_reading import RoundOrder, order_records

PLAIN = {"privacy": {"enabled": False}}
ALLOW = "allow_not_private = true\n"


@pytest.fixture
def hospital(make_site: Any, tmp_path: Path) -> Any:
    """A site with a kit, a base of its own and a data folder; a study without privacy is quick to approve."""
    site = make_site(ALLOW, **PLAIN)
    site.data = tmp_path / "data"
    site.data.mkdir()
    rows = ["image,caption,patient"]
    for record in site.records:
        shutil.copy(record.image, site.data / record.image.name)
        rows.append(f"{record.image.name},{record.captions[0]},{record.patient}")
    (site.data / "images.csv").write_text("\n".join(rows) + "\n")
    kit = site.home / "kit"
    (kit / "base").mkdir(parents=True)
    shutil.copytree(site.vae, kit / "base" / "vae-0123456789ab")
    index = {"bases": {site.resolved.base_hash: {"vae": "vae-0123456789ab"}}}
    (kit / BASE_INDEX).write_text(json.dumps(index))
    (kit / "study.json").write_text(site.resolved.model_dump_json())
    binding._HASHES.clear()
    return site


def make_private(site: Any) -> Any:
    private = site.resolved.study.privacy.model_copy(update={"enabled": True})
    study = site.resolved.study.model_copy(update={"privacy": private})
    site.resolved = site.resolved.model_copy(update={"study": study})
    (site.home / "kit" / "study.json").write_text(site.resolved.model_dump_json())
    return site


def run(site: Any, *words: str) -> int:
    return main([*words, "--home", str(site.home)])


def approve(site: Any, *words: str) -> int:
    return run(site, "approve", *words, "--data", str(site.data))


def kinds(site: Any) -> list[str]:
    return [line["kind"] for line in read_lines(site.home)]


def refusal(site: Any) -> str:
    binding._HASHES.clear()  # as in the next message's process
    with pytest.raises(Refusal, match="approval-drift") as raised:
        require_approval(site.home, site.resolved.hash)
    return raised.value.detail


def over_wire(site: Any, study_hash: str) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 2, 1, 2
    content = order_records(RoundOrder(1, study_hash), site.state)
    message = Message(content, dst_node_id=2, message_type="train", group_id="1", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m"
    config = {"home": str(site.home)}
    return app(message, Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={}))


def test_the_terms_name_exactly_what_leaves() -> None:
    assert len(set(FIELDS.values())) == len(fields(ReplyFacts))
    assert set(PARTS) == {DIFFERENCE, SCALE, TAP, FACTS, HASHES}


def test_bound_packages_are_the_closure_of_what_polyclinic_requires() -> None:
    # By another library, with every marker evaluated; ours may hold more, where a marker is false here.
    needed: set[str] = set()
    todo: list[tuple[str, tuple[str, ...]]] = [("polyclinic", ("",))]
    while todo:
        name, extras = todo.pop()
        for line in metadata.requires(name) or []:
            wanted = Requirement(line)
            asked = [e for e in extras if not wanted.marker or wanted.marker.evaluate({"extra": e})]
            key = re.sub(r"[-_.]+", "-", wanted.name).lower()
            if asked and key not in needed:
                needed.add(key)
                todo.append((key, ("", *wanted.extras)))
    bound = dependencies()
    assert needed <= bound.keys()
    assert {"torch", "flwr", "opacus", "numpy", "cryptography"} <= needed
    assert not {"polyclinic", "pytest", "ruff", "mypy"} & bound.keys()
    assert all(re.fullmatch(r"\S+ sha256:[0-9a-f]{64}", entry) for entry in bound.values())
    assert bound["torch"].split()[0] == metadata.version("torch")


def test_each_drift_is_named_and_a_person_may_approve_it(hospital: Any, tmp_path: Path) -> None:
    site = hospital
    assert approve(site, "--yes") == 0
    require_approval(site.home, site.resolved.hash)
    made = json.loads((path := site.home / "approvals" / f"{site.resolved.hash}.json").read_text())
    assert made["data"] == str(site.data)

    path.write_text(json.dumps({**made, "dependencies": {**made["dependencies"], "torch": "2.0.0 sha256:0"}}))
    assert refusal(site) == f"package torch (2.0.0 -> {metadata.version('torch')})"
    path.write_text(json.dumps({**made, "dependencies": {**made["dependencies"], "gone": "1.0 sha256:0"}}))
    assert refusal(site) == "package gone (1.0 -> none)"
    path.write_text(json.dumps(made))

    weights = site.home / "kit" / "base" / "vae-0123456789ab" / "config.json"
    whole = weights.read_text()
    weights.write_text(whole + " ")
    assert refusal(site) == "the base's files"
    weights.unlink()
    assert refusal(site) == "the base's files"
    weights.write_text(whole)

    table = site.data / "images.csv"
    text = table.read_text()
    table.write_text(text.replace("a polyp", "two polyps", 1))
    (site.home / "policy.toml").write_text((site.home / "policy.toml").read_text() + "max_rounds = 50\n")
    assert refusal(site) == "policy.toml; the data"
    assert over_wire(site, site.resolved.hash).error.reason == (
        f"approval-drift: {REASONS['approval-drift'].cause}"
    )
    assert "reserve" not in kinds(site)

    assert approve(site, "--yes") == 0  # as it is now: the same budget, not another
    renewed, _ = require_approval(site.home, site.resolved.hash)
    assert renewed.id == made["id"]
    assert renewed.snapshot_hash != made["snapshot_hash"]
    assert kinds(site).count("earmark") == 1
    assert not over_wire(site, site.resolved.hash).has_error()


def test_data_is_hashed_only_where_it_looks_changed(hospital: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = hospital
    assert approve(site, "--yes") == 0
    hashed: list[int] = []
    real = snapshot_hash

    def count(records: Any) -> str:
        hashed.append(len(records))
        return real(records)

    monkeypatch.setattr(binding, "snapshot_hash", count)
    require_approval(site.home, site.resolved.hash)
    assert hashed == []
    image = site.data / "03.png"
    os.utime(image, (1, 1))
    for _ in range(2):  # touched, the same content: hashed once, remembered
        require_approval(site.home, site.resolved.hash)
    assert hashed == [12]
    image.write_bytes((site.data / "04.png").read_bytes())
    assert refusal(site) == "the data"
    image.unlink()
    assert refusal(site) == "the data"
    shutil.rmtree(site.data)
    assert refusal(site) == "the data"


def test_a_study_edited_after_approval_is_named_field_by_field_at_the_site_only(
    hospital: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    site = hospital
    assert approve(site, "--yes") == 0
    study = site.resolved.study
    training = study.training.model_copy(update={"rounds": 9})
    edited = site.resolved.model_copy(
        update={
            "study": study.model_copy(update={"training": training}),
            "base_hash": "7" * 64,
            "code_version": "9.9",
        }
    )
    changes = differences(site.resolved, edited)
    assert changes == [
        f'base_hash: "{site.resolved.base_hash}" -> "{"7" * 64}"',
        f'code_version: "{CODE_VERSION}" -> "9.9"',
        "training.rounds: 3 -> 9",
    ]
    # The coordinator starts it without telling anybody: only a hash arrives.
    reply = over_wire(site, edited.hash)
    assert reply.error.reason == f"not-approved: {REASONS['not-approved'].cause}"
    log = (site.home / "site.log").read_text()
    assert f"{edited.hash[:8]}; approved here: {site.resolved.run_name}" in log
    # With the new study in the kit the log says what was edited; over the wire still only the code.
    (site.home / "kit" / "study.json").write_text(edited.model_dump_json())
    assert over_wire(site, edited.hash).error.reason == reply.error.reason
    assert "training.rounds: 3 -> 9" in (site.home / "site.log").read_text()
    assert kinds(site) == ["open", "earmark"]
    # Approving it shows the fields, too; this one was made by another release.
    assert approve(site, "--yes") != 0
    later = site.resolved.model_copy(update={"study": edited.study})
    (site.home / "kit" / "study.json").write_text(later.model_dump_json())
    capsys.readouterr()
    assert approve(site, "--yes") == 0
    shown = capsys.readouterr().out
    assert "NOT the study approved before under this name" in shown
    assert "training.rounds: 3 -> 9" in shown


def test_what_was_fixed_at_approval_is_not_renewed(make_site: Any) -> None:
    site = make_site()
    first = site.approve()
    path = site.home / "approvals" / f"{site.resolved.hash}.json"
    before, approved = (site.home / "policy.toml").read_text(), path.read_text()

    def renew(policy: str) -> Any:
        (site.home / "policy.toml").write_text(policy)
        files = BaseFiles(vae=site.vae)
        return prepare_and_approve(site.home, "site-a", site.resolved, site.records, files, renew=True)

    with pytest.raises(BadInput, match="`declared_patients` was fixed"):
        renew(before.replace("declared_patients = 12", "declared_patients = 11"))
    # As if the policy had allowed more, and so less noise, when it was approved.
    path.write_text(json.dumps({**json.loads(approved), "sigma": 0.9 * first.sigma}))
    with pytest.raises(BadInput, match="`epsilon_per_study` was fixed"):
        renew(before + "# changed\n")
    path.write_text(approved)
    same = renew(before.replace("epsilon_per_study = 20.0", "epsilon_per_study = 19.0"))
    assert (same.id, same.sigma, same.coins) == (first.id, first.sigma, first.coins)
    assert [line["kind"] for line in read_lines(site.home)] == ["open", "earmark", "tap"]


def test_a_closed_study_may_be_approved_anew_and_is_charged_anew(
    hospital: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    site = hospital
    assert approve(site, "--yes") == 0
    first = require_approval(site.home, site.resolved.hash)[0].id
    capsys.readouterr()
    assert run(site, "close", "tin", "--yes") == 2
    assert "none of this site's open studies fit" in capsys.readouterr().err
    assert run(site, "close", site.resolved.hash[:8], "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["epsilon_returned"] == "inf"
    assert run(site, "approvals", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["approval"]) == ("closed", first)
    assert run(site, "close", "tiny", "--yes") == 2
    assert approve(site, "--yes") == 0
    assert require_approval(site.home, site.resolved.hash)[0].id != first
    assert [line["kind"] for line in read_journal(site.home)[0]] == ["approve", "close", "approve"]


def test_approval_asks_and_shows_what_it_means(
    hospital: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = hospital
    answers = iter(["", "Tiny\n", "tiny\n"])
    monkeypatch.setattr("sys.stdin.readline", lambda: next(answers), raising=False)
    for _ in range(2):
        assert approve(site) == 2
        assert "nothing was done" in capsys.readouterr().err
    assert kinds(site) == ["open"]
    assert approve(site) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for said in (
        "*** NOT PRIVATE ***",
        "3 rounds of 2 steps",
        "12 images of 12 patients",
        "divisor sampling rate x declared patients",
        "No private study can ever follow",
        "approved as",
    ):
        assert said in shown
    assert approve(site) == 0  # nothing to ask
    assert "Approved already" in capsys.readouterr().out
    assert kinds(site) == ["open", "earmark"]


def test_a_private_study_shows_epsilon_sigma_and_the_share_of_the_caps(
    hospital: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_private(hospital)
    assert approve(site, "--yes", "--json") == 0
    out = capsys.readouterr()
    facts = json.loads(out.out)
    assert "*** NOT PRIVATE ***" not in out.err
    assert "this site's own" in out.err  # a person still reads it
    made, _ = require_approval(site.home, site.resolved.hash)
    assert (facts["sigma"], facts["epsilon"], facts["approval"]) == (made.sigma, made.epsilon, made.id)
    assert (facts["epsilon_before"], facts["epsilon_after"], facts["epsilon_cap"]) == (
        0.0,
        made.epsilon,
        20.0,
    )
    with open_books(site.home) as ledger:
        assert ledger.committed()[0] == facts["epsilon_after"]


def test_a_budget_too_small_for_all_rounds_serves_the_first_ones(
    hospital: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_private(hospital)
    policy = site.home / "policy.toml"
    noise = noise_of(load_policy(site.home), site.resolved)[0]
    rate, delta = site.resolved.study.privacy.sampling_rate, site.resolved.study.privacy.delta
    two, three = (claim(((noise, rate, 2 * rounds),), delta) for rounds in (2, 3))
    policy.write_text(policy.read_text().replace("epsilon_total = 20.0", f"epsilon_total = {three - 0.01}"))
    assert approve(site, "--yes") == 3
    assert "room for the first 2 rounds: approve with --rounds 2" in capsys.readouterr().err
    assert approve(site, "--yes", "--rounds", "4") == 2
    assert kinds(site) == ["open"]

    assert approve(site, "--yes", "--rounds", "2") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The first 2 of 3 rounds, and no later one, of 2 steps" in shown
    assert "for its first 2 rounds" in shown
    made, _ = require_approval(site.home, site.resolved.hash)
    assert (made.sigma, made.epsilon) == (noise, two)  # the whole schedule's noise: less is spent, not added
    assert approve(site, "--yes", "--rounds", "3") == 0  # nothing to agree to: what was fixed stays
    asked = {"approval": made.id, "state": "c" * 64, "sigma": noise, "rate": rate, "steps": 2, "tau": 0.0}
    with open_books(site.home) as ledger:
        for number in (1, 2):
            ledger.reserve(item=number, **asked)
        assert ledger.epsilon(made.id) == two
        with pytest.raises(Refusal, match=r"1003 budget-exhausted.*4 of 4 steps used"):
            ledger.reserve(item=3, **asked)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file"),
        ("[study]", "not a resolved study; name the study.json of a kit"),
        ('{"study": {"name": "x"}}', "field `study.evaluation` is missing"),
    ],
)
def test_mistakes_in_the_study_are_named(
    hospital: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, named: str
) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    assert approve(hospital, str(path), "--yes") == 2
    assert named in capsys.readouterr().err


def test_a_kit_without_the_base_is_named(hospital: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (hospital.home / "kit" / BASE_INDEX).write_text('{"bases": {}}')
    assert approve(hospital, "--yes") == 2
    assert "the kit of this site does not carry it" in capsys.readouterr().err


def test_cache_in_a_process_of_its_own_leaves_nothing_to_encode_for_the_approval(hospital: Any) -> None:
    def cache(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "polyclinic.client.cli", "cache", str(hospital.data), *words]
        return subprocess.run(
            [*command, "--home", str(hospital.home)], capture_output=True, text=True, timeout=300, check=False
        )

    def shards() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (hospital.home / "cache").glob("*.safetensors")}

    done = cache("--json")
    assert done.returncode == 0, done.stderr
    facts, before = json.loads(done.stdout), shards()
    assert facts["images"] == len(hospital.records)
    assert (hospital.home / "cache" / f"{facts['cache']}.json").exists()
    assert kinds(hospital) == ["open"]  # nothing is approved by it
    assert approve(hospital, "--yes") == 0
    assert shards() == before
    assert before
    (hospital.data / "study.toml").write_text('name = "x"\n')
    wrong = cache("--study", str(hospital.data / "study.toml"))
    assert wrong.returncode == 2
    assert "give the kit's study.json" in wrong.stderr
