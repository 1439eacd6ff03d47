"""The gate's acceptance: a generator that knows its patients by heart is caught, a private one passes."""

from pathlib import Path

import pytest
from scipy import stats

from tests.client.memorised import gate, phantoms, trained_site

KEY = "4d" * 32  # the small case is the same one every time; nothing private is in it


def test_a_generator_that_knows_its_patients_is_caught_by_their_losses(tmp_path: Path) -> None:
    own, public = phantoms(tmp_path / "phantoms", 18)
    approval = trained_site(
        tmp_path / "home",
        own,
        public,
        private=False,
        steps=120,
        store=tmp_path,
        draws=2,
        size=32,
        test_key=KEY,
    )[0]
    caught = gate(tmp_path / "home", approval)
    told = f"{len(caught.trained)} and {len(caught.held_out)} patients, {caught.membership}"
    assert caught.membership is not None, told
    assert caught.membership.alarming, told
    assert caught.advice == "veto"


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_twenty_patients_by_heart_are_caught_and_epsilon_8_passes(tmp_path: Path) -> None:
    own, public = phantoms(tmp_path / "phantoms", 52)
    copies = tmp_path / "caught"
    approval = trained_site(copies, own, public, private=False, steps=400, store=tmp_path)[0]
    caught = gate(copies, approval)
    control = sum(pair.near for pair in caught.held_out)
    told = (
        f"{caught.found} of {len(caught.trained)} near, {control} of {len(caught.held_out)} held out, "
        f"chance {caught.chance:.2g}, {caught.membership}"
    )
    print(f"without privacy, 400 steps: {told}")
    assert len(caught.trained) == 20
    assert caught.advice == "veto", told
    assert any("near copies" in reason for reason in caught.reasons), told
    assert any("trained on can be told" in reason for reason in caught.reasons), told

    passed_home = tmp_path / "passed"
    approval = trained_site(passed_home, own, public, private=True, steps=60, store=tmp_path)[0]
    assert approval.epsilon is not None
    assert 7.9 < approval.epsilon <= 8.0
    passed = gate(passed_home, approval)
    told = f"{passed.found} of {len(passed.trained)} near, {passed.membership}"
    print(f"epsilon 8, 60 steps: {told}")
    assert passed.advice == "release", told


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_start_that_has_seen_nobody_is_flagged_no_more_than_stated(tmp_path: Path) -> None:
    """The demo's start draws smooth, average pictures: nearer to everybody than patients are."""
    own, public = phantoms(tmp_path / "phantoms", 100)
    home = tmp_path / "home"
    approval = trained_site(home, own, public, private=True, steps=0, store=tmp_path)[0]
    found = gate(home, approval)
    pairs = [*found.trained, *found.held_out]
    flagged = sum(pair.near for pair in pairs)
    print(f"the start: {flagged} of {len(pairs)} near, stated {found.scale.alpha:.2%} a patient")
    assert found.scale.alpha < 0.05
    assert stats.binom.sf(flagged - 1, len(pairs), found.scale.alpha) > 0.01, flagged
    assert found.advice == "release"
