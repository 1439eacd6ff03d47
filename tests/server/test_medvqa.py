"""The official MedVQA-GI 2025 scores, against the formulas written out in numpy and scipy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cosine, euclidean

from polyclinic.common.data.table import Record
from polyclinic.common.files import sha256_folder
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study
from polyclinic.server.evaluation import cosine as clip_cosine
from polyclinic.server.evaluation import medvqa
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.measure import drawn_for, measure
from polyclinic.server.evaluation.medvqa import (
    OFFICIAL_MODEL,
    Objective,
    check_medvqa,
    departures,
    official_scores,
    real_rows,
)
from polyclinic.server.reference import Reference
from tests.conftest import MakeStudy
from tests.server.random_models import save_clip, save_vit

Array = NDArray[np.float64]


def _set(n: int, seed: int, shift: float = 0.0, d: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Far from the origin, as tokens before the projection are: cosines near one.
    return (1.5 + shift + torch.randn(n, d, generator=generator)).float()


def _frechet(x: Array, y: Array) -> float:
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(a @ b).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root))


def _by_hand(objectives: list[tuple[Array, Array, Array]]) -> list[float]:
    fidelity, agreement, diversity, drawn, real = [], [], [], [], []
    for a, b, r in objectives:
        fidelity.append(1000 / (1 + (_frechet(a, r) + _frechet(b, r)) / 2))
        agreement.append(np.mean([[1 - cosine(i, j) for j in b] for i in a]))
        for some in (a, b):
            unit = [row / np.linalg.norm(row) for row in some]
            pairs = [euclidean(unit[i], unit[j]) for i in range(len(unit)) for j in range(i)]
            diversity.append(np.mean(pairs))
        drawn += [*a, *b]
        real += [*r]
    scores = (
        _frechet(np.array(drawn), np.array(real)),
        np.mean(fidelity),
        np.mean(agreement),
        np.mean(diversity),
    )
    return [float(score) for score in scores]


def test_scores_are_the_official_formulas() -> None:
    shared = _set(60, 9)
    objectives = [
        Objective(_set(10, 1, 0.2), _set(10, 2, 0.2), shared[:40]),
        Objective(_set(10, 3, -0.5), _set(10, 4, 0.9), shared[20:]),
        Objective(_set(10, 5), _set(10, 6), shared),
    ]
    found = official_scores(objectives)
    oracle = _by_hand([tuple(part.double().numpy() for part in objective) for objective in objectives])  # type: ignore[misc]
    assert list(found) == pytest.approx(oracle, rel=1e-4)


def test_scores_say_what_they_are_about() -> None:
    real = _set(50, 7)

    def scores(*pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float, float, float]:
        return official_scores([Objective(a, b, real) for a, b in pairs])

    good = scores((_set(10, 1), _set(10, 2)))
    far = scores((_set(10, 1, 2.0), _set(10, 2, 2.0)))
    assert far[0] > good[0]
    assert far[1] < good[1]
    # A pair whose phrasings give different images agrees less than either does with itself.
    apart = scores((_set(10, 1), -_set(10, 2)))
    assert apart[2] < 0 < good[2] < 1
    # Ten times the same image: no diversity, to the last digits.
    same = _set(1, 3).repeat(10, 1)
    assert scores((same, same))[3] < 1e-9 < 0.1 < good[3]
    # A real image counts once for each objective it belongs to.
    rare, often = _set(20, 8, 3.0), _set(20, 9)
    twice = official_scores(
        [Objective(_set(10, i), _set(10, i + 20), part) for i, part in enumerate((rare, often, often, often))]
    )
    once = official_scores(
        [Objective(_set(10, i), _set(10, i + 20), part) for i, part in enumerate((rare, rare, rare, often))]
    )
    assert twice.fbd < once.fbd


def test_real_images_of_an_objective_are_those_its_labels_ask_for() -> None:
    known = [{"polyp": "yes", "instrument": "no"}, {"polyp": "yes"}, {"polyp": "no"}, {}]
    pair = ("with a polyp", "containing a polyp")
    assert real_rows({"polyp": "yes"}, {"polyp": "yes"}, known, pair) == [0, 1]
    assert real_rows({}, {}, known, pair) == [0, 1, 2, 3]
    with pytest.raises(BadInput, match="two phrasings of one objective"):
        real_rows({"polyp": "yes"}, {"polyp": "no"}, known, pair)
    with pytest.raises(BadInput, match="which 1 images"):
        real_rows({"instrument": "no"}, {"instrument": "no"}, known, pair)


def test_every_departure_is_told() -> None:
    official = departures(OFFICIAL_MODEL, 10, 4, 0, 8)
    other = departures("folder/random-weight-vit", 6, 4, 1, 11)
    for word in ("images a prompt", "instead of", "no labels", "in no pair"):
        assert word in other
        assert word not in official
    for always in ("this study's", "stops after half", "not rounded"):
        assert always in official


PAIRS = [["with a polyp", "containing a polyp"], ["with no polyp", "without a polyp"]]


def _study(make_study: MakeStudy, model: Path, **evaluation: object) -> Study:
    labels = {"with no polyp": "no", "without a polyp": "no"}
    prompts = [
        {"text": text, "labels": {"polyp": labels.get(text, "yes")}} for pair in PAIRS for text in pair
    ]
    settings = {"prompts": prompts, "draws": 4, "medvqa": {"model": str(model), "pairs": PAIRS}}
    parts = {"concepts": ["polyp"], "probe": 0.6, "pretrain": 0.0}
    return make_study(reference=parts, evaluation={**settings, **evaluation})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Forty patients' noise pictures, redder where there is a "polyp", in probe and evaluate part."""
    folder, rng, records = tmp_path_factory.mktemp("reference"), np.random.default_rng(0), []
    for number in range(40):
        pixels = rng.integers(0, 156, (32, 32, 3), dtype=np.uint8)
        pixels[..., 0] += 90 * (number % 2)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        labels = {"polyp": "yes" if number % 2 else "no"}
        records.append(Record(f"p{number}", folder / f"{number}.png", ("a",), labels=labels))
    return Reference([], records[:20], records[20:], "0" * 64)


