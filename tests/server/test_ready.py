"""An evaluation that would fail after the first round is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from polyclinic.common.data.table import Record
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study
from polyclinic.server.evaluation.ready import check_evaluation
from polyclinic.server.reference import Reference
from tests.conftest import MakeStudy

PROMPTS = [
    {"text": "with a polyp", "labels": {"polyp": "yes"}},
    {"text": "containing a polyp", "labels": {"polyp": "yes"}},
    {"text": "with no polyp", "labels": {"polyp": "no"}},
]


def _reference(*values: str) -> Reference:
    """Probe and evaluate part with these values of `polyp`; an empty one is an empty cell."""
    parts = [
        [
            Record(f"{part}-{i}", Path(f"{part}-{i}.png"), ("a",), labels={"polyp": v})
            for i, v in enumerate(values)
        ]
        for part in ("probe", "evaluate")
    ]
    return Reference([], parts[0], parts[1], "0" * 64)


def _study(make_study: MakeStudy, prompts: list[dict[str, Any]] = PROMPTS, **evaluation: object) -> Study:
    return make_study(
        reference={"concepts": ["polyp"]}, evaluation={"prompts": prompts, "draws": 10, **evaluation}
    )


def test_a_whole_reference_passes(make_study: MakeStudy) -> None:
    check_evaluation(_study(make_study), _reference("yes", "no", "yes", "no"))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((), None),  # no probe part: faithfulness is not asked for
        (("", ""), "no image of the reference's probe part has a value for it; add a column polyp"),
        (("yes", "yes"), r"ask for polyp = no, which no image .* shows \(it shows yes\)"),
    ],
)
def test_labels_that_prompts_ask_for_must_be_there(
    make_study: MakeStudy, values: tuple[str, ...], sentence: str | None
) -> None:
    if sentence is None:
        check_evaluation(_study(make_study), _reference())
        return
    with pytest.raises(BadInput, match=sentence):
        check_evaluation(_study(make_study), _reference(*values))


def test_prompts_that_ask_for_one_value_only_measure_nothing(make_study: MakeStudy) -> None:
    with pytest.raises(BadInput, match="no concept is asked for with two values"):
        check_evaluation(_study(make_study, PROMPTS[:2]), _reference("yes", "no"))


def test_a_reference_too_small_for_the_fidelity_that_the_study_asks_for(
    make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    short = _reference(*["yes", "no"] * 24, "yes")
    with pytest.raises(BadInput, match=r"study tiny: .*has 49 images.*50 or more; .*`reference\.evaluate`"):
        check_evaluation(_study(make_study, draws=17), short)
    check_evaluation(_study(make_study, draws=17), _reference(*["yes", "no"] * 25))
    assert capsys.readouterr().err == ""
    # A study that draws too few itself asks for no fidelity: that is said, and it runs.
    check_evaluation(_study(make_study, draws=16), short)
    assert "fidelity will not be measured: the study draws 48 images" in capsys.readouterr().err


def test_a_model_that_is_not_there(make_study: MakeStudy, tmp_path: Path) -> None:
    reference = _reference("yes", "no", "yes", "no")
    with pytest.raises(BadInput, match="neither a path that exists nor a Hugging Face id"):
        check_evaluation(_study(make_study, clip_model=str(tmp_path / "clip")), reference)
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        check_evaluation(_study(make_study, clip_model=str(tmp_path)), reference)
