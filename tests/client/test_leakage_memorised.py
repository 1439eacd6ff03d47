"""The gate's acceptance: a generator that knows its patients by heart is caught, a private one passes."""

from itertools import accumulate
from pathlib import Path

import pytest
from scipy import stats

from polyclinic.client.approval import Approval
from polyclinic.client.membership import Membership, membership_test
from polyclinic.common.data.cache import build_cache, load_cache
from polyclinic.common.data.holdout import position
from polyclinic.common.data.table import Record
from polyclinic.common.generators.base import Tensors, load_family, load_trainable_state
from polyclinic.common.release_settings import ReleaseSettings
from tests.client.memorised import gate, phantoms, trained_site

STEPS = 400
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
@pytest.mark.parametrize("private", [False, True])
def test_twenty_patients_by_heart_are_caught_and_epsilon_8_passes(tmp_path: Path, private: bool) -> None:
    """Either takes the same steps, and as many patients are held out as the default says."""
    everybody, public = phantoms(tmp_path / "phantoms", 52)
    held_out = ReleaseSettings().held_out
    kept = [position(record.patient, "heart|held-out") >= held_out for record in everybody]
    last = [*accumulate(map(int, kept))].index(20) + 1
    own, strangers = everybody[:last], everybody[last:]
    home = tmp_path / "home"
    approval, final = trained_site(
        home, own, public, private=private, steps=STEPS, store=tmp_path, held_out=held_out
    )
    found, losses = gate(home, approval), strangers_losses(home, approval, final, strangers)
    told = (
        f"{found.found} near, {found.exact} almost exact; {sum(pair.near for pair in found.held_out)} of "
        f"{len(found.held_out)} held out; chance {found.chance:.2g}; against {len(strangers)} strangers "
        f"{losses}; {found.reasons}"
    )
    print(f"{'epsilon 8' if private else 'without privacy'}, {STEPS} steps: {told}")
    assert len(found.trained) == 20
    if private:
        assert approval.epsilon is not None
        assert 7.9 < approval.epsilon <= 8.0
        assert found.advice == "release", told
        assert not losses.alarming, told
    else:
        assert found.advice == "veto", told
        assert any("near copies" in reason for reason in found.reasons), told
        assert losses.alarming, told


def strangers_losses(home: Path, approval: Approval, final: Tensors, strangers: list[Record]) -> Membership:
    """The membership test against people of this site whom no approval names: two held out are too few."""
    study = approval.resolved.study
    family = load_family(study, approval.files)
    load_trainable_state(family.module, final)
    others = build_cache(strangers, family, study.data, home / "strangers")
    caches = load_cache(home / "cache", approval.cache_index), load_cache(home / "strangers", others)
    found = membership_test(family, *caches)
    assert found is not None
    return found


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
