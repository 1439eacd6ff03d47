"""`polyclinic-client ledger`: what it shows, what it detects, and that an auditor can do without us."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from polyclinic.client.approval import prepare_and_approve
from polyclinic.client.cli import main
from polyclinic.client.ledger_books import create_ledger, open_books
from polyclinic.client.ledger_chain import read_lines
from polyclinic.client.ledger_view import export, spending, svg, verify, words
from polyclinic.common.chain import GENESIS, line_hash
from polyclinic.common.files import canonical_json
from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.refusals import BadInput, Refusal
from tests.client.ledger_home import RATE, SIGMA, STATE, STEPS, answered, earmark, new, reserve

DOCS = Path(__file__).parents[2] / "docs"


def retime(home: Path, seconds: list[int]) -> None:
    """Write the ledger again as if its lines had been written at these seconds of a minute."""
    previous, lines = GENESIS, []
    for line, second in zip(read_lines(home), seconds, strict=True):
        changed = {**line, "time": f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}+00:00"}
        changed["previous"] = previous
        previous = changed["hash"] = line_hash(changed)
        lines.append(changed)
    (home / "ledger.jsonl").write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))
    (home / "ledger.head").write_text(json.dumps({"sequence": len(lines) - 1, "hash": previous}))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["ledger", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_spending_is_by_study_and_round_at_the_delta_asked_for(tmp_path: Path) -> None:
    home = new(tmp_path, ("a", "b"), epsilon=4.0, total=5 * STEPS)
    answered(home, range(1, 4))
    (home / "policy.toml").write_text("declared_patients = 100\nepsilon_total = 9.0\n")
    facts = spending(home)
    first, second = facts["studies"]
    assert [row["steps"] for row in first["by_round"]] == [STEPS, 2 * STEPS, 3 * STEPS]
    for row in first["by_round"]:
        assert row["epsilon"] == claim(((SIGMA, RATE, row["steps"]),), 1e-5)
    assert (first["epsilon"], first["delta"]) == (first["by_round"][-1]["epsilon"], 1e-5)
    assert (first["state"], first["rounds"], first["rounds_left"]) == ("open", 3, 2)
    assert (second["epsilon"], second["rounds_left"], second["seconds_left"]) == (0.0, None, None)
    assert facts["total"] == {
        "epsilon": 8.0, "delta": 2e-5, "epsilon_cap": 9.0, "delta_cap": 1e-3, "epsilon_left": 1.0,
        "delta_left": 1e-3 - 2e-5,
    }  # fmt: skip
    at = spending(home, 1e-3)["studies"][0]
    assert at["epsilon"] == claim(((SIGMA, RATE, 3 * STEPS),), 1e-3) < first["epsilon"]
    assert at["by_round"][-1]["epsilon"] == at["epsilon"]
    with pytest.raises(BadInput, match="--delta 1"):
        spending(home, 1.0)


def test_time_left_is_at_the_pace_so_far(tmp_path: Path) -> None:
    home = new(tmp_path, total=5 * STEPS)
    answered(home, range(1, 4))
    # open, earmark, then reserve and settle: rounds begin at 10, 40 and 90 s, so 40 s a round.
    retime(home, [0, 1, 10, 20, 40, 50, 90, 95])
    facts = spending(home)
    assert facts["studies"][0]["seconds_left"] == 80.0
    assert "2 rounds left, 80 seconds at the pace so far" in words(facts)


def test_a_long_study_shows_some_rounds_and_always_the_last(tmp_path: Path) -> None:
    home = new(tmp_path)
    with open_books(home) as ledger:
        for number in range(1, 31):
            reserve(ledger, number)
    facts = spending(home)
    shown = [row["round"] for row in facts["studies"][0]["by_round"]]
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == (1, 30)
    assert words(facts).count("round ") == 12


def test_a_study_without_privacy_is_infinite_everywhere_and_json_stays_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = new(tmp_path, epsilon=float("inf"))
    with open_books(home) as ledger:
        reserve(ledger, 1)
    code, out, _ = run(capsys, "show", "--json", "--home", str(home))
    assert code == 0
    facts = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert facts["studies"][0]["epsilon"] == facts["total"]["epsilon"] == "inf"
    assert "inf" in run(capsys, "show", "--home", str(home))[1]


def test_drawing_is_svg_with_a_line_a_private_study(tmp_path: Path) -> None:
    home = new(tmp_path / "home", ("a", "b"), epsilon=4.0)
    with open_books(home) as ledger:
        for number in range(1, 4):
            reserve(ledger, number)
        earmark(ledger, "plain", float("inf"))
    tree = ElementTree.fromstring(svg(spending(home)))
    lines = tree.findall("{http://www.w3.org/2000/svg}polyline")
    heights = [float(point.split(",")[1]) for point in lines[0].attrib["points"].split()]
    assert len(lines) == 2
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 4  # zero and three rounds, each above the one before
    assert main(["ledger", "show", "--svg", str(tmp_path / "a.svg"), "--home", str(home)]) == 0
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_looking_needs_no_lock_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = new(tmp_path)
    answered(home, range(1, 2))
    path = home / "ledger.jsonl"
    with open_books(home):  # a site that trains
        with path.open("ab") as file:
            file.write(b'{"a line that is being')
        before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
        assert run(capsys, "show", "--home", str(home))[0] == 0
        code, out, _ = run(capsys, "verify", "--home", str(home))
        assert code == 0
        assert "4 lines, the chain is whole" in out
        assert "unfinished last line" in out
        assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


def cut(home: Path, count: int) -> None:
    """Shorten a ledger together with its head, as whoever wants budget back would."""
    lines = read_lines(home)[:count]
    (home / "ledger.jsonl").write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))
    (home / "ledger.head").write_text(json.dumps({"sequence": count - 1, "hash": lines[-1]["hash"]}))


def test_verify_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = new(tmp_path / "home")
    answered(home, range(1, 3))
    lines = read_lines(home)
    anchor = f"4:{lines[4]['hash']}"
    assert verify(home, [anchor]) == {
        "lines": 6, "head": {"sequence": 5, "hash": lines[5]["hash"]}, "unfinished_line": False, "replies": 2,
        "anchors": 1,
    }  # fmt: skip

    def refused(damaged: Path, *more: str) -> str:
        code, _, said = run(capsys, "verify", *more, "--home", str(damaged))
        assert code == 3
        return said

    def copy(name: str) -> Path:
        return shutil.copytree(home, tmp_path / name)

    edited = copy("edited")
    path = edited / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"steps":10,', b'"steps":1,', 1))
    assert "ledger-broken" in refused(edited)
    assert "line 3 was changed" in refused(edited)

    # Cut off together with its head: the replies that are still there give it away ...
    short = copy("short")
    cut(short, 4)
    assert "a-0002.safetensors is there, its reservation is not" in refused(short)
    # ... and without them the coordinator's record does.
    (short / "replies" / "a-0002.safetensors").unlink()
    assert verify(short)["lines"] == 4
    assert "line 5 is not the one in --anchor" in refused(short, "--anchor", anchor)

    # The same rounds reserved again in a ledger made anew: the replies echo another one's lines.
    anew = new(tmp_path / "anew")
    with open_books(anew) as ledger:
        reserve(ledger, 1)
    shutil.copytree(home / "replies", anew / "replies")
    (anew / "replies" / "a-0002.safetensors").unlink()
    assert "line 3 is not the one in the head echoed in" in refused(anew)

    changed = copy("changed")
    with (changed / "replies" / "a-0001.safetensors").open("ab") as file:
        file.write(b"x")
    assert "reply-broken" in refused(changed)
    (changed / "replies" / "a-0001.safetensors").unlink()
    assert "a-0001.safetensors, settled by line 4" in refused(changed)
    assert run(capsys, "verify", "--anchor", "4", "--home", str(home))[0] == 2


def test_a_lost_head_is_accepted_only_by_a_deliberate_act_and_only_if_all_else_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = new(tmp_path)
    answered(home, range(1, 3))
    at = ("--home", str(home))
    assert run(capsys, "verify", "--rewrite-head", *at)[0] == 3  # it is there: nothing to rewrite
    cut(home, 4)
    (home / "ledger.head").unlink()
    for what in ("show", "verify"):
        code, _, said = run(capsys, what, *at)
        assert code == 3
        assert "ledger.head is missing beside 4 lines" in said
    assert "its reservation is not" in run(capsys, "verify", "--rewrite-head", *at)[2]
    assert not (home / "ledger.head").exists()
    (home / "replies" / "a-0002.safetensors").unlink()
    assert run(capsys, "verify", "--rewrite-head", *at)[0] == 0
    assert [line["kind"] for line in read_lines(home)][-1] == "anchor"


def test_export_holds_the_lines_and_a_summary_of_just_these(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = new(tmp_path / "home")
    answered(home, range(1, 3))
    path = tmp_path / "audit.json"
    assert run(capsys, "export", str(path), "--delta", "1e-4", "--home", str(home))[0] == 0
    whole = json.loads(path.read_text())
    assert whole["lines"] == read_lines(home)
    assert whole["summary"] == spending(home, 1e-4)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BadInput, match="there already"):
        export(home, path)


def snippet() -> str:
    """The program that docs/ledger.md gives an auditor."""
    text = (DOCS / "ledger.md").read_text()
    (block,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    return block


def test_the_snippet_of_the_docs_recomputes_hashes_and_epsilon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = new(tmp_path / "home", epsilon=4.0)
    with open_books(home) as ledger:
        for number in (1, 2):
            reserve(ledger, number)
        earmark(ledger, "unused", 1.0)
        ledger.close("unused")
        earmark(ledger, "plain", float("inf"))
        reserve(ledger, 1, approval="plain")
    path = tmp_path / "audit.json"
    export(home, path)
    code = snippet()
    assert "polyclinic" not in code
    assert len(code.strip().splitlines()) <= 15

    def recompute(file: Path) -> dict[str, float]:
        monkeypatch.setattr(sys, "argv", ["recompute", str(file)])
        exec(compile(code, "docs/ledger.md", "exec"), {})
        return {name: float(value) for name, value in map(str.split, capsys.readouterr().out.splitlines())}

    expected = {"a": pytest.approx(claim(((SIGMA, RATE, 2 * STEPS),), 1e-5), abs=0.01), "unused": 0.0}
    assert recompute(path) == recompute(home / "ledger.jsonl") == expected | {"plain": float("inf")}
    for line in range(5):
        whole = json.loads(path.read_text())
        whole["lines"][line]["time"] = "2020"
        (tmp_path / "edited.json").write_text(json.dumps(whole, indent=1))
        with pytest.raises(AssertionError):
            recompute(tmp_path / "edited.json")


def test_hard_stop_at_both_caps_over_several_studies(make_site: Any) -> None:
    site = make_site(privacy={"epsilon": 8.0, "delta": 4e-3})
    policy = site.home / "policy.toml"
    policy.write_text(policy.read_text().replace("epsilon_total = 20.0", "epsilon_total = 22.0"))

    def study(number: int) -> Any:
        site.resolved = site.resolved.model_copy(update={"start_hash": f"{number:064d}"})
        return prepare_and_approve(site.home, "site-a", site.resolved, site.records, BaseFiles(vae=site.vae))

    first, second = study(1), study(2)
    with pytest.raises(Refusal, match=r"1003 budget-exhausted.*caps 22\.00"):
        study(3)
    with open_books(site.home) as ledger:
        ledger.reserve(approval=first.id, item=1, state=STATE, sigma=first.sigma, rate=0.5, steps=2, tau=0.0)
        ledger.close(first.id)
        spent = claim(((first.sigma, 0.5, 2),), 4e-3)
        assert ledger.committed() == pytest.approx((spent + second.epsilon, 8e-3))
    # What the closed study did not use has come back, but its delta has not: the cap is 1 / (10 x 12).
    with pytest.raises(
        Refusal, match=r"1003 budget-exhausted.*, 0\.008; asked .*, 0\.004; caps 22\.00, 0\.00833"
    ):
        study(3)
    policy.write_text(policy.read_text() + "delta_total = 0.012\n")
    assert study(3).epsilon == first.epsilon
    assert [line["kind"] for line in read_lines(site.home)].count("earmark") == 3


def test_no_private_study_is_approved_after_one_that_was_not(make_site: Any) -> None:
    site = make_site("allow_not_private = true\n")
    private = site.resolved
    plain = private.study.model_copy(
        update={"privacy": private.study.privacy.model_copy(update={"enabled": False})}
    )
    site.resolved = private.model_copy(update={"study": plain})
    assert site.approve().epsilon is None
    site.resolved = private
    with pytest.raises(Refusal, match=r"budget-exhausted.*committed inf"):
        site.approve()


def test_a_ledger_of_a_site_that_did_nothing_can_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_ledger(tmp_path, "ward", simulated=False)
    code, out, _ = run(capsys, "show", "--home", str(tmp_path))
    assert code == 0
    assert "all studies: epsilon 0.000" in out
    assert run(capsys, "show", "--home", str(tmp_path / "none"))[0] == 3
