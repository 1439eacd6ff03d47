"""Sites in trouble: absent, slow, odd, full, out of budget, asked the same twice, sent nonsense.

One private study of ten rounds meets most of it, a round each; it needs one site for a release, and every
time it goes on with the one that is well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyclinic.client.ledger_view import verify
from polyclinic.common.privacy.accounting import claim
from tests.e2e.federation import DATA, PATIENTS, SITES, Federation, call, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

WELL, ODD = SITES
ROUNDS, FITTING = 10, 8
MOODS = {2: "nan", 3: "shape", 4: "norm", 5: "replay", 6: "full", 7: "linger", 8: "slow"}
CAP = 7.4  # of epsilon in all, at the site that is well: it is used up in mid-study


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, random_vae: Path) -> Iterator[Federation]:
    """As the shared one, but that the odd site's home is a small disk of its own where we may mount one."""
    if not DATA.exists():
        pytest.skip("needs the chest X-rays beside the project")
    made = Federation(tmp_path_factory.mktemp("federation"), random_vae)
    small = made.home(ODD)
    small.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m,mode=0700", "none", str(small)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    try:
        made.write_data()
        kits = made.provision(study := odd_study(made))
        for site, cap in ((WELL, CAP), (ODD, 100.0)):
            made.enrol(site, kits[site])
            (made.home(site) / "policy.toml").write_text(
                f"declared_patients = {PATIENTS}\nmin_patients = 5\nepsilon_per_study = 8.0\n"
                f"epsilon_total = {cap}\ndelta_total = 0.05\n"
            )
        made.approve(ODD, kits[ODD] / "study.json")
        approve_what_fits(made, kits[WELL] / "study.json")
        run_odd_study(made, study)
        yield made
    finally:
        made.stop_all()
        if mounted:
            subprocess.run(["umount", str(small)], check=False)


def approve_what_fits(federation: Federation, resolved: Path) -> None:
    """Approve the rounds that the well site's cap has room for: `approve` says how many those are."""
    refused = federation.approve(WELL, resolved, code=3).stderr
    assert "1003 budget-exhausted" in refused
    assert f"room for the first {FITTING} rounds: approve with --rounds {FITTING}" in refused
    federation.approve(WELL, resolved, "--rounds", FITTING)


def odd_study(federation: Federation) -> Path:
    return federation.write_study("odd", rounds=ROUNDS, steps=1, min_sites=1, deadline=60)


def run_odd_study(federation: Federation, study: Path) -> None:
    federation.start("server")
    federation.start(WELL)
    federation.run(study, "--detach")
    wait_for(lambda: federation.released(study) >= 1, "round 1 is over", 180)
    federation.start(ODD)
    disguise(federation, ODD)

    wait_for((federation.root / "lingers").exists, "the odd site is about to train in round 7", 400)
    federation.kill(ODD, "superexec")

    # In round 8 the odd site is stopped, and the other one answers the last round that its cap has room for.
    wait_for(lambda: any(x["round"] == 8 for x in federation.lines(WELL, study, "settle")), "round 8", 180)
    wait_for((federation.root / "slow").exists, "the odd site is slow")
    wait_for(lambda: federation.released(study) >= 8, "round 8 is over", 120)
    (federation.root / "go-on").touch()
    wait_for(lambda: federation.progress(study)["phase"] == "finished", "the study is over", 240)


def disguise(federation: Federation, site: str) -> None:
    """Put a launcher in the place of the installed one that spoils what the site sends."""
    moods = federation.root / "moods.json"
    # Where no small disk could be mounted, none is filled.
    full = federation.home(site).is_mount()
    moods.write_text(json.dumps({number: mood for number, mood in MOODS.items() if full or mood != "full"}))
    script = Path(__file__).parent / "odd_site.py"
    launcher = federation.home(site) / "node" / "bin" / "flwr-clientapp"
    launcher.write_text(
        f'#!/bin/sh\nexec {sys.executable} -I {script} polyclinic.client.launcher {moods} "$@"\n'
    )


def outcomes(federation: Federation, site: str, number: int) -> list[str]:
    """What the site's journal says became of a round's messages, in order."""
    asked = {line["message"] for line in federation.journal(site, "in") if line["round"] == str(number)}
    return [line["outcome"] for line in federation.journal(site, "out") if line["reply_to"] in asked]


def rounds(federation: Federation, site: str, kind: str) -> list[int]:
    return [line["round"] for line in federation.lines(site, federation.root / "odd.toml", kind)]


def record(federation: Federation, number: int) -> dict[str, Any]:
    return federation.record(federation.root / "odd.toml", number)


def shown(federation: Federation, number: int) -> dict[str, Any]:
    """Sites whose reply reached the coordinator, taken or not."""
    found = record(federation, number)
    return {**found["replied"], **found["rejected"]}


def test_a_site_that_never_comes_is_named_and_not_waited_for(federation: Federation) -> None:
    first = record(federation, 1)
    assert list(first["replied"]) == [WELL]
    assert first["absent"] == [ODD]
    assert 55 < first["seconds"] < 75
    assert 1 not in rounds(federation, ODD, "reserve")
    assert not outcomes(federation, ODD, 1)


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (2, ("1012 bad-state", "is not finite")),
        (3, ("1012 bad-state", "has shape (383,)")),
        (4, ("1050 implausible-norm", "is possible")),
    ],
)
def test_nonsense_is_thrown_away_by_name(federation: Federation, number: int, why: tuple[str, str]) -> None:
    found = record(federation, number)
    assert list(found["replied"]) == [WELL]
    assert list(found["rejected"]) == [ODD]
    code, words = why
    assert found["rejected"][ODD].startswith(code)
    assert words in found["rejected"][ODD]
    state = load_file(
        federation.run_dir(federation.root / "odd.toml")
        / "checkpoints"
        / f"round-{number:04d}"
        / "state.safetensors"
    )
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    # Thrown away or not: it left the site, and the site's ledger says so.
    assert number in rounds(federation, ODD, "settle")


