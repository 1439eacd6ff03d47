"""PRIVACY.md, rule 15, at a site: charged, bounded, stored, once; over the wire and through kill -9."""

import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load

from polyclinic.client import releases
from polyclinic.client.app import app
from polyclinic.client.approval import Approval, set_apart
from polyclinic.client.approval_terms import terms, words
from polyclinic.client.ledger import open_ledger
from polyclinic.client.ledger_books import open_books
from polyclinic.client.ledger_chain import read_lines
from polyclinic.client.ledger_view import spending, verify
from polyclinic.client.releases import answer_release, one_image_each
from polyclinic.common.data.cache import load_features
from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.features.fourier import BOUND
from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.sums import TAU, bounded
from polyclinic.common.refusals import REASONS, BadInput, Refusal
from polyclinic.common.wire import RELEASE, ReleaseFacts, release_records
from polyclinic.common.wire_reading import ReleaseOrder, read_release, release_order
from tests.client.ledger_home import in_child, kill_at_flush, wait_for

ASKS = {"fidelity_epsilon": 1.0, "fourier_features": 64}


@pytest.fixture
def site(make_site: Any) -> Any:
    return make_site(releases=ASKS, privacy={"canaries": 0})


def ask(site: Any, release: str = "fidelity", *, late: bool = False, home: Path | None = None) -> bytes:
    order = ReleaseOrder(release, site.resolved.hash)
    return answer_release(home or site.home, order, in_time=lambda: not late)


