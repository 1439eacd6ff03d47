"""Extractors beside the default: radiomic by hand, Inception against torch-fidelity, models in hub form."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.evaluation_settings import ExtractorSettings
from polyclinic.common.features.inception import inception, inception_network
from polyclinic.common.features.load import check_extractors, load_extractor
from polyclinic.common.features.radiomic import NAMES, radiomic, radiomic_features
from polyclinic.common.refusals import BadInput


def _pictures(n: int, height: int, width: int, seed: int = 1) -> Tensor:
    """Smooth random colour pictures of 8 bits, [n, 3, height, width]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    return (smooth * 255).round() / 255


def _feature(features: Tensor, name: str) -> Tensor:
    return features[:, NAMES.index(name)]


def _grey(image: Tensor) -> np.ndarray:
    return np.tensordot(np.array([0.299, 0.587, 0.114]), image.double().numpy(), 1)


def test_radiomic_features_agree_with_numpy_and_scipy() -> None:
    images = _pictures(3, 40, 48)
    features = radiomic_features(images)
    assert features.shape == (3, 99)
    assert len(set(NAMES)) == 99
    for row, image in enumerate(images):
        grey = _grey(image)
        found = {name: float(value) for name, value in zip(NAMES, features[row], strict=True)}
        assert found["first order: mean"] == pytest.approx(grey.mean(), abs=1e-5)
        assert found["first order: std"] == pytest.approx(grey.std(), abs=1e-5)
        assert found["first order: p95"] == pytest.approx(np.quantile(grey, 0.95), abs=2e-3)
        shares = np.histogram(np.clip((grey * 32).astype(int), 0, 31), bins=32, range=(0, 32))[0] / grey.size
        entropy = -sum(p * math.log(p) for p in shares if p) / math.log(32)
        assert found["first order: entropy"] == pytest.approx(entropy, abs=1e-3)

        levels = np.clip((grey * 16).astype(int), 0, 15)
        joint = np.zeros((16, 16))
        for dy, dx in ((0, 2), (2, 0), (2, 2), (2, -2)):
            single = np.zeros((16, 16))
            for y in range(40 - dy):
                for x in range(max(0, -dx), 48 - max(0, dx)):
                    single[levels[y, x], levels[y + dy, x + dx]] += 1
            joint += (single + single.T) / single.sum() / 8
        i, j = np.mgrid[:16, :16]
        mean = (joint * i).sum()
        correlation = (joint * (i - mean) * (j - mean)).sum() / (joint * (i - mean) ** 2).sum()
        assert found["co-occurrence 2 px: dissimilarity"] == pytest.approx(
            (joint * abs(i - j)).sum() / 15, abs=1e-5
        )
        assert found["co-occurrence 2 px: correlation"] == pytest.approx(correlation, abs=1e-4)
        assert found["co-occurrence 2 px: energy"] == pytest.approx(math.sqrt((joint**2).sum()), abs=1e-5)

        # scipy samples the filter and cuts its tails.
        response = 4 * ndimage.gaussian_laplace(grey, 2.0, mode="mirror")
        assert 10 ** found["LoG 2: log energy"] == pytest.approx((response**2).mean(), rel=0.05)
        window = np.outer(*(np.hanning(n + 1)[:-1] for n in (40, 48)))
        power = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2 / grey.size
        radius = np.hypot(np.fft.fftfreq(40)[:, None], np.fft.fftfreq(48)[None, :])
        ring = power[(radius >= 1 / 24) & (radius < 2 / 24)].mean()
        assert found["spectrum: ring 2"] == pytest.approx(math.log10(ring + 1e-6), abs=1e-3)
        assert found["colour: corr RG"] == pytest.approx(
            np.corrcoef(image[0].flatten(), image[1].flatten())[0, 1], abs=1e-3
        )
        # An orthonormal transform keeps the energy: details of level 1 are differences over two.
        detail = (grey[::2, ::2] - grey[::2, 1::2] + grey[1::2, ::2] - grey[1::2, 1::2]) / 2
        assert found["Haar 1: LH"] == pytest.approx(math.log10((detail**2).mean() + 1e-6), abs=1e-3)


def test_radiomic_features_see_what_they_are_for() -> None:
    images = _pictures(4, 64, 64)
    plain = radiomic_features(images)
    noise = 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    noisy = radiomic_features((images + noise).clamp(0, 1))
    assert bool((_feature(noisy, "Haar 1: HH") > _feature(plain, "Haar 1: HH") + 0.5).all())
    assert bool((_feature(noisy, "spectrum: slope") > _feature(plain, "spectrum: slope")).all())
    tinted = radiomic_features(images * torch.tensor([1.0, 0.8, 0.8])[:, None, None])
    assert bool((_feature(tinted, "colour: chroma r") > _feature(plain, "colour: chroma r") + 0.02).all())
    flat = radiomic_features(torch.full((1, 3, 16, 16), 0.5))
    assert flat.isfinite().all()
    assert radiomic_features(torch.zeros(1, 3, 33, 47)).isfinite().all()
    with pytest.raises(ValueError, match="at least 16"):
        radiomic_features(torch.zeros(1, 3, 15, 40))
    broken = images.clone()
    broken[1, 0, 3, 3] = torch.nan
    assert radiomic().extract(broken).isfinite().all(dim=1).tolist() == [True, False, True, True]


