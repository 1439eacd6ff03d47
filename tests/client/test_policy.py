"""PRIVACY.md, rules 4, 5 and 14: limits are the site's own, and default to the strict side."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.client.policy import Policy, check_noise, check_study, load_policy
from polyclinic.client.readiness import check_hours, limit_gpu
from polyclinic.common.generator_settings import GeneratorSettings
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
        ("declared_patients = 5\nepsilon_total = inf", "epsilon_total"),
        ("declared_patients = 5\nmin_sigma = nan", "min_sigma"),
        ('declared_patients = 5\nallowed_bases = ["all"]', "allowed_bases"),
        ('declared_patients = 5\nallowed_hours = "22-6"', "allowed_hours"),
        ('declared_patients = 5\nallowed_hours = "25:00-06:00"', "allowed_hours"),
        ('declared_patients = 5\nallowed_hours = "06:00-06:00"', "allowed_hours.*same time twice"),
        ("declared_patients = 5\nmax_gpu_memory_gb = 0", "max_gpu_memory_gb"),
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


def test_a_rank_of_its_own_is_held_to_the_studys(make_study: Any) -> None:
    large = GeneratorSettings.model_validate({"family": "flux", "base": "a/b", "lora": {"rank": 4}})
    study = make_study().model_copy(update={"generator": large})
    for rank in (None, 1, 4):
        check_study(OPEN.model_copy(update={"families": ("flux",), "lora_rank": rank}), study)
    with pytest.raises(Refusal, match=r"policy-forbids.*lora_rank 5 is over the study's 4; lower it"):
        check_study(OPEN.model_copy(update={"families": ("flux",), "lora_rank": 5}), study)
    check_study(OPEN.model_copy(update={"lora_rank": 5000}), make_study())  # nothing to MSDM


def test_noise_below_the_floor_is_refused(make_study: Any) -> None:
    with pytest.raises(Refusal, match="1063 noise-below-floor"):
        check_noise(OPEN, make_study(), 0.29)
    check_noise(OPEN, make_study(), 0.3)
    check_noise(OPEN, make_study(privacy={"enabled": False}), 0.0)


def test_a_policy_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_bytes(b"declared_patients = 5 # \xff\n")
    with pytest.raises(BadInput, match=r"policy\.toml: not a TOML file"):
        load_policy(tmp_path)


def test_only_the_bases_that_are_named_are_allowed(make_study: Any) -> None:
    named = OPEN.model_copy(update={"allowed_bases": ("a" * 64, "b" * 64)})
    check_study(named, make_study(), "b" * 64)
    check_study(OPEN, make_study(), "c" * 64)
    for base in ("c" * 64, ""):
        with pytest.raises(Refusal, match=r"policy-forbids.*allowed_bases"):
            check_study(named, make_study(), base)


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("22:00-06:00", ("22:00", "23:59", "00:00", "05:59"), ("06:00", "12:00", "21:59")),
        ("08:30-17:00", ("08:30", "16:59"), ("08:29", "17:00", "00:00")),
        (None, ("00:00", "12:00"), ()),
    ],
)
def test_rounds_begin_within_the_sites_hours_only(
    hours: str | None, inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    policy = OPEN.model_copy(update={"allowed_hours": hours})
    for clock in inside:
        check_hours(policy, datetime.strptime(clock, "%H:%M"))
    for clock in outside:
        with pytest.raises(Refusal, match="1062 outside-hours"):
            check_hours(policy, datetime.strptime(clock, "%H:%M"))


def test_a_gpu_is_held_to_its_share_and_refused_where_others_leave_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = OPEN.model_copy(update={"max_gpu_memory_gb": 20.0})
    set_to: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limit_gpu(policy)  # nothing to hold
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(2e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(19e9), int(80e9)))
    limit_gpu(policy)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(17e9), int(80e9)))
    with pytest.raises(Refusal, match="1067 gpu-memory-short"):
        limit_gpu(policy)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(1e9), int(16e9)))
    limit_gpu(policy)  # the whole card is allowed
    limit_gpu(OPEN)
    assert set_to == [0.25]
