"""PRIVACY.md, rule 17, at the site: canaries get what patients get, and leave no trace in the generator."""

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.client.approval import find_approval
from polyclinic.client.training import answer_round
from polyclinic.common.data.cache import Cached
from polyclinic.common.generators.base import load_trainable_state, trainable_state
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.privacy.clipping import TAU
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.tap import COINS, SUM, Tap, canary_norms, tap_like, toss_coins
from polyclinic.common.refusals import Refusal
from polyclinic.common.training import PrivateEngine
from polyclinic.common.wire import pack_reply, reply_records
from polyclinic.common.wire_reading import unpack_reply
from polyclinic.server.replies import read_reply
from tests.common.test_wire import FACTS, state

RANDOM = KeyedRandom(b"t" * 32)
HEADS = "1" * 200


def tap_of(coins: str = HEADS, *, rate: float = 0.5, clip: float = 0.3) -> Tap:
    return Tap(coins, RANDOM, rate=rate, clip=clip, margin=TAU, device="cpu")


def test_one_coordinate_in_five_has_no_canary_and_the_others_split_evenly() -> None:
    norms = canary_norms(203)
    assert norms.shape == (203,)
    counts = {norm: int((norms[:200] == norm).sum()) for norm in (0.0, 0.5, 10.0)}
    assert counts == {0.0: 40, 0.5: 80, 10.0: 80}


def test_canaries_are_clipped_like_patients_and_only_heads_are_sampled() -> None:
    coins = toss_coins(200)
    heads = torch.tensor([coin == "1" for coin in coins])
    whole = tap_of(coins, rate=1.0).clipped_sum(0)
    norms = canary_norms(200)
    want = 0.3 * norms.clamp(max=1.0) / (1 + TAU) * heads
    assert torch.allclose(whole, want, rtol=1e-6, atol=0)
    assert 60 < int(heads.sum()) < 140


def test_canaries_are_sampled_at_q_each_step_anew() -> None:
    tap = tap_of(rate=0.2)
    inside = torch.stack([tap.clipped_sum(step) > 0 for step in range(400)])[:, canary_norms(200) > 0]
    assert float(inside.double().mean()) == pytest.approx(0.2, abs=5 * (0.16 / inside.numel()) ** 0.5)
    # Each canary and each step on its own: neither rows nor columns move together.
    assert 0.05 < float(inside.double().mean(0).std()) ** 2 / (0.16 / 400) / 10 < 0.2
    assert float(inside.double().mean(1).std()) ** 2 == pytest.approx(0.16 / 160, rel=0.4)
    assert torch.equal(tap.clipped_sum(3), tap_of(rate=0.2).clipped_sum(3))


def engine(family: Msdm, data: Cached, study: Any, tap: Tap | None, sigma: float) -> PrivateEngine:
    return PrivateEngine(
        family, data, study, RANDOM, sigma=sigma, divisor=4.0, device="cpu", tap=tap
    )  # fmt: skip


def test_tap_gets_noise_and_divisor_and_leaves_the_generator_as_it_was(
    family: Msdm, cached: Cached, make_study: Any
) -> None:
    study = make_study(privacy={"clip": 0.3}, training={"weight_decay": 0.1})
    start, ends = trainable_state(family.module), []
    tap = tap_of()
    for given in (None, tap):
        load_trainable_state(family.module, start)
        run = engine(family, cached, study, given, sigma=1.1)
        for step in (4, 5):
            run.step(step)
        ends.append(trainable_state(family.module))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    want = sum(
        (
            tap.clipped_sum(step).double()
            + RANDOM.stream("noise", step, SUM).protective_normal((200,), 1.1 * 0.3)
        )
        / 4.0
        for step in (4, 5)
    )
    assert isinstance(want, torch.Tensor)
    assert torch.allclose(tap.released(last=False)[SUM].double(), want, atol=1e-6)
    # AdamW and its weight decay never met it.
    assert not bool(tap.parameter.any())
    assert tap.parameter not in run.optimizer.original_optimizer.state


def test_a_step_without_noise_on_the_tap_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no noise"):
        tap_of().collect()