def over_wire(home: Path, content: RecordDict) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 2, 1, 2
    message = Message(content, dst_node_id=2, message_type="query.release", group_id="fidelity", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m"
    context = Context(run_id=1, node_id=2, node_config={"home": str(home)}, state=RecordDict(), run_config={})
    return app(message, context)


def kinds(home: Path) -> list[str]:
    return [line["kind"] for line in read_lines(home)]


def vectors(approval: Approval, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each patient's part, by the fixed key of this test."""
    return dict(zip(features, one_image_each(features, approval, KeyedRandom(bytes(32))), strict=True))


def test_the_claim_covers_rounds_and_release_together(site: Any) -> None:
    approval = site.approve()
    privacy, steps = site.resolved.study.privacy, site.resolved.study.total_steps
    z = approval.releases["fidelity"]
    assert claim(((z, 1.0, 1),), privacy.delta) <= 1.0
    assert claim(((0.99 * z, 1.0, 1),), privacy.delta) > 1.0
    whole = ((z, 1.0, 1), (approval.sigma, privacy.sampling_rate, steps))
    assert approval.epsilon == claim(whole, privacy.delta) <= privacy.epsilon
    earmark = read_lines(site.home)[1]
    assert earmark["releases"] == {"fidelity": z}
    assert earmark["epsilon"] == approval.epsilon
    # The rounds alone would have been allowed less noise.
    assert claim(whole[1:], privacy.delta) < 0.99 * privacy.epsilon


def test_release_is_charged_stored_and_repeated_byte_for_byte(site: Any) -> None:
    approval = site.approve()
    sent = ask(site)
    reserve, settle = read_lines(site.home)[2:]
    z = approval.releases["fidelity"]
    assert (reserve["round"], reserve["sigma"], reserve["rate"], reserve["steps"]) == ("fidelity", z, 1.0, 1)
    assert reserve["tau"] == TAU
    assert settle["round"] == "fidelity"
    total, facts = read_release(release_records(sent), 65)
    assert total is not None
    assert (facts.sigma, facts.bound, facts.tau) == (z, BOUND, TAU)
    assert facts.epsilon == claim(((z, 1.0, 1),), 1e-3)
    assert (facts.ledger_sequence, facts.ledger_hash) == (reserve["sequence"], reserve["hash"])
    assert ask(site) == ask(site, late=True) == sent
    assert kinds(site.home) == ["open", "earmark", "reserve", "settle"]
    verify(site.home)
    assert spending(site.home)["studies"][0]["releases"]["fidelity"]["spent"] is True
    path = next((site.home / "replies").iterdir())
    path.write_bytes(sent[:-1])
    with pytest.raises(Refusal, match="reply-broken"):
        ask(site)


def test_noise_in_a_release_has_the_deviation_that_is_charged(site: Any) -> None:
    approval = site.approve()
    exact = sum(
        bounded(v, BOUND)
        for v in vectors(approval, load_features(site.home / "cache", approval.cache_index)).values()
    )
    rows = []
    for number in range(12):
        home = Path(shutil.copytree(site.home, site.home.parent / f"copy-{number}"))
        rows.append(load(ask(site, home=home))[RELEASE].double() - exact)
    # One image a patient here, so that all attempts add the same vectors, with other noise.
    found = torch.stack(rows)
    assert float(found.std()) == pytest.approx(approval.releases["fidelity"] * BOUND, rel=0.1)
    assert not any(torch.equal(found[0], other) for other in found[1:])


def test_one_patient_added_or_removed_moves_the_sum_by_at_most_the_bound(site: Any) -> None:
    approval = site.approve()
    features = load_features(site.home / "cache", approval.cache_index)
    # Several images a patient; one who is not finite; one whose features are huge.
    generator = torch.Generator().manual_seed(3)
    for number, patient in enumerate(list(features)):
        rows = features[patient].repeat(1 + number % 3, 1)
        features[patient] = rows + torch.randn(rows.shape, generator=generator)
    first, second, *_ = features
    features[first] = features[first] * float("nan")
    features[second] = features[second] * 1e30
    whole = vectors(approval, features)
    for patient in features:
        rest = {name: rows for name, rows in features.items() if name != patient}
        less = vectors(approval, rest)
        # Nobody else's image, and so nobody else's part, is another.
        assert all(torch.equal(less[n], whole[n]) or n == first for n in rest)
        moved = bounded(whole[patient], BOUND)
        assert float(moved.norm()) <= BOUND
        assert bool(moved.any()) == (patient != first)


def test_schema_of_a_release_is_closed(site: Any) -> None:
    site.approve()
    reply = over_wire(site.home, release_order(ReleaseOrder("fidelity", site.resolved.hash)))
    assert not reply.has_error()
    assert set(reply.content) == {"sum", "facts", "hashes"}
    assert set(reply.content["facts"]) == {field.name for field in fields(ReleaseFacts)}
    assert "patient-" not in str(dict(reply.content["facts"]))
    read_release(reply.content, 65)
    for change in ({"loss": 0.1}, {"patients": 12}):
        more = RecordDict({**reply.content, "facts": ConfigRecord({**reply.content["facts"], **change})})
        with pytest.raises(Refusal, match="bad-message"):
            read_release(more, 65)
    with pytest.raises(Refusal, match="bad-message"):
        read_release(RecordDict({**reply.content, "more": ConfigRecord({"n": 1})}), 65)
    with pytest.raises(Refusal, match="bad-state"):
        read_release(reply.content, 64)
    sly = release_order(ReleaseOrder("fidelity", site.resolved.hash))
    sly["sum"]["sigma"] = 0.0
    assert over_wire(site.home, sly).error.code == REASONS["bad-message"].code


def test_wrong_questions_are_refused_and_spend_nothing(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refusal, match="not-approved"):
        ask(site)
    approval = site.approve()
    for release in ("copies", "everything", ""):
        with pytest.raises(Refusal, match="bad-message"):
            ask(site, release)
    with pytest.raises(Refusal, match="round-too-late"):
        ask(site, late=True)
    with open_books(site.home) as ledger:
        for change in ({"sigma": 0.9 * approval.releases["fidelity"]}, {"steps": 2}, {"item": "copies"}):
            asked = {
                "approval": approval.id,
                "item": "fidelity",
                "state": "s",
                "sigma": approval.releases["fidelity"],
                "rate": 1.0,
                "steps": 1,
                "tau": TAU,
            }
            with pytest.raises(Refusal, match="budget-exhausted"):
                ledger.reserve(**{**asked, **change})  # type: ignore[arg-type]
        ledger.close(approval.id)
    with pytest.raises(Refusal, match="budget-exhausted"):
        ask(site)
    assert kinds(site.home) == ["open", "earmark", "close"]


def test_a_seen_failure_is_spent_and_its_text_stays(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.approve()

    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("patient-07 has a polyp")

    with monkeypatch.context() as patch:
        patch.setattr(releases, "noisy_sum", fault)
        reply = over_wire(site.home, release_order(ReleaseOrder("fidelity", site.resolved.hash)))
    assert reply.error.reason == f"site-fault: {REASONS['site-fault'].cause}"
    assert kinds(site.home)[2:] == ["reserve", "spent"]
    with pytest.raises(Refusal, match="round-already-answered"):
        ask(site)


def test_killed_at_every_flush_of_a_release(site: Any) -> None:
    site.approve()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    seen = set()
    for instant in range(7):
        home = Path(shutil.copytree(site.home, site.home.parent / f"killed-{instant}"))

        def stopped(home: Path, instant: int) -> None:
            kill_at_flush(instant)
            ask(site, home=home)

        assert wait_for(in_child(partial(stopped, home, instant))) == -9
        stored = (home / "replies").exists() and any((home / "replies").glob("*.safetensors"))
        seen.add((stored, *kinds(home)[2:]))
        before = next((home / "replies").glob("*.safetensors")).read_bytes() if stored else None
        sent = ask(site, home=home)
        assert before in (None, sent)  # what was stored is what is sent
        assert kinds(home)[2:] == ["reserve", "settle"]
        with open_ledger(home) as ledger:
            assert len(ledger.history(ledger.lines[1]["approval"])) == 1
    assert {(False, "reserve"), (True, "reserve")} <= seen


def test_a_cap_that_is_too_small_is_refused_at_approval(site: Any) -> None:
    policy = site.home / "policy.toml"
    policy.write_text(policy.read_text().replace("epsilon_per_study = 20.0", "epsilon_per_study = 0.9"))
    with pytest.raises(BadInput, match=r"releases\.fidelity_epsilon"):
        site.approve()
    assert kinds(site.home) == ["open"]


def test_another_extractor_is_refused(site: Any) -> None:
    public = site.resolved.public.model_copy(update={"extractor": "0" * 64})
    site.resolved = site.resolved.model_copy(update={"public": public})
    with pytest.raises(Refusal, match="not the study's feature extractor"):
        site.approve()
    assert efficientnet().weights != "0" * 64


def test_approval_says_what_leaves_once_and_what_it_costs(make_site: Any) -> None:
    site = make_site(releases=ASKS | {"leakage_gate": True, "copies_epsilon": 0.5})
    facts = terms(site.home, "site-a", site.resolved, site.records, BaseFiles(vae=site.vae))
    text = " ".join(words(facts).split())
    assert set(facts["releases"]) == {"fidelity", "copies"}
    assert "fidelity (DP-CMMD): one sum of 65 numbers" in text
    assert "copies: with `released`, and only then, the number of patients" in text
    assert "That word leaves, never why, and no membership score ever" in text
    assert "10% of your patients" in text
    assert f"epsilon {facts['epsilon']:.3f} at delta 0.001 for the whole study, with what leaves once" in text
    for name in (field.name for field in fields(ReleaseFacts)):
        assert name in facts["leaves_once"]
    plain = make_terms_without(make_site, site)
    assert "What leaves once" not in plain


def make_terms_without(make_site: Any, site: Any) -> str:
    study = site.resolved.study.model_copy(update={"releases": type(site.resolved.study.releases)()})
    resolved = site.resolved.model_copy(update={"study": study, "public": None})
    return words(terms(site.home, "site-a", resolved, site.records, BaseFiles(vae=site.vae)))


def test_who_is_kept_out_of_training_depends_on_nobody_else(make_site: Any) -> None:
    site = make_site(releases={"leakage_gate": True, "held_out": 0.3})
    trained, held_out = set_apart(site.records, site.resolved)
    assert trained
    assert held_out
    for out in site.records:
        rest = [r for r in site.records if r.patient != out.patient]
        again = set_apart(rest, site.resolved)
        assert [r for r in trained if r in rest] == again[0]
        assert [r for r in held_out if r in rest] == again[1]
    assert set_apart(site.records, site.resolved.model_copy(update={"study": plain(site)}))[1] == []


def plain(site: Any) -> Any:
    asked = site.resolved.study.releases.model_copy(update={"leakage_gate": False})
    return site.resolved.study.model_copy(update={"releases": asked})
