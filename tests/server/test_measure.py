"""From drawn images and a reference to a judgement, and what is said before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from polyclinic.common.data.table import Record
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study
from polyclinic.server.cli import main as server
from polyclinic.server.evaluation.estimate import PROTOCOL
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.measure import drawn_for, measure
from polyclinic.server.evaluation.ready import check_evaluation
from polyclinic.server.reference import Reference
from polyclinic.simulation.cli import main as simulate

MakeStudy = Callable[..., Study]
PROMPTS = [{"text": f"disc number {i}"} for i in range(10)]
OTHERS = {"cmmd", "precision", "recall", "density", "coverage", "vendi"}


def _discs(n: int, generator: torch.Generator, red: float = 0.8) -> Tensor:
    """Discs of random place and size on a tinted ground, [n, 3, 32, 32]."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    place = 8 + 16 * torch.rand(n, 2, 1, 1, generator=generator)
    radius = 3 + 6 * torch.rand(n, 1, 1, generator=generator)
    disc = (((x - place[:, 0]) ** 2 + (y - place[:, 1]) ** 2).sqrt() < radius).float()
    ground = 0.3 + 0.1 * torch.rand(n, 3, 1, 1, generator=generator)
    colour = torch.tensor([red, 0.4, 0.3])[None, :, None, None]
    texture = 0.03 * torch.randn(n, 3, 32, 32, generator=generator)
    pixels = ground + (colour - ground) * disc[:, None] + texture
    return (pixels.clamp(0, 1) * 255).round() / 255


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """120 images of 60 patients."""
    folder = tmp_path_factory.mktemp("reference")
    records = []
    for i, pixels in enumerate(_discs(120, torch.Generator().manual_seed(0))):
        path = folder / f"{i}.png"
        Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(path)
        records.append(Record(f"p{i // 2}", path, ("a disc",)))
    return Reference([], [], records, "0" * 64)