def test_coins_are_tossed_once_a_study_and_sent_with_the_last_round_alone(
    make_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(privacy={"canaries": 200})
    approval = site.approve()
    path = site.home / "approvals" / f"{site.resolved.hash}.json"
    assert path.stat().st_mode & 0o077 == 0
    assert find_approval(site.home, site.resolved.hash).coins == approval.coins  # type: ignore[union-attr]
    assert len(approval.coins) == 200
    assert set(approval.coins) == {"0", "1"}
    assert "cryptographic" in approval.noise
    replies = [
        answer_round(site.home, site.order(number), lambda _: site.state, in_time=lambda: True)
        for number in (1, 2, 3)
    ]
    taps = [unpack_reply(reply).tap for reply in replies]
    assert [set(tap) for tap in taps] == [{SUM}, {SUM}, {SUM, COINS}]
    assert "".join("1" if coin else "0" for coin in taps[2][COINS]) == approval.coins
    assert not torch.equal(taps[0][SUM], taps[1][SUM])
    for number, reply in enumerate(replies, start=1):
        assert (
            answer_round(site.home, site.order(number), lambda _: site.state, in_time=lambda: True) == reply
        )
        difference, _, tap = read_reply(reply_records(reply), site.state, tap_like(200, last=number == 3))
        assert difference.keys() == site.state.keys()
        assert all(torch.equal(tap[name], tensor) for name, tensor in taps[number - 1].items())


def test_study_without_a_tap_sends_none(make_site: Any) -> None:
    site = make_site(privacy={"canaries": 0}, training={"rounds": 1})
    approval = site.approve()
    assert approval.coins == ""
    reply = answer_round(site.home, site.order(), lambda _: site.state, in_time=lambda: True)
    assert unpack_reply(reply).tap == {}
    assert set(reply_records(reply)) == {"difference", "facts", "hashes"}


def test_two_approvals_toss_other_coins() -> None:
    assert len({toss_coins(100) for _ in range(20)}) == 20


WANTED = tap_like(200, last=True)


def test_stored_reply_keeps_the_tap_apart_from_the_difference() -> None:
    stored = pack_reply(state(), FACTS, WANTED)
    difference, facts, tap = unpack_reply(stored)
    assert difference.keys() == state().keys()
    assert tap.keys() == {SUM, COINS}
    assert pack_reply(difference, facts, tap) == stored


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ({}, WANTED),
        (WANTED, {}),
        (WANTED, tap_like(200, last=False)),  # coins before the last round
        (tap_like(200, last=False), WANTED),
        ({**WANTED, SUM: torch.zeros(199)}, WANTED),
        ({**WANTED, SUM: torch.zeros(200, 1)}, WANTED),
        ({**WANTED, SUM: torch.zeros(200, dtype=torch.float64)}, WANTED),
        ({**WANTED, SUM: torch.full((200,), torch.nan)}, WANTED),
        ({**WANTED, COINS: torch.full((200,), torch.inf)}, WANTED),
    ],
)
def test_server_refuses_a_tap_outside_the_schema(sent: Any, wanted: Any) -> None:
    content = reply_records(pack_reply(state(), FACTS, sent))
    with pytest.raises(Refusal, match=r"bad-message|bad-state"):
        read_reply(content, state(), wanted)


def test_a_tap_with_other_names_is_taken_for_the_difference_and_refused() -> None:
    content = reply_records(pack_reply(state(), FACTS, {**WANTED, "tap/loss": torch.zeros(3)}))
    with pytest.raises(Refusal, match="bad-state"):
        read_reply(content, state(), WANTED)


def test_many_canaries_are_summed_a_few_at_a_time() -> None:
    coins = "1" * 1000
    norms = canary_norms(1000)
    inside = RANDOM.stream("canary", 2).uniform(1000) < 0.9
    want = 0.3 * norms.clamp(max=1.0) / (1 + TAU) * torch.from_numpy(np.asarray(inside))
    assert torch.allclose(tap_of(coins, rate=0.9).clipped_sum(2), want, rtol=1e-6, atol=0)
