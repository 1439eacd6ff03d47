"""What a history costs, against values measured before and against what must hold of any accountant."""

import pytest

from polyclinic.common.calibration import calibrate
from polyclinic.common.privacy import accounting
from polyclinic.common.privacy.accounting import claim, epsilon_pld, epsilon_prv, epsilon_rdp
from polyclinic.common.refusals import BadInput, Refusal

STUDY = ((1.0, 0.05, 400),)


def test_claim_is_the_known_value() -> None:
    assert claim(STUDY, 1e-5) == pytest.approx(6.71, abs=0.01)
    assert epsilon_rdp(STUDY, 1e-5) == pytest.approx(7.42, abs=0.01)
    assert claim(STUDY, 1e-5) == epsilon_prv(STUDY, 1e-5)


def test_nothing_taken_costs_nothing() -> None:
    assert claim((), 1e-5) == 0.0


@pytest.mark.parametrize(
    "history",
    [STUDY, ((5.0, 1.0, 3),), ((50.0, 0.01, 5),), ((0.8, 0.2, 30), (1.5, 0.05, 100)), ((0.5, 0.01, 50),)],
)
def test_claim_lies_between_privacy_loss_distribution_and_rdp(history: accounting.History) -> None:
    value = claim(history, 1e-5)
    assert 0.99 * epsilon_pld(history, 1e-5) <= value <= epsilon_rdp(history, 1e-5)


def test_claim_grows_with_steps_and_rate_and_falls_with_sigma_and_delta() -> None:
    assert claim(((1.0, 0.05, 401),), 1e-5) >= claim(STUDY, 1e-5)
    assert claim(((1.0, 0.06, 400),), 1e-5) > claim(STUDY, 1e-5) > claim(((1.1, 0.05, 400),), 1e-5)
    assert claim(STUDY, 1e-6) > claim(STUDY, 1e-5)


def test_segments_compose() -> None:
    split = claim(((1.0, 0.05, 150), (1.0, 0.05, 250)), 1e-5)
    assert split == pytest.approx(claim(STUDY, 1e-5), rel=5e-3)
    mixed = claim(((1.0, 0.05, 400), (2.0, 0.1, 100)), 1e-5)
    assert claim(STUDY, 1e-5) < mixed < claim(STUDY, 1e-5) + claim(((2.0, 0.1, 100),), 1e-5)
    # Order does not matter, and no segment is forgotten (the Gaussian accountant reads only the last).
    assert mixed == pytest.approx(claim(((2.0, 0.1, 100), (1.0, 0.05, 400)), 1e-5), rel=1e-3)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(8.0, 0.05, 200), (1.0, 0.05, 200), (3.0, 0.1, 1000), (1.0, 1.0, 50)]
)
def test_calibrated_sigma_meets_the_target_and_one_percent_less_does_not(
    epsilon: float, rate: float, steps: int
) -> None:
    sigma = calibrate(epsilon, 1e-5, rate, steps)
    assert claim(((sigma, rate, steps),), 1e-5) <= epsilon
    assert epsilon_prv(((0.99 * sigma, rate, steps),), 1e-5) > epsilon


def test_calibration_gives_the_measured_sigmas() -> None:
    found = [calibrate(epsilon, 1e-5, 0.05, 200) for epsilon in (1.0, 3.0, 8.0, 10.0)]
    assert found == pytest.approx([2.87, 1.29, 0.79, 0.72], rel=0.02)


def test_a_very_small_epsilon_can_be_met() -> None:
    sigma = calibrate(0.05, 1e-5, 0.05, 100)
    assert 0.04 < claim(((sigma, 0.05, 100),), 1e-5) <= 0.05


def test_a_full_batch_of_many_steps_is_calibrated_without_a_giant_grid() -> None:
    # PRV at a sigma a hundred times too small took 53 s and 3 GB here.
    sigma = calibrate(1.0, 1e-5, 1.0, 2000)
    assert sigma == pytest.approx(168.5, rel=2e-3)


def test_what_no_noise_can_meet_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"privacy\.epsilon.*raise epsilon"):
        calibrate(1e-6, 1e-5, 1.0, 1000)


@pytest.mark.parametrize(
    ("which", "value"), [("epsilon_rdp", 1.0), ("epsilon_pld", 9.0), ("epsilon_prv", float("nan"))]
)
def test_accountants_out_of_order_are_refused(
    monkeypatch: pytest.MonkeyPatch, which: str, value: float
) -> None:
    monkeypatch.setattr(accounting, which, lambda history, delta: value)
    with pytest.raises(Refusal, match="accountant-disagrees"):
        claim.__wrapped__(STUDY, 1e-5)
