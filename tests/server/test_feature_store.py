"""Features are computed once for the same images and the same extractor, and never mixed up."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from polyclinic.common.data.table import Record
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation import features
from polyclinic.server.evaluation.features import FeatureStore


class Counting:
    """Mean colour of an image times a factor; counts the images it was asked for."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.seen = factor, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.mean(dim=(2, 3)) * self.factor


def _extractor(forward: Counting, weights: str = "a") -> Extractor:
    return Extractor("means", 3, "mean of each channel", weights, forward)


def test_features_of_images_are_found_again_by_their_pixels(tmp_path: Path) -> None:
    images = torch.rand(70, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    forward = Counting()
    store = FeatureStore(tmp_path, 8, "crop")
    found = store.of_images(_extractor(forward), images)
    assert torch.allclose(found, images.mean(dim=(2, 3)))
    # Another process: a new store over the same folder.
    again = FeatureStore(tmp_path, 8, "crop").of_images(_extractor(forward), images.clone())
    assert torch.equal(found, again)
    assert forward.seen == 70

    other = images.clone()
    other[3, 0, 0, 0] = 1 - other[3, 0, 0, 0]
    assert not torch.equal(store.of_images(_extractor(forward), other), found)
    doubled = store.of_images(_extractor(Counting(2.0), weights="b"), images)
    assert torch.allclose(doubled, 2 * found)


def test_features_of_records_follow_the_files_content(tmp_path: Path) -> None:
    records = []
    for number, colour in enumerate([(255, 0, 0), (0, 255, 0)]):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (12, 8), colour).save(path)
        records.append(Record(f"p{number}", path, ("x",)))
    forward = Counting()
    store = FeatureStore(tmp_path / "features", 8, "crop")
    assert store.of_records(_extractor(forward), records).tolist() == [[1, 0, 0], [0, 1, 0]]
    FeatureStore(tmp_path / "features", 8, "crop").of_records(_extractor(forward), records)
    assert forward.seen == 2
    # The same name, another picture; another way to make it square.
    Image.new("RGB", (12, 8), (0, 0, 255)).save(records[0].image)
    assert store.of_records(_extractor(forward), records).tolist()[0] == [0, 0, 1]
    padded = FeatureStore(tmp_path / "features", 8, "pad").of_records(_extractor(forward), records)
    assert 0 < float(padded[0, 2]) < 1


def test_features_that_no_metric_can_use_name_the_image_or_the_extractor(tmp_path: Path) -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images[2, 0, 0, 0] = float("nan")
    store = FeatureStore(tmp_path / "features", 8, "crop")
    for _ in range(2):  # nothing broken was kept
        with pytest.raises(BadInput, match="1 of 4 images have features that are not finite, drawn image 3"):
            store.of_images(_extractor(Counting()), images)
    path = tmp_path / "grey.png"
    Image.new("RGB", (8, 8), (9, 9, 9)).save(path)
    with pytest.raises(BadInput, match=r"grey\.png first; check the extractor's weights"):
        store.of_records(_extractor(Counting(float("inf"))), [Record("p", path, ("x",))])


def test_other_code_makes_the_features_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, forward = torch.rand(2, 3, 8, 8), Counting()
    for number, text in enumerate(("one", "another"), start=1):
        code = tmp_path / f"{number}.py"
        code.write_text(text)
        monkeypatch.setattr(features, "CODE", (code,))
        for _ in range(2):
            FeatureStore(tmp_path, 8, "crop").of_images(_extractor(forward), images)
        assert forward.seen == number * len(images)


def test_what_turns_a_file_into_features_is_in_their_name() -> None:
    names = {path.name for path in features.CODE}
    assert {"radiomic.py", "efficientnet.py", "near.py", "hub.py", "pixels.py", "preprocess.py"} <= names
