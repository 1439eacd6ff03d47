"""What a plan says about the clipping engine."""

import pytest

from polyclinic.common.study import parse_study
from polyclinic.server.plan_advice import advise


@pytest.mark.parametrize(
    ("engine", "code"),
    [
        (None, None),
        ("bookkeeping", None),
        ("vmap", "engine-slow"),
        ("loop", "engine-slow"),
        ("hooks", "engine-refuses"),
        ("ghost", "engine-refuses"),
    ],
)
def test_other_engines_than_the_default_are_named(engine: str | None, code: str | None) -> None:
    privacy = {} if engine is None else {"engine": engine}
    values = {"name": "tiny", "privacy": privacy, "evaluation": {"prompts": [{"text": "a polyp"}]}}
    found = {advice.code for advice in advise(parse_study(values, "tiny"), {})}
    assert {name for name in found if name.startswith("engine-")} == ({code} if code else set())
