"""The gate's acceptance: a generator that knows its patients by heart is caught, a private one passes."""

from pathlib import Path

import pytest

from tests.client.memorised import gate, phantoms, trained_site


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("patients", "steps", "private_steps", "copies"),
    [(18, 120, 8, False), pytest.param(44, 400, 60, True, marks=pytest.mark.long)],
)
def test_overfit_generator_is_caught_and_private_one_passes(
    tmp_path: Path, patients: int, steps: int, private_steps: int, copies: bool
) -> None:
    own, public = phantoms(tmp_path / "phantoms", patients)
    caught_home, passed_home = tmp_path / "caught", tmp_path / "passed"
    approval, _ = trained_site(
        caught_home, own, public, private=False, steps=steps, store=tmp_path / "features"
    )
    caught = gate(caught_home, approval)
    told = f"{caught.found} of {len(caught.trained)} near, {caught.membership}, {caught.reasons}"
    print(f"without privacy, {steps} steps: {told}")
    assert caught.advice == "veto", told
    assert caught.membership is not None
    assert caught.membership.alarming
    if copies:
        assert len(caught.trained) >= 20
        assert any("near copies" in reason for reason in caught.reasons), told
        assert sum(pair.near for pair in caught.held_out) <= 2

    approval, _ = trained_site(
        passed_home, own, public, private=True, steps=private_steps, store=tmp_path / "features"
    )
    assert approval.epsilon is not None
    assert 7.9 < approval.epsilon <= 8.0
    passed = gate(passed_home, approval)
    told = f"{passed.found} of {len(passed.trained)} near, {passed.membership}"
    print(f"epsilon 8, {private_steps} steps: {told}")
    assert passed.advice == "release", told
