"""PRIVACY.md, rule 16: the gate at a hospital, from the final generator to a person's word and a count."""

import json
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load

from polyclinic.client.app import app
from polyclinic.client.approval import find_approval
from polyclinic.client.cli import main
from polyclinic.client.final import load_final
from polyclinic.client.leakage import Looks, folder_of, nearest_pair, read_findings
from polyclinic.client.ledger_chain import read_lines
from polyclinic.client.ledger_view import verify
from polyclinic.client.membership import compare
from polyclinic.client.releases import answer_release, decide
from polyclinic.common.data.table import Record
from polyclinic.common.features.near import thumbnails
from polyclinic.common.generators.base import Tensors
from polyclinic.common.generators.public import hash_state
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.refusals import REASONS, Refusal
from polyclinic.common.wire import RELEASE, ReleaseFacts, release_records
from polyclinic.common.wire_reading import (
    ReleaseOrder,
    RoundOrder,
    order_records,
    read_release,
    release_order,
)
from tests.client.ledger_home import in_child, kill_at_flush, wait_for

ASKS = {"leakage_gate": True, "copies_epsilon": 1.0, "held_out": 0.3}
DRAWS = {"prompts": [{"text": "a polyp"}, {"text": "no polyp"}], "draws": 3, "steps": 2}


@pytest.fixture
def site(make_site: Any) -> Any:
    made = make_site(releases=ASKS, privacy={"canaries": 0}, evaluation=DRAWS)
    made.approve()
    return made


def over_wire(home: Path, kind: str, content: RecordDict) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 2, 1, 2
    message = Message(content, dst_node_id=2, message_type=kind, group_id="gate", ttl=600.0)
    message.metadata.__dict__["_message_id"] = "m"
    context = Context(run_id=1, node_id=2, node_config={"home": str(home)}, state=RecordDict(), run_config={})
    return app(message, context)


def give_final(site: Any, state: Tensors | None = None, number: int = 3) -> Message:
    order = RoundOrder(round=number, study_hash=site.resolved.hash)
    return over_wire(site.home, "query.final", order_records(order, state or site.state))


def ask(site: Any, home: Path | None = None) -> bytes:
    order = ReleaseOrder("gate", site.resolved.hash)
    return answer_release(home or site.home, order, in_time=lambda: True)


def command(site: Any, *words: str) -> int:
    return main(["leakage", "tiny", *words, "--home", str(site.home)])


