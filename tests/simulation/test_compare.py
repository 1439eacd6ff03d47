"""The arms of a comparison differ in what is compared, and in nothing else."""

import pytest

from polyclinic.common.refusals import BadInput
from polyclinic.common.study import load_study
from polyclinic.simulation.compare import arms


def test_a_private_arm_for_each_epsilon() -> None:
    study = load_study("phantom-demo")
    found = arms(study, [8, 0.5, 8])
    assert [arm.name.removeprefix("phantom-demo-") for arm in found] == [
        "pooled", "federated", "epsilon-8", "epsilon-0-5",
    ]  # fmt: skip
    assert [(arm.privacy.enabled, arm.privacy.epsilon) for arm in found[1:]] == [
        (False, 8), (True, 8), (True, 0.5),
    ]  # fmt: skip
    for arm in found[2:]:
        same = arm.model_copy(update={"name": study.name, "title": study.title, "privacy": study.privacy})
        assert same == study


def test_without_an_epsilon_the_studys_own() -> None:
    study = load_study("phantom-demo")
    (own,) = (arm for arm in arms(study) if arm.privacy.enabled)
    assert own.privacy == study.privacy


def test_an_epsilon_that_is_none_is_one_sentence() -> None:
    with pytest.raises(BadInput, match=r"arm epsilon--1: field `privacy\.epsilon`"):
        arms(load_study("phantom-demo"), [-1])
