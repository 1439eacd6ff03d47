"""PRIVACY.md, rules 4, 5 and 14: limits are the site's own, and default to the strict side."""

from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.policy import Policy, check_noise, check_study, load_policy
from polyclinic.common.refusals import BadInput, Refusal

OPEN = Policy(declared_patients=12, allow_not_private=True, allow_test_randomness=True)


def test_defaults_allow_neither_plain_training_nor_fixed_randomness() -> None:
    policy = Policy(declared_patients=100)
    assert not policy.allow_not_private
    assert not policy.allow_test_randomness
    assert policy.min_sigma > 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("declared_patients = 0", "declared_patients"),
        ("", "declared_patients.*missing"),
        ("declared_patients = 5\nallow_not_privat = true", "unknown field `allow_not_privat`"),
        ("declared_patients = 5\nepsilon_per_study = -1", "epsilon_per_study"),
        ("declared_patients = ", "not a TOML file"),
    ],
)
def test_mistakes_in_the_policy_are_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(BadInput, match=rf"policy\.toml.*{named}"):
        load_policy(tmp_path)


def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"policy\.toml: no such file.*declared_patients"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("tables", "limits", "code"),
    [
        ({"privacy": {"enabled": False}}, {"allow_not_private": False}, "not-private-forbidden"),
        (
            {"privacy": {"enabled": False}, "training": {"test_key": "k"}},
            {"allow_test_randomness": False},
            "test-randomness-forbidden",
        ),
        ({}, {"families": ("flux",)}, "policy-forbids"),
        ({}, {"max_rounds": 2}, "policy-forbids"),
        ({}, {"max_steps": 5}, "policy-forbids"),
        ({"privacy": {"delta": 1 / 119}}, {}, "policy-forbids"),
    ],
)
def test_each_limit_has_its_code(make_study: Any, tables: Any, limits: Any, code: str) -> None:
    study = make_study(**tables)
    with pytest.raises(Refusal, match=code):
        check_study(OPEN.model_copy(update=limits), study)


def test_at_the_limits_a_study_is_allowed(make_study: Any) -> None:
    check_study(
        OPEN.model_copy(update={"max_rounds": 3, "max_steps": 6}), make_study(privacy={"delta": 1 / 121})
    )
    check_study(OPEN, make_study(privacy={"enabled": False}, training={"test_key": "k"}))


def test_noise_below_the_floor_is_refused(make_study: Any) -> None:
    with pytest.raises(Refusal, match="policy-forbids"):
        check_noise(OPEN, make_study(), 0.29)
    check_noise(OPEN, make_study(), 0.3)
    check_noise(OPEN, make_study(privacy={"enabled": False}), 0.0)