def test_a_study_gets_the_scores_it_asks_for(
    make_study: MakeStudy, reference: Reference, tmp_path: Path
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="extractor packages not installed")
    from transformers import ViTImageProcessorPil, ViTModel

    folder = save_vit(tmp_path / "random-weight-vit")
    study = _study(make_study, folder, clip_model=str(save_clip(tmp_path / "random-weight-clip")))
    images = (torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 255).round() / 255
    store = FeatureStore(tmp_path / "features", 32, "crop")
    found = measure(1, drawn_for(study, images), reference, study, store)
    assert found.medvqa is not None
    assert found.cosine is not None
    assert found.utility is not None
    # Which model gave a number is told by what its folder holds.
    told = [(found.medvqa.weights, found.medvqa.protocol), (found.cosine.weights, found.cosine.protocol)]
    clip = tmp_path / "random-weight-clip"
    assert told == [(sha256_folder(folder), medvqa.PROTOCOL), (sha256_folder(clip), clip_cosine.PROTOCOL)]
    assert found.near_copies == []  # no pretrain part, nothing that the start has seen

    processor, model = ViTImageProcessorPil.from_pretrained(folder), ViTModel.from_pretrained(folder)

    def tokens(pictures: list[Image.Image]) -> Array:
        with torch.no_grad():
            state = model(**processor(images=pictures, return_tensors="pt")).last_hidden_state
        features: Array = state[:, 0].double().numpy()
        return features

    drawn = tokens([Image.fromarray((255 * i).byte().permute(1, 2, 0).numpy()) for i in images])
    real = tokens([Image.open(record.image) for record in reference.evaluate])
    oracle = _by_hand([(drawn[:4], drawn[4:8], real[1::2]), (drawn[8:12], drawn[12:], real[0::2])])
    scores = found.medvqa
    assert [scores.fbd, scores.fidelity, scores.agreement, scores.diversity] == pytest.approx(
        oracle, rel=1e-3
    )
    assert scores.pairs == 2
    assert "4 images a prompt instead of 10" in scores.note
    assert "random-weight-vit" in scores.note


def test_pairs_and_models_that_do_not_fit_are_refused(
    make_study: MakeStudy, reference: Reference, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"`evaluation.medvqa.model`.* holds no config\.json"):
        check_medvqa(_study(make_study, tmp_path), reference)
    folder = save_vit(tmp_path / "random-weight-vit")
    check_medvqa(_study(make_study, folder), reference)
    only = [record for record in reference.evaluate if record.labels["polyp"] == "yes"]
    with pytest.raises(BadInput, match="which 0 images"):
        check_medvqa(_study(make_study, folder), Reference([], [], only, "0" * 64))
    pairs = {"model": str(folder), "pairs": [["with a polyp", "with the polyp"]]}
    with pytest.raises(BadInput, match='names "with the polyp", which is not in prompts'):
        _study(make_study, folder, medvqa=pairs)
    with pytest.raises(BadInput, match="stands in two places"):
        _study(make_study, folder, medvqa={**pairs, "pairs": [PAIRS[0], PAIRS[0]]})
    with pytest.raises(BadInput, match="medvqa needs draws of at least 2"):
        _study(make_study, folder, draws=1)
