"""PRIVACY.md, rules 4, 5 and 18: what an approval fixes, and that drift is refused by name."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client import approval as approvals
from polyclinic.client.approval import find_approval, require_approval
from polyclinic.client.binding import code_hash
from polyclinic.client.ledger_books import open_books
from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.refusals import BadInput, Refusal


def earmarks(home: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(home) if line["kind"] == "earmark"]


def test_approval_fixes_public_constants_noise_and_budget(make_site: Any) -> None:
    site = make_site("", privacy={"epsilon": 3.0})
    made = site.approve()
    assert (made.declared_patients, made.divisor) == (12, 6.0)
    assert made.epsilon == claim(((made.sigma, 0.5, 6),), 1e-3)
    assert 2.9 < made.epsilon <= 3.0
    (line,) = earmarks(site.home)
    assert {k: line[k] for k in ("approval", "study", "sigma", "rate", "steps", "delta", "epsilon")} == {
        "approval": made.id,
        "study": site.resolved.hash,
        "sigma": made.sigma,
        "rate": 0.5,
        "steps": 6,
        "delta": 1e-3,
        "epsilon": made.epsilon,
    }
    assert (site.home / "cache").stat().st_mode & 0o777 == 0o700
    assert site.approve() == made  # again: the same approval, nothing more set aside
    assert len(earmarks(site.home)) == 1
    assert require_approval(site.home, site.resolved.hash)[0] == made


def test_divisor_is_the_declared_size_whatever_the_data(make_site: Any) -> None:
    site = make_site()
    site.records = site.records[:7]
    assert site.approve().divisor == 6.0


def test_sites_cap_wins_over_the_studys_epsilon(make_site: Any) -> None:
    site = make_site()
    policy = (
        (site.home / "policy.toml").read_text().replace("epsilon_per_study = 20.0", "epsilon_per_study = 3.0")
    )
    (site.home / "policy.toml").write_text(policy)
    epsilon = site.approve().epsilon
    assert epsilon is not None
    assert 2.9 < epsilon <= 3.0


def test_crash_between_earmark_and_approval_gives_the_earmark_back(make_site: Any) -> None:
    site = make_site()
    first = site.approve()
    (site.home / "approvals" / f"{site.resolved.hash}.json").unlink()
    second = site.approve()
    assert first.id != second.id
    with open_books(site.home) as ledger:
        assert ledger.committed() == (second.epsilon, 1e-3)


def test_refused_approval_sets_nothing_aside(make_site: Any) -> None:
    site = make_site("max_rounds = 2\n")
    with pytest.raises(Refusal, match="policy-forbids"):
        site.approve()
    site.home.joinpath("policy.toml").write_text("declared_patients = 12\n")
    with pytest.raises(BadInput, match="fewer patients than min_patients = 20"):
        site.approve()
    site.home.joinpath("policy.toml").write_text("declared_patients = 12\nmin_patients = 1\nmin_sigma = 9\n")
    with pytest.raises(Refusal, match="noise-below-floor"):
        site.approve()
    assert earmarks(site.home) == []
    assert find_approval(site.home, site.resolved.hash) is None


def test_other_base_is_refused(make_site: Any) -> None:
    site = make_site()
    site.resolved = site.resolved.model_copy(update={"base_hash": "1" * 64})
    with pytest.raises(Refusal, match="base here is not the study's"):
        site.approve()
    assert earmarks(site.home) == []


def test_drift_is_refused_by_name(make_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()
    with pytest.raises(Refusal, match="not-approved"):
        require_approval(site.home, site.resolved.hash)
    site.approve()
    policy = site.home / "policy.toml"
    before = policy.read_text()
    policy.write_text(before + "allow_not_private = true\n")
    with pytest.raises(Refusal, match=r"approval-drift.*policy\.toml"):
        require_approval(site.home, site.resolved.hash)
    policy.write_text(before)
    with monkeypatch.context() as patch:
        patch.setattr(approvals, "code_hash", lambda: "2" * 64)
        with pytest.raises(Refusal, match=r"approval-drift.*installed code"):
            require_approval(site.home, site.resolved.hash)
    path = site.home / "approvals" / f"{site.resolved.hash}.json"
    edited = json.loads(path.read_text())
    edited["resolved"]["study"]["privacy"]["views"] = 3
    path.write_text(json.dumps(edited))
    with pytest.raises(Refusal, match=r"approval-drift.*the study"):
        require_approval(site.home, site.resolved.hash)


def test_code_hash_sees_every_file_of_the_rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = {room: tmp_path / room for room in ("common", "client")}
    for folder in rooms.values():
        folder.mkdir()
        (folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(resources, "files", lambda name: rooms[name.removeprefix("polyclinic.")])
    seen = {code_hash()}
    (rooms["common"] / "a.py").write_text("x = 2\n")
    seen.add(code_hash())
    (rooms["client"] / "new.py").write_text("")
    seen.add(code_hash())
    (rooms["client"] / "new.py").rename(rooms["client"] / "other.py")
    seen.add(code_hash())
    assert len(seen) == 4


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "A" * 64, "a" * 63, "", "a" * 63 + "/", "a" * 64 + "\n"]
)
def test_study_hash_from_a_message_names_no_other_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refusal, match="bad-message"):
        require_approval(tmp_path, name)