def test_a_judgement_has_every_metric_on_every_extractor(
    reference: Reference, make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study(evaluation={"prompts": PROMPTS, "draws": 6})
    store = FeatureStore(tmp_path, 32, "crop")
    generator = torch.Generator().manual_seed(1)
    good = measure(1, drawn_for(study, _discs(60, generator)), reference, study, store)
    assert good.fidelity is not None
    assert good.fidelity.extractor == "EfficientNet-Lite0"
    assert len(good.fidelity.weights) == 64
    assert [f.extractor for f in good.second] == ["radiomic"]
    assert set(good.fidelity.others) == OTHERS | {"ms_ssim"}
    assert set(good.second[0].others) == OTHERS
    for fidelity in (good.fidelity, *good.second):
        assert fidelity.protocol == PROTOCOL
        for estimate in (fidelity.kid, fidelity.frechet, *fidelity.others.values()):
            assert estimate.n == 60
            assert estimate.floor is not None
            assert estimate.low is not None
            assert estimate.high is not None
            assert estimate.low <= estimate.value <= estimate.high
            assert estimate.interval.startswith("95 %")
            # Its words, the groups it names and their number say the same.
            told = {kind for kind in ("patients", "prompts") if kind[:-1] in estimate.interval}
            assert set(estimate.resampled) == told
            assert estimate.groups == next(iter(estimate.resampled.values()))
        assert fidelity.kid.resampled == {"patients": fidelity.kid.groups, "prompts": 10}
        assert fidelity.others["vendi"].resampled == {"prompts": 10}
    assert good.fidelity.others["ms_ssim"].resampled == {"prompts": 10}
    # Again: nothing is extracted a second time, and the numbers are the same.
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = measure(
        1, drawn_for(study, _discs(60, torch.Generator().manual_seed(1))), reference, study, store
    )
    assert again == good
    assert files == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    # One image a prompt, drawn six times; and discs of another colour.
    collapsed = _discs(10, generator).repeat_interleave(6, dim=0)
    same = measure(2, drawn_for(study, collapsed), reference, study, store).fidelity
    assert same is not None
    assert same.others["ms_ssim"].value == pytest.approx(1.0)
    assert same.others["ms_ssim"].ratio is not None
    assert same.others["ms_ssim"].ratio > 1.3
    assert same.others["vendi"].value < good.fidelity.others["vendi"].value
    assert same.others["recall"].value < good.fidelity.others["recall"].value
    blue = measure(3, drawn_for(study, _discs(60, generator, red=0.1)), reference, study, store)
    assert blue.fidelity is not None
    for bad, fine in zip((blue.fidelity, *blue.second), (good.fidelity, *good.second), strict=True):
        assert bad.kid.value > fine.kid.high  # type: ignore[operator]
        assert bad.others["cmmd"].value > fine.others["cmmd"].high  # type: ignore[operator]
        assert bad.others["precision"].value < fine.others["precision"].value


def test_what_weakens_or_stops_a_judgement_is_said(
    reference: Reference, make_study: MakeStudy, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path, 32, "crop")
    generator = torch.Generator().manual_seed(2)
    single = make_study(
        data={"unit": "image", "image_size": 32},
        evaluation={
            "prompts": [{"text": str(i)} for i in range(60)],
            "draws": 1,
            "extractors": ["radiomic"],
        },
    )
    found = measure(1, drawn_for(single, _discs(60, generator)), reference, single, store).fidelity
    assert found is not None
    assert found.extractor == "radiomic"
    assert "ms_ssim" not in found.others
    assert any("two draws" in warning for warning in found.warnings)
    assert any("no patient ids" in warning for warning in found.warnings)
    assert any("below 500" in warning for warning in found.warnings)

    study = make_study(evaluation={"prompts": PROMPTS, "draws": 6, "extractors": ["radiomic"]})
    few = make_study(evaluation={"prompts": PROMPTS, "draws": 4, "extractors": ["radiomic"]})
    unmeasured = measure(1, drawn_for(few, _discs(40, generator)), reference, few, store)
    assert unmeasured.fidelity is None
    assert unmeasured.no_fidelity == (
        "Fidelity was not measured: it takes 50 images a side, and there are 40 drawn in one evaluation."
    )
    with pytest.raises(BadInput, match="40 x 40 px and the reference 32 x 32"):
        measure(1, drawn_for(study, torch.zeros(60, 3, 40, 40)), reference, study, store)
    broken = _discs(60, generator)
    broken[7, 0, 0, 0] = torch.nan
    with pytest.raises(BadInput, match="1 of 60 images have features that are not finite, drawn image 8"):
        measure(1, drawn_for(study, broken), reference, study, store)

    two = make_study(evaluation={"prompts": PROMPTS[:2], "draws": 30})
    with pytest.raises(BadInput, match="2 different prompts"):
        check_evaluation(two, reference)
    of_two = [Record(f"p{i % 2}", r.image, r.captions) for i, r in enumerate(reference.evaluate)]
    with pytest.raises(BadInput, match="2 patients in the reference's evaluate part"):
        check_evaluation(study, Reference([], [], of_two, ""))


STUDY = """
name = "tiny"
[data]
source = "phantoms"
image_size = 32
phantoms = {{patients_per_site = 12, seed = 3}}
[generator]
size = "msdm-tiny"
max_tokens = 8
[evaluation]
prompts = [{{text = "a polyp"}}]
extractors = {extractors}
[simulation.sites]
north = {{declared_patients = 1000, min_patients = 2}}
coast = {{declared_patients = 1000, min_patients = 2}}
valley = {{declared_patients = 1000, min_patients = 2}}
"""


def test_an_extractor_that_is_not_there_stops_plan_and_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(extractors='["radiomic", "/nowhere/rad-dino"]'))
    home = tmp_path / "home"
    for main, words in ((server, ["plan", study]), (simulate, ["run", study, "--home", home])):
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        sentence = said.strip().splitlines()[-1]
        for name in ("evaluation.extractors", "/nowhere/rad-dino", "neither a path that exists"):
            assert name in sentence, sentence
    # Nothing was trained: neither a VAE nor a start.
    assert not list(home.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("extractors", "match"),
    [
        (["inception"], "source = .inception. and file go together"),
        ([{"source": "radiomic", "file": "a.pth"}], "go together"),
        (["package:resnet"], "the one packaged extractor"),
        (["radiomic", "radiomic"], "twice"),
        ([], "at least 1 item"),
        ([{"source": "radiomic", "sha256": "abc"}], "sha256"),
    ],
)
def test_an_extractor_is_written_rightly(make_study: MakeStudy, extractors: list[object], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        make_study(evaluation={"prompts": PROMPTS, "extractors": extractors})


def test_a_reference_without_patients_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "images.csv").write_text("image,caption\na.png,a disc\n")
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(extractors='["radiomic"]'))
    words = ["run", study, "--reference", tmp_path, "--home", tmp_path / "home"]
    assert server([str(word) for word in words]) == 2
    assert "patient" in capsys.readouterr().err.strip().splitlines()[-1]