def _seeded_inception() -> dict[str, Tensor]:
    """Weights from a seed, scaled so that signals neither die nor explode."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, tensor in sorted(inception_network().state_dict().items()):
        if name.endswith("conv.weight"):
            state[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith("num_batches_tracked"):
            state[name] = tensor
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
        else:
            state[name] = 0.2 * torch.randn(tensor.shape, generator=generator)
    return state


def test_inception_agrees_with_torch_fidelity(tmp_path: Path) -> None:
    """The same seeded weights and pictures through torch-fidelity 0.4.0's InceptionV3 gave these features.

    21,785,568 parameters are torchvision's Inception v3 without its classifiers.
    """
    assert sum(p.numel() for p in inception_network().parameters()) == 21_785_568
    # Published files also hold the classifier and, as torchvision's do, the head used in training.
    extra = {"fc.weight": torch.zeros(1008, 2048), "AuxLogits.fc.bias": torch.zeros(3)}
    torch.save(_seeded_inception() | extra, tmp_path / "weights.pth")
    extractor = inception(tmp_path / "weights.pth")
    features = extractor.extract(_pictures(2, 50, 70))
    expected = torch.tensor(
        [
            [1.0980796814, 0.0, 0.2671788931, 1.3476099968, 0.0259951968, 0.2558614612],
            [1.1125859022, 0.0, 0.3135887384, 1.7188869715, 0.0569128580, 0.2972663641],
        ]
    )
    torch.testing.assert_close(features[:, :6], expected, atol=1e-4, rtol=1e-4)
    norms = torch.tensor([139.6128832821, 149.4117345424])
    torch.testing.assert_close(features.norm(dim=1), norms, atol=0.0, rtol=1e-5)

    save_file(_seeded_inception(), tmp_path / "weights.safetensors")
    again = inception(tmp_path / "weights.safetensors")
    assert torch.equal(again.extract(_pictures(1, 50, 70)), extractor.extract(_pictures(1, 50, 70)))
    assert again.weights != extractor.weights
    save_file({"conv": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="not the weights of Inception"):
        inception(tmp_path / "other.safetensors")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 with registers and random weights, saved as RAD-DINO is."""
    from transformers import BitImageProcessorPil, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    folder = tmp_path_factory.mktemp("hub") / "tiny-dino"
    torch.manual_seed(0)
    Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            num_register_tokens=4,
        )
    ).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=3
    ).save_pretrained(folder)
    return folder


def test_a_model_in_hub_form_gives_its_own_features(dinov2: Path) -> None:
    from transformers import AutoModel, BitImageProcessorPil

    images = _pictures(3, 48, 48)
    first = load_extractor(ExtractorSettings(source=str(dinov2)))
    mean = load_extractor(ExtractorSettings(source=str(dinov2), pooling="mean"))
    processor = BitImageProcessorPil.from_pretrained(dinov2)
    pixels = processor(
        images=[(255 * image).round().byte().permute(1, 2, 0).numpy() for image in images],
        return_tensors="pt",
    )["pixel_values"]
    assert pixels.shape == (3, 3, 32, 32)
    with torch.inference_mode():
        state = AutoModel.from_pretrained(dinov2).eval()(pixel_values=pixels).last_hidden_state
    assert state.shape[1] == 1 + 4 + 16
    torch.testing.assert_close(first.extract(images), state[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mean.extract(images), state[:, 5:].mean(dim=1), atol=1e-5, rtol=1e-4)
    assert first.width == 32
    assert "first token" in first.name
    assert "'shortest_edge': 40" in first.preprocessing
    assert len(first.weights) == 64
    broken = images.clone()
    broken[1, 0, 0, 0] = torch.nan
    assert first.extract(broken).isfinite().all(dim=1).tolist() == [True, False, True]


def test_a_convolutional_network_in_hub_form(tmp_path: Path) -> None:
    from transformers import ConvNextConfig, ConvNextModel, ViTImageProcessorPil

    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    extractor = load_extractor(ExtractorSettings(source=str(tmp_path)))
    assert extractor.extract(_pictures(2, 40, 40)).shape == (2, 16)


def test_what_is_not_there_is_said(tmp_path: Path, dinov2: Path) -> None:
    def refuse(match: str, **settings: object) -> None:
        with pytest.raises(BadInput, match=match):
            check_extractors([ExtractorSettings.model_validate(settings)])

    refuse("neither a path that exists", source="/nowhere/model")
    refuse("no config.json", source=str(tmp_path))
    refuse("are not there; download", source="inception", file="/nowhere/inception.pth")
    refuse("not to the study's", source=str(dinov2), sha256="0" * 64)
    (tmp_path / "weights.pth").write_bytes(b"x")
    refuse("not to the study's", source="inception", file=str(tmp_path / "weights.pth"), sha256="0" * 64)
    refuse("download it where there is a network", source="nobody/such-model")
    check_extractors(
        [ExtractorSettings(source="nobody/such-model")], download=False
    )  # a plan fetches nothing

    # A folder that brings code of its own: the code is not run.
    marker = tmp_path / "ran"
    (tmp_path / "model.py").write_text(f"open({str(marker)!r}, 'w')\nclass M: pass\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModel": "model.M"}, "model_type": "m"})
    )
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor"})
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="without code of its own"):
        load_extractor(ExtractorSettings(source=str(tmp_path)))
    assert not marker.exists()
