"""What near copies are measured by is refused where it would measure nothing: before anything is trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from polyclinic.common.data.holdout import position
from polyclinic.common.data.table import Record
from polyclinic.common.refusals import BadInput
from polyclinic.common.release_settings import ReleaseSettings
from polyclinic.common.settings import ReferenceSettings
from polyclinic.common.study import NearScale, Study
from polyclinic.server.base import prepare_base
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.public_scale import LARGEST_ALPHA, public_scale
from polyclinic.server.plan import plan, words
from polyclinic.server.reference import split_reference
from polyclinic.simulation.random_checkpoints import save
from tests.common.test_families import study_of
from tests.conftest import MakeStudy

SIZE = 32


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Ninety-six people's pictures, one each: smooth noise."""
    folder, generator = tmp_path_factory.mktemp("public"), torch.Generator().manual_seed(3)
    records = []
    for number in range(96):
        coarse = torch.randint(256, (6, 6, 3), generator=generator, dtype=torch.uint8)
        path = folder / f"{number:02d}.png"
        Image.fromarray(coarse.numpy()).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)
        records.append(Record(f"person-{number:02d}", path, ("a picture",)))
    return records


def gated(make_study: MakeStudy, draws: int = 4, **releases: object) -> Study:
    return make_study(
        data={"source": "folder", "image_size": SIZE},
        reference={"pretrain": 0.0, "probe": 0.0, "evaluate": 1.0},
        releases={"leakage_gate": True, **releases},
        evaluation={"prompts": [{"text": text} for text in "abcd"], "draws": draws},
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where features are kept for every test."""
    return tmp_path_factory.mktemp("kept") / "features"


def scale(study: Study, records: list[Record], folder: Path, start: torch.Tensor | None = None) -> NearScale:
    store = FeatureStore(folder, SIZE, "crop")
    taken = public_scale(
        study, split_reference(study, records), store, None if start is None else start.clone
    )
    assert taken is not None
    assert taken.near is not None
    return taken.near


def test_an_image_under_two_people_is_named_and_refused(
    make_study: MakeStudy, public: list[Record], tmp_path: Path, kept: Path
) -> None:
    study = gated(make_study)
    whole = scale(study, public, kept)
    assert min(whole.features, whole.pixels) > 0.1
    assert whole.alpha <= LARGEST_ALPHA
    assert whole.patients + 1 == pytest.approx(1 / whole.chance)
    # Under whatever id, so on either side of the hash; and saved anew, as a JPEG.
    again = tmp_path / "again.jpg"
    Image.open(public[7].image).save(again, quality=95)
    for few in ([0], [1], [0, 1, 2, 3]):
        others = [replace(public[7], patient=f"other-{number}") for number in few]
        with pytest.raises(BadInput, match=r"one image twice.*07\.png of .*07\.png of .*one patient id"):
            scale(study, [*public[:88], *others], kept)
    sides = [position(f"{name}", f"{study.reference.key}/near") < 0.5 for name in ("person-07", *range(9))]
    saved = replace(public[7], image=again, patient=str(sides.index(not sides[0]) - 1))
    with pytest.raises(BadInput, match=r"(07\.png|again\.jpg) of .*(07\.png|again\.jpg) of"):
        scale(study, [*public, saved], kept)
    # One person may have the same picture twice.
    assert scale(study, [*public, replace(public[7], image=again)], kept).pixels > 0.1


def test_a_start_that_draws_a_public_image_is_refused(
    make_study: MakeStudy, public: list[Record], kept: Path
) -> None:
    study = gated(make_study)
    drawn = FeatureStore(kept, SIZE, "crop").pixels(public[5:9])
    with pytest.raises(BadInput, match=r"05\.png of person-05 and what the start draws \(1\).*; and 1 more"):
        scale(study, public, kept, drawn)


@pytest.mark.parametrize(
    ("people", "draws", "asks"),
    [
        (24, 4, "about 88 patients"),
        (96, 32, r"about 154 patients .*set evaluation\.draws = \d\d,"),
        (96, 128, r"about 296 patients"),
    ],
)
def test_a_reference_too_small_for_an_alarm_says_what_would_do(
    make_study: MakeStudy,
    public: list[Record],
    tmp_path: Path,
    kept: Path,
    people: int,
    draws: int,
    asks: str,
) -> None:
    study = gated(make_study, draws)
    reference = split_reference(study, public[:people])
    with pytest.raises(BadInput, match=rf"{people} patients .* too few for {4 * draws} images .*{asks}"):
        prepare_base(tmp_path, study, reference)
    assert not (tmp_path / "bases").exists()
    # Without the gate there is nothing to refuse.
    without = gated(make_study, draws, leakage_gate=False, fidelity_epsilon=1.0)
    taken = public_scale(without, reference, FeatureStore(kept, SIZE, "crop"))
    assert taken is not None
    assert taken.near is None


def test_what_is_asked_for_is_enough(
    make_study: MakeStudy, public: list[Record], tmp_path: Path, kept: Path
) -> None:
    study = gated(make_study, 32)
    with pytest.raises(BadInput) as refused:
        scale(study, public, kept)
    draws = int(str(refused.value).split("evaluation.draws = ")[1].split(",")[0])
    fewer = scale(gated(make_study, draws), public, kept)
    assert 0.9 * LARGEST_ALPHA < fewer.alpha <= LARGEST_ALPHA
    # As many as asked for; their files are looked at only after the check.
    absent = [Record(f"more-{number}", tmp_path / f"{number}.png", ("a",)) for number in range(154 - 96)]
    with pytest.raises(FileNotFoundError):
        scale(study, [*public, *absent], kept)


def test_plan_says_how_many_copies_raise_the_alarm(make_study: MakeStudy, tiny_vae: Path) -> None:
    study = make_study(
        generator={"vae": str(tiny_vae)},
        privacy={"enabled": False},
        releases={"leakage_gate": True},
        federation={"min_sites": 1},
        simulation={"split": "pooled", "sites": {"north": {"declared_patients": 100}}},
    )
    told = plan(study)
    gate = told.sites[0].gate
    assert gate is not None
    assert (gate.trained, gate.held_out) == (90, 10)
    assert (gate.fewest_copied_at_best, gate.fewest_copied) == (7, 21)
    assert "7 of 90 patients trained on with a large reference, of 21 with the smallest" in words(told)


def test_a_large_model_has_a_scale_too_from_what_its_base_draws(
    public: list[Record], tmp_path: Path, kept: Path
) -> None:
    base = save("stable-diffusion", tmp_path / "base")
    large = study_of("stable-diffusion", base)
    study = large.model_copy(
        update={
            "reference": ReferenceSettings(pretrain=0.0, probe=0.0, evaluate=1.0),
            "releases": ReleaseSettings(leakage_gate=True),
        }
    )
    resolved = prepare_base(kept.parent, study, split_reference(study, public)).resolved
    assert resolved.public is not None
    assert resolved.public.near is not None
    assert resolved.public.near.alpha <= LARGEST_ALPHA