def test_a_replayed_message_gets_the_stored_bytes_or_a_clear_no(federation: Federation) -> None:
    assert sorted(record(federation, 5)["replied"]) == sorted(SITES)
    heard = json.loads((federation.root / "replayed.json").read_text())
    assert heard["future"] == "1061"  # clock-off
    assert heard["past"] == "1010"  # round-too-late
    assert heard["first"] == heard["again"] == heard["old"]
    assert heard["other"] == "1007"  # round-already-answered
    assert outcomes(federation, ODD, 5) == [
        "1061 clock-off",
        "1010 round-too-late",
        "answered",
        "answered again",
        "answered again",
        "1007 round-already-answered",
    ]
    assert rounds(federation, ODD, "reserve").count(5) == rounds(federation, ODD, "settle").count(5) == 1


def test_a_full_disk_is_a_refusal_and_costs_nothing(federation: Federation) -> None:
    if not federation.home(ODD).is_mount():
        pytest.skip("needs to be root: a disk is mounted")
    found = record(federation, 6)
    assert list(found["replied"]) == [WELL]
    assert found["refused"] == {ODD: "1066 disk-full"}
    assert outcomes(federation, ODD, 6) == ["1066 disk-full"]
    assert 6 not in rounds(federation, ODD, "reserve")


def test_a_killed_superexec_of_a_site_costs_no_reply(federation: Federation) -> None:
    assert sorted(record(federation, 7)["replied"]) == sorted(SITES)


def test_a_site_slower_than_the_deadline_spends_nothing_afterwards(federation: Federation) -> None:
    found = record(federation, 8)
    assert list(found["replied"]) == [WELL]
    assert found["absent"] == [ODD]
    assert not found["refused"]
    wait_for(lambda: "1010 round-too-late" in outcomes(federation, ODD, 8), "it finds out", 30)
    assert set(outcomes(federation, ODD, 8)) == {"1010 round-too-late"}
    assert 8 not in rounds(federation, ODD, "reserve")


def test_a_site_without_budget_refuses_from_then_on(federation: Federation) -> None:
    for number in (9, 10):
        found = record(federation, number)
        assert found["refused"] == {WELL: "1003 budget-exhausted"}
        assert list(found["replied"]) == [ODD]
        assert outcomes(federation, WELL, number) == ["1003 budget-exhausted"]
    assert (
        rounds(federation, WELL, "reserve")
        == rounds(federation, WELL, "settle")
        == list(range(1, FITTING + 1))
    )
    (earmark,) = federation.lines(WELL, federation.root / "odd.toml", "earmark")
    assert earmark["epsilon"] <= CAP < 8.0
    # Ended or not, what was spent stays spent: nothing more fits under the cap.
    call("client", "close", "odd", "--yes", "--home", federation.home(WELL))
    before = (federation.home(WELL) / "ledger.jsonl").read_bytes()
    kit = federation.server / "kits" / WELL / "study.json"
    assert "1003 budget-exhausted" in federation.approve(WELL, kit, code=3).stderr
    assert (federation.home(WELL) / "ledger.jsonl").read_bytes() == before


def test_weights_that_overflow_are_answered_like_any_other(federation: Federation) -> None:
    study = federation.write_study("overflow", rounds=1, steps=1, epsilon=2.0, min_sites=1, deadline=120)
    resolved = federation.resolved(study)
    federation.approve(ODD, resolved)
    (federation.root / "moods.json").write_text("{}")
    # The coordinator's start is such that the first layer's output, squared, is about as large as fp32 goes.
    start = federation.run_dir(federation.root / "odd.toml") / "checkpoints" / "round-0000"
    state = load_file(start / "state.safetensors")
    for name in (name for name in state if name.startswith("conv_in.")):
        state[name] *= 1e19
    folder = federation.run_dir(study) / "checkpoints" / "round-0000"
    folder.mkdir(parents=True)
    save_file(state, folder / "state.safetensors")
    save_file(state, folder / "average.safetensors")
    (folder / "record.json").write_bytes((start / "record.json").read_bytes())

    federation.run(study, "--resume", "--detach")
    wait_for(lambda: federation.released(study) == 1, "the round is over", 180)
    found = federation.record(study, 1)
    assert found["refused"] == {WELL: "1001 not-approved"}
    after = load_file(federation.run_dir(study) / "checkpoints" / "round-0001" / "state.safetensors")
    assert any(bool((after[name] != state[name]).any()) for name in state)
    (reserved,) = federation.lines(ODD, study, "reserve")
    spent = ((reserved["sigma"], reserved["rate"], 1),)
    assert found["replied"][ODD]["epsilon"] == pytest.approx(claim(spent, 1e-3))
    # Nothing beside the numbers tells it from another round: the same fields, the same size, one settle line.
    other = record(federation, ROUNDS)
    assert found["replied"][ODD].keys() == other["replied"][ODD].keys()
    assert abs(found["bytes_up"] - other["bytes_up"]) < 100
    assert len(federation.lines(ODD, study, "settle")) == 1
    assert federation.journal(ODD, "out")[-1]["outcome"] == "answered"


def test_nothing_was_lost(federation: Federation) -> None:
    for site in SITES:
        verify(federation.home(site), [])
        call("client", "journal", "verify", "--home", federation.home(site))
    answered = [number for number in range(1, ROUNDS + 1) if ODD in shown(federation, number)]
    assert rounds(federation, ODD, "reserve") == rounds(federation, ODD, "settle") == answered
