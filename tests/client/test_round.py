"""A round at a site, end to end on drawn images: PRIVACY.md, rules 9, 12 and 14, over the wire."""

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import polyclinic.simulation.grid  # noqa: F401 - adds what only a simulated site answers
from polyclinic.client import launcher, training
from polyclinic.client.app import SIMULATED_SITES, app
from polyclinic.client.journal_view import read_journal
from polyclinic.client.ledger import open_ledger
from polyclinic.client.ledger_books import open_books
from polyclinic.client.ledger_chain import read_lines
from polyclinic.client.training import answer_round
from polyclinic.common.files import canonical_json, sha256_file
from polyclinic.common.generators.base import Tensors
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.privacy.clipping import TAU
from polyclinic.common.privacy.tap import tap_like
from polyclinic.common.refusals import REASONS, Refusal
from polyclinic.common.wire_reading import RoundOrder, check_like, order_records, unpack_reply
from polyclinic.server.replies import as_sent, read_reply

PLAIN = {"privacy": {"enabled": False}}
SECRET = "patient-07 has a polyp"


@pytest.fixture(autouse=True)
def _identity() -> None:
    """Say which task this is, as Flower does."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 2, 1, 2


def kinds(home: Path) -> list[str]:
    return [line["kind"] for line in read_lines(home)]


def cut_to_reservation(home: Path) -> None:
    """Leave the ledger as a process killed after it reserved the first round leaves it."""
    lines = read_lines(home)
    del lines[[line["kind"] for line in lines].index("reserve") + 1 :]
    (home / "ledger.jsonl").write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))
    (home / "ledger.head").write_text(json.dumps({"sequence": len(lines) - 1, "hash": lines[-1]["hash"]}))


def ask(site: Any, number: int = 1, state: Tensors | None = None, *, late: bool = False) -> bytes:
    return answer_round(
        site.home,
        site.order(number),
        lambda transport: as_sent(state or site.state, transport),
        in_time=lambda: not late,
    )


def over_wire(home: Path | None, content: RecordDict, *, ttl: float = 60.0, config: Any = None) -> Message:
    message = Message(content, dst_node_id=2, message_type="train", group_id="1", ttl=ttl)
    message.metadata.__dict__["_message_id"] = "m"
    node = {"home": str(home)} if config is None else config
    return app(message, Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={}))


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("trained again")


def fault(*_: Any, **__: Any) -> None:
    raise RuntimeError(SECRET)


def test_private_round_is_charged_stored_and_repeated_byte_for_byte(
    make_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    approval = site.approve()
    reply = ask(site)
    difference, facts, _ = unpack_reply(reply)
    check_like(difference, site.state)
    assert all(bool(tensor.any()) for tensor in difference.values())
    assert kinds(site.home) == ["open", "earmark", "tap", "reserve", "settle"]
    tap, line = read_lines(site.home)[2:4]
    coins = hashlib.sha256(approval.coins.encode()).hexdigest()
    assert (tap["approval"], tap["coordinates"], tap["coins"]) == (approval.id, len(approval.coins), coins)
    assert (line["sigma"], line["rate"], line["steps"], line["tau"]) == (approval.sigma, 0.5, 2, TAU)
    assert facts.epsilon == claim(((approval.sigma, 0.5, 2),), 1e-3)
    assert (facts.ledger_sequence, facts.ledger_hash) == (3, line["hash"])
    assert (facts.sigma, facts.clip, facts.divisor, facts.tau, facts.steps) == (
        approval.sigma,
        1.0,
        6.0,
        TAU,
        2,
    )
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train", never)
        assert ask(site) == reply
        assert ask(site, late=True) == reply  # sending stored bytes costs nothing, even late
        other = {**site.state, "conv_out.bias": site.state["conv_out.bias"] + 1}
        with pytest.raises(Refusal, match="round-already-answered"):
            ask(site, state=other)
    assert kinds(site.home) == ["open", "earmark", "tap", "reserve", "settle"]

    # A reply that was stored before its settle line was written is sent, and settled now.
    cut_to_reservation(site.home)
    assert ask(site) == reply
    assert kinds(site.home) == ["open", "earmark", "tap", "reserve", "settle"]

    # A killed attempt left a reservation and nothing else: used again, with fresh randomness.
    cut_to_reservation(site.home)
    shutil.rmtree(site.home / "replies")
    again, facts_again, _ = unpack_reply(ask(site))
    assert kinds(site.home) == ["open", "earmark", "tap", "reserve", "settle"]
    assert facts_again == facts
    assert not any(torch.equal(again[name], difference[name]) for name in difference)

    assert unpack_reply(ask(site, 2))[1].epsilon == claim(((approval.sigma, 0.5, 4),), 1e-3)


def test_what_is_refused_before_training_spends_nothing(
    make_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    with pytest.raises(Refusal, match="not-approved"):
        ask(site)
    site.approve()
    monkeypatch.setattr(training, "_train", never)
    with pytest.raises(Refusal, match="round-too-late"):
        ask(site, late=True)
    for number in (0, 4, -1):
        with pytest.raises(Refusal, match="bad-message"):
            ask(site, number)
    first = next(iter(site.state))
    for odd in (
        {name: t for name, t in site.state.items() if name != first},
        {**site.state, first: site.state[first] * torch.nan},
        {**site.state, first: site.state[first].flatten()[:1]},
    ):
        with pytest.raises(Refusal, match="bad-state"):
            ask(site, state=odd)
    shutil.rmtree(site.home / "cache")
    with pytest.raises(Refusal, match="site-not-ready"):
        ask(site)
    assert kinds(site.home) == ["open", "earmark", "tap"]


def test_the_budgets_end_and_a_broken_reply_have_their_codes_over_the_wire(make_site: Any) -> None:
    site = make_site()
    approval = site.approve()

    def code_of(number: int) -> int:
        reply = over_wire(site.home, order_records(site.order(number), site.state))
        assert str(site.home) not in reply.error.reason
        return int(reply.error.code)

    reply = ask(site)
    path = next((site.home / "replies").iterdir())
    path.write_bytes(reply[:-1])
    assert code_of(1) == REASONS["reply-broken"].code == 1019
    path.write_bytes(reply)
    with open_books(site.home) as ledger:
        ledger.close(approval.id)
    assert code_of(2) == REASONS["budget-exhausted"].code == 1003
    assert ask(site) == reply  # what was released stays released
    assert kinds(site.home) == ["open", "earmark", "tap", "reserve", "settle", "close"]


@pytest.mark.parametrize("where", ["_train", "_facts", "pack_reply"])
def test_a_seen_failure_is_spent_and_its_text_stays_at_the_site(
    make_site: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    site = make_site()
    site.approve()
    with monkeypatch.context() as patch:
        if where != "_train":
            patch.setattr(training, "_train", lambda *_: (site.state, {}))
        patch.setattr(training, where, fault)
        reply = over_wire(site.home, order_records(site.order(), site.state))
    assert reply.error.code == REASONS["site-fault"].code
    assert reply.error.reason == f"site-fault: {REASONS['site-fault'].cause}"
    assert SECRET in (site.home / "site.log").read_text()
    assert (site.home / "site.log").stat().st_mode & 0o077 == 0
    assert kinds(site.home) == ["open", "earmark", "tap", "reserve", "spent"]
    with open_books(site.home) as ledger:
        assert ledger.history(ledger.lines[1]["approval"])[0][2] == 2
    again = over_wire(site.home, order_records(site.order(), site.state))
    assert again.error.code == REASONS["round-already-answered"].code


def test_nothing_leaves_even_where_the_log_cannot_be_written(tmp_path: Path, make_site: Any) -> None:
    site = make_site()
    content = order_records(site.order(), site.state)
    gone = over_wire(tmp_path / SECRET / "gone", content)
    (site.home / "site.log").mkdir()  # as good as a full disk
    unwritable = over_wire(site.home, content)
    nobody = over_wire(None, content, config={})
    for reply, reason in ((gone, "not-approved"), (unwritable, "not-approved"), (nobody, "site-fault")):
        assert reply.error.reason == f"{reason}: {REASONS[reason].cause}"


def test_reply_over_the_wire_is_the_closed_schema(make_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()
    site.approve()
    reply = over_wire(site.home, order_records(site.order(), site.state))
    assert not reply.has_error()
    difference, facts, _ = read_reply(reply.content, site.state, tap_like(2000, last=False))
    stored = unpack_reply(next((site.home / "replies").iterdir()).read_bytes())
    assert facts == stored[1]
    assert all(torch.equal(difference[name], stored[0][name]) for name in difference)
    text = str(asdict(facts))
    assert "patient-" not in text
    assert str(site.home) not in text


def test_expired_message_is_refused_before_anything_is_spent(make_site: Any) -> None:
    site = make_site()
    site.approve()
    content = order_records(site.order(), site.state)
    message = Message(content, dst_node_id=2, message_type="train", group_id="1", ttl=0.01)
    message.metadata.__dict__["_message_id"] = "m"
    time.sleep(0.05)
    config = {"home": str(site.home)}
    reply = app(message, Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={}))
    assert reply.error.code == REASONS["round-too-late"].code
    assert kinds(site.home) == ["open", "earmark", "tap"]


@pytest.mark.parametrize(
    ("tables", "policy", "code"),
    [
        (PLAIN, "", "not-private-forbidden"),
        (PLAIN | {"training": {"test_key": "k"}}, "allow_not_private = true\n", "test-randomness-forbidden"),
        ({}, "min_sigma = 50.0\n", "noise-below-floor"),
    ],
)
def test_study_the_policy_forbids_is_refused_over_the_wire_whatever_the_message_says(
    make_site: Any, tables: Any, policy: str, code: str
) -> None:
    site = make_site(policy, **tables)
    with pytest.raises(Refusal, match=code):
        site.approve()
    # Approved while the policy allowed it; then the site closed its policy.
    opened = "allow_not_private = true\nallow_test_randomness = true\n"
    strict = (site.home / "policy.toml").read_text()
    lines = [line for line in strict.splitlines() if not line.startswith(("allow", "min_sigma"))]
    (site.home / "policy.toml").write_text("\n".join(lines) + "\n" + opened)
    approval = site.approve()
    (site.home / "policy.toml").write_text(strict)
    said = {**asdict(site.order()), "allow_not_private": True, "allow_test_randomness": True, "sigma": 0.0}
    sly = order_records(site.order(), site.state)
    sly["round"] = ConfigRecord(said)
    assert over_wire(site.home, sly).error.code == REASONS["bad-message"].code
    honest = over_wire(site.home, order_records(site.order(), site.state))
    assert honest.error.code == REASONS["approval-drift"].code
    # Even an approval that was made to fit by hand does not open the policy.
    path = site.home / "approvals" / f"{site.resolved.hash}.json"
    path.write_text(path.read_text().replace(approval.policy_hash, sha256_file(site.home / "policy.toml")))
    assert over_wire(site.home, order_records(site.order(), site.state)).error.code == REASONS[code].code
    assert "reserve" not in kinds(site.home)


def test_plain_round_says_infinity_and_test_randomness_repeats(make_site: Any) -> None:
    site = make_site(
        "allow_not_private = true\nallow_test_randomness = true\n", **PLAIN, training={"test_key": "k"}
    )
    site.approve()
    reply = ask(site)
    facts = unpack_reply(reply)[1]
    assert facts.epsilon == float("inf")
    assert (facts.sigma, facts.tau, facts.clip) == (0.0, 0.0, float("inf"))
    cut_to_reservation(site.home)
    shutil.rmtree(site.home / "replies")
    assert ask(site) == reply


def test_a_hospital_does_not_say_its_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def query(config: dict[str, Any]) -> Message:
        message = Message(RecordDict(), dst_node_id=2, message_type="query.name", group_id="names")
        message.metadata.__dict__["_message_id"] = "m"
        return app(
            message, Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
        )

    monkeypatch.delenv(SIMULATED_SITES, raising=False)
    assert query({"home": str(tmp_path / "ward-7")}).error.code == REASONS["bad-message"].code
    monkeypatch.setenv(SIMULATED_SITES, f"{tmp_path}/a:{tmp_path}/b")
    assert query({"home": str(tmp_path / "ward-7")}).error.code == REASONS["bad-message"].code
    assert query({"partition-id": 1}).content["name"]["site"] == "b"


def test_an_idle_site_says_so_and_one_at_work_does_not(make_site: Any) -> None:
    site = make_site()
    site.approve()
    before = (site.home / "ledger.jsonl").read_bytes()

    def question() -> Message:
        message = Message(RecordDict(), dst_node_id=2, message_type="query.idle", group_id="1", ttl=60.0)
        message.metadata.__dict__["_message_id"] = "m"
        config = {"home": str(site.home)}
        context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
        return launcher._installed()(message=message, context=context)

    assert dict(question().content) == {}  # rule 12: nothing leaves with it
    with open_ledger(site.home):
        assert question().error.code == REASONS["another-process"].code
    assert (site.home / "ledger.jsonl").read_bytes() == before
    assert [line["type"] for line in read_journal(site.home)[0][-4:]] == ["query.idle"] * 4


def test_order_for_an_unknown_study_reveals_nothing(make_site: Any) -> None:
    site = make_site()
    site.approve()
    for name, code in (("0" * 64, "not-approved"), ("../secret", "bad-message")):
        reply = over_wire(site.home, order_records(RoundOrder(1, name), site.state))
        assert reply.error.reason == f"{code}: {REASONS[code].cause}"