def test_from_final_generator_to_a_persons_word(site: Any, capsys: pytest.CaptureFixture[str]) -> None:
    # In any other order it is refused.
    assert command(site) == 3
    assert "1042 final-missing" in capsys.readouterr().err
    with pytest.raises(Refusal, match="gate-undecided"):
        ask(site)
    reply = give_final(site)
    assert not reply.has_error()
    facts = read_release(reply.content, 0)[1]
    approval = find_approval(site.home, site.resolved.hash)
    assert approval is not None
    assert facts.model == hash_state(load_final(site.home, approval))
    assert (facts.release, facts.verdict, facts.sigma, facts.epsilon) == ("final", "", 0.0, 0.0)
    assert not give_final(site).has_error()  # again: the same one
    other = {name: tensor + 1 for name, tensor in site.state.items()}
    assert give_final(site, other).error.code == REASONS["final-already-given"].code
    assert give_final(site, number=2).error.code == REASONS["bad-message"].code
    assert command(site, "--release", "--yes") == 2
    assert "nobody has looked at this generator" in capsys.readouterr().err

    assert command(site, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    folder = folder_of(site.home, approval)
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "http" not in page
    for path in (folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o077 == 0
    findings = read_findings(site.home, approval)
    assert told["patients"] == len(findings.trained)
    assert len(findings.trained) + len(findings.held_out) == 12
    assert findings.images == 6

    with pytest.raises(Refusal, match="gate-undecided"):
        ask(site)
    assert command(site, "--release", "--yes") == 0
    sent = ask(site)
    total, said = read_release(release_records(sent), 1)
    assert total is not None
    z = approval.releases["copies"]
    assert (said.release, said.verdict, said.model) == ("gate", "released", findings.model)
    assert (said.sigma, said.bound) == (z, 1.0)
    assert said.epsilon == claim(((z, 1.0, 1),), 1e-3)
    reserve, settle = read_lines(site.home)[2:]
    assert (reserve["round"], reserve["state"], settle["round"]) == ("copies", findings.model, "copies")
    verify(site.home)
    # Once: another word is refused, and the stored bytes are sent again.
    for word in ("--veto", "--release"):
        assert command(site, word, "--yes") == 3
        assert "1043 gate-decided" in capsys.readouterr().err
    assert ask(site) == sent
    reply = over_wire(site.home, "query.release", release_order(ReleaseOrder("gate", site.resolved.hash)))
    assert set(reply.content["facts"]) == {field.name for field in fields(ReleaseFacts)}
    assert float(load(sent)[RELEASE]) == float(total)
    text = str(dict(reply.content["facts"]))
    assert "patient-" not in text
    assert str(site.home) not in text
    assert "auc" not in text
    assert [
        line["kind"]
        for line in read_lines(
            site.home,
        )
    ][2:] == ["reserve", "settle"]


def test_a_veto_sends_a_word_and_no_number_and_costs_nothing(site: Any) -> None:
    approval = find_approval(site.home, site.resolved.hash)
    assert approval is not None
    decide(site.home, approval, "not released", {"patient-00": True}, "m" * 64)
    sent = ask(site)
    total, said = read_release(release_records(sent), 1)
    assert total is None
    assert (said.verdict, said.sigma, said.bound, said.epsilon) == ("not released", 0.0, 0.0, 0.0)
    assert [line["kind"] for line in read_lines(site.home)] == ["open", "earmark"]
    with pytest.raises(Refusal, match="gate-decided"):
        decide(site.home, approval, "released", {}, "m" * 64)
    assert ask(site) == sent


def test_without_an_epsilon_for_it_no_count_leaves(make_site: Any) -> None:
    made = make_site(releases={"leakage_gate": True}, privacy={"canaries": 0}, evaluation=DRAWS)
    approval = made.approve()
    assert approval.releases == {}
    decide(made.home, approval, "released", {"patient-00": True}, "m" * 64)
    total, said = read_release(release_records(ask(made)), 1)
    assert total is None
    assert said.verdict == "released"
    assert "reserve" not in [line["kind"] for line in read_lines(made.home)]


def test_a_patient_counts_at_most_once_in_noise_that_is_charged(site: Any) -> None:
    approval = find_approval(site.home, site.resolved.hash)
    assert approval is not None
    counts = []
    for number in range(40):
        home = Path(shutil.copytree(site.home, site.home.parent / f"copy-{number}"))
        decide(home, approval, "released", {f"p{i}": i % 2 == 0 for i in range(12)}, "m" * 64)
        counts.append(float(load(ask(site, home))[RELEASE]))
    found, z = torch.tensor(counts), approval.releases["copies"]
    assert float(found.mean()) == pytest.approx(6.0, abs=4 * z / 40**0.5)
    assert 0.6 * z < float(found.std()) < 1.5 * z


def test_killed_at_every_flush_of_a_decision(site: Any) -> None:
    approval = find_approval(site.home, site.resolved.hash)
    assert approval is not None
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    for instant in range(8):
        home = Path(shutil.copytree(site.home, site.home.parent / f"killed-{instant}"))

        def stopped(home: Path, instant: int) -> None:
            kill_at_flush(instant)
            decide(home, approval, "released", {"p": True}, "m" * 64)
            ask(site, home)

        if wait_for(in_child(partial(stopped, home, instant))) == 0:
            break
        if not list(home.glob("replies/*copies*")):  # nothing was stored, so nothing can have left
            with pytest.raises(Refusal, match="gate-undecided"):
                ask(site, home)
            decide(home, approval, "released", {"p": True}, "m" * 64)
        first = ask(site, home)
        assert ask(site, home) == first
        assert [line["kind"] for line in read_lines(home)][2:] == ["reserve", "settle"]
    assert instant >= 5


def test_nobodys_flag_depends_on_who_else_is_there(site: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(9, 3, 32, 32, generator=generator)
    features = torch.randn(9, 8, generator=generator)
    drawn = Looks(features[:4] + 0.01, thumbnails(images[:4]))
    scale = site.resolved.public.near

    def pair(rows: list[int]) -> Any:
        records = [Record("p", Path(f"{row}.png"), ()) for row in rows]
        return nearest_pair(records, Looks(features[rows], thumbnails(images[rows])), drawn, scale)

    near = pair([5, 2])
    assert near.near
    assert (near.image.name, near.drawn) == ("2.png", 2)
    assert near.ratio < 1
    assert not pair([7]).near
    # With several images a patient counts once, by the nearest.
    assert pair([7, 2, 2]).near
    assert pair([7, 8]).features == min(pair([7]).features, pair([8]).features)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = torch.Generator().manual_seed(5)
    trained = torch.randn(60, generator=generator, dtype=torch.float64) + 1
    held_out = torch.randn(40, generator=generator, dtype=torch.float64)
    found = compare(trained, held_out)
    brute = sum(float(a > b) for a in trained for b in held_out) / 2400
    assert found.auc == pytest.approx(brute)
    assert found.low < found.auc < found.high
    assert found.alarming
    nothing = compare(held_out[:20], held_out[20:])
    assert not nothing.alarming
    assert compare(torch.ones(6).double(), torch.ones(7).double()).auc == 0.5


def test_gate_is_refused_where_the_study_has_none(make_site: Any) -> None:
    made = make_site(privacy={"canaries": 0})
    made.approve()
    with pytest.raises(Refusal, match="bad-message"):
        ask(made)
    assert give_final(made).error.code == REASONS["bad-message"].code
    assert main(["leakage", "tiny", "--home", str(made.home)]) == 2
