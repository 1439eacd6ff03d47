"""The audit tap through the round loop, the checkpoints and the report; what a person is told of noise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from polyclinic.common.generators.public import hash_state
from polyclinic.common.privacy.tap import COINS, SUM, tap_like
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import CODE_VERSION, Resolved, parse_study
from polyclinic.common.wire import ReplyFacts, pack_reply, reply_records
from polyclinic.common.wire_reading import read_order
from polyclinic.server.checkpoints import (
    Checkpoint,
    RoundRecord,
    load_checkpoint,
    load_record,
    load_taps,
    save_checkpoint,
)
from polyclinic.server.plan import plan, words
from polyclinic.server.report.html import read_metrics, write_report
from polyclinic.server.rounds import _open, run_rounds
from polyclinic.server.summary import audits, guarantee
from polyclinic.simulation.grid import InProcessGrid, _identify
from tests.server.report_fakes import fake_run
from tests.server.report_page import Page, assert_self_contained
from tests.server.test_audit import CLAIM, ROUNDS, audit, rng, simulate

FACTS = ReplyFacts(
    round=1,
    sigma=CLAIM.sigma,
    sampling_rate=CLAIM.rate,
    steps=CLAIM.steps,
    clip=CLAIM.clip,
    divisor=CLAIM.divisor,
    tau=CLAIM.tau,
    epsilon=CLAIM.epsilon,
    delta=CLAIM.delta,
    code_version=CODE_VERSION,
    base_hash="b",
    study_hash="x",
    approval="x",
    ledger_sequence=1,
    ledger_hash="x",
    flops=1.0,
)


def test_taps_are_kept_beside_the_state_and_never_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = {"w": torch.zeros(3)}
    study = parse_study(
        {
            "name": "tapped",
            "evaluation": {"prompts": [{"text": "a"}]},
            "privacy": {
                "canaries": 500,
                "clip": CLAIM.clip,
                "sampling_rate": CLAIM.rate,
                "delta": CLAIM.delta,
            },
            "training": {"rounds": 2, "steps_per_round": CLAIM.steps, "learning_rate": 1.0},
            "federation": {"grace_s": 0.0, "deadline_s": 5.0},
        },
        "test",
    )
    resolved = Resolved(study=study, base_hash="b", start_hash="s", reference_hash="r")
    sites = {"good": 1.0, "quiet/ward": 0.3}
    drawn = {
        name: simulate(CLAIM, rng(7), coordinates=500, rounds=2, noise=noise) for name, noise in sites.items()
    }
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        order, decode = read_order(message.content)
        state = decode("bf16")
        taps, coins = drawn[str(context.node_config["home"]).removeprefix("/sites/")]
        tap = {SUM: taps[0, order.round - 1]} | ({COINS: coins[0].float()} if order.round == 2 else {})
        facts = replace(FACTS, round=order.round, study_hash=order.study_hash)
        reply = pack_reply({name: torch.ones_like(t) for name, t in state.items()}, facts, tap)
        return Message(reply_records(reply), reply_to=message)

    _identify(1)
    grid = InProcessGrid([Path("/sites") / name for name in sites], app)
    record = RoundRecord(round=0, state_hash=hash_state(start))
    save_checkpoint(tmp_path, Checkpoint(record, start, start))
    run_rounds(grid, resolved, tmp_path, names=lambda _: {2: "good", 3: "quiet/ward"})
    assert "AUDIT ALARM, round 1, quiet/ward: noise measured 0.2" in capsys.readouterr().err
    after = load_checkpoint(tmp_path, 2)
    assert after.state.keys() == after.average.keys() == {"w"}
    assert torch.equal(after.state["w"], torch.full((3,), 2.0))
    assert load_taps(tmp_path, 0) == {}
    assert {name: set(tap) for name, tap in load_taps(tmp_path, 1).items()} == {n: {SUM} for n in sites}
    assert torch.equal(load_taps(tmp_path, 2)["quiet/ward"][SUM], drawn["quiet/ward"][0][0, 1])
    found = audits(tmp_path, resolved, [load_record(tmp_path, number) for number in (0, 1, 2)])
    assert [(a.site, bool(a.alarms), a.revealed) for a in found] == [
        ("good", False, True),
        ("quiet/ward", True, True),
    ]


@pytest.mark.parametrize(
    "changes", [{"sigma": 0.0}, {"divisor": 0.0}, {"sigma": math.inf}, {"epsilon": -1.0}]
)
def test_a_reply_whose_mechanism_cannot_be_is_refused(changes: dict[str, float]) -> None:
    state, tap = {"w": torch.zeros(3)}, tap_like(100, last=False)
    content = reply_records(pack_reply(state, replace(FACTS, **changes), tap))  # type: ignore[arg-type]
    reply = Message(content, dst_node_id=1, message_type="train")
    with pytest.raises(Refusal, match="bad-message"):
        _open(reply, state, tap)
    assert _open(
        Message(reply_records(pack_reply(state, FACTS, tap)), 1, "train"), state, tap
    ).tap.keys() == {SUM}


def test_report_shows_alarms_and_what_they_are_worth(tmp_path: Path) -> None:
    good, bad = (simulate(CLAIM, rng(), noise=noise) for noise in (1.0, 0.5))
    entries = [
        audit(good[0][0], good[1][0]),
        audit(bad[0][0], bad[1][0]).model_copy(update={"site": "<b>coast</b>"}),
        audit(good[0][0], None).model_copy(update={"site": "valley"}),
    ]
    metrics = fake_run(tmp_path, last=ROUNDS).model_copy(update={"audit": entries})
    text = write_report(tmp_path, metrics).read_text()
    assert_self_contained(text)
    page = Page(text).text
    for wanted in ("ALARM <b>coast</b>: round 1: noise measured 0.5", "passes so far", "coins not revealed",
                   "AUDIT ALARM at <b>coast</b>; audited at 3 of 4 sites so far",
                   "Not audited: coast.", "A low bound proves nothing"):  # fmt: skip
        assert wanted in page, wanted
    assert read_metrics(tmp_path / "metrics.json").audit == entries
    assert "ALARM" in (tmp_path / "MODEL_CARD.md").read_text()
    write_report(tmp_path, metrics.model_copy(update={"audit": entries[:1]}))
    assert "ALARM" not in (tmp_path / "report.html").read_text()
    write_report(tmp_path, metrics.model_copy(update={"audit": []}))
    assert "without an audit tap" in (tmp_path / "report.html").read_text()


def test_noise_that_is_not_cryptographic_is_named_in_plan_and_report() -> None:
    told = {}
    for noise in ("aes-ctr", "device"):
        values = {
            "name": "noise",
            "data": {"image_size": 32},
            "generator": {"size": "msdm-tiny", "max_tokens": 16},
            "privacy": {"noise": noise},
            "training": {"rounds": 1, "steps_per_round": 2},
            "evaluation": {"prompts": [{"text": "a"}]},
        }
        study = parse_study(values, "test")
        resolved = Resolved(study=study, base_hash="b", start_hash="s", reference_hash="r")
        told[noise] = (words(plan(study)), " ".join(guarantee(resolved)))
    assert all("NOT cryptographic" in text for text in told["device"])
    assert all("AES-256-CTR" in text and "NOT crypt" not in text for text in told["aes-ctr"])


@pytest.mark.parametrize(("canaries", "allowed"), [(0, True), (100, True), (99, False), (-1, False)])
def test_too_few_canaries_are_refused(canaries: int, allowed: bool) -> None:
    values = {
        "name": "few",
        "privacy": {"canaries": canaries},
        "evaluation": {"prompts": [{"text": "a"}]},
    }
    if allowed:
        assert parse_study(values, "test").privacy.canaries == canaries
    else:
        with pytest.raises(BadInput, match=r"privacy\.canaries"):
            parse_study(values, "test")


@pytest.fixture(autouse=True)
def _in_a_run() -> None:
    """Messages are made inside a run; no other test has to have begun one before."""
    _identify(1)
