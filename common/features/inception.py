"""Inception-2048: the network whose features a Frechet distance must be taken on to be called FID.

The graph of Inception v3 as TensorFlow's 2015 release runs it, which is what the published PyTorch weights
(`pt_inception-2015-12-05-6726825d.pth`, in the layout of torchvision's model) belong to: average pools leave
the padding out of the count, the last block takes a maximum, images are enlarged to 299 px as TensorFlow 1
did it, without half-pixel centres. No weights ship with this package: a study names a local file of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.common.features.extractor import Extractor
from polyclinic.common.files import sha256_file
from polyclinic.common.refusals import BadInput

EXTRACTOR_NAME = "Inception-2048"
FEATURE_WIDTH = 2048
SIDE = 299
PREPROCESSING = (
    f"RGB rounded to 8 bits; bilinear to {SIDE} px as TensorFlow 1 (no half-pixel centres, no antialias); "
    f"(x - 128) / 128; mean over positions of the last block ({FEATURE_WIDTH} features)"
)

Kernel = int | tuple[int, int]
Chain = list[tuple[str, int, Kernel, int]]  # name, channels, kernel, stride


class _Convolution(nn.Module):
    """Convolution, batch normalisation and ReLU; keeps the size unless it strides."""

    def __init__(self, before: int, after: int, kernel: Kernel, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(before, after, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches of convolutions side by side, and one of pooling.

    Args:
        before: Channels that come in.
        branches: For each, its convolutions as (name, channels, kernel, stride). A name that ends in "a"
            is followed by its sibling "b": both see the same input and stand side by side.
        pool: Channels of the convolution behind the pooling; 0: a striding maximum without one.
        pooling: `average` or `max`.
    """

    def __init__(
        self,
        before: int,
        branches: Sequence[Chain],
        pool: int,
        pooling: str = "average",
    ) -> None:
        super().__init__()
        self.pooling = pooling if pool else "reduce"
        self.names = [[f"branch{name}" for name, *_ in branch] for branch in branches]
        for branch in branches:
            width = before
            for name, after, kernel, stride in branch:
                setattr(self, f"branch{name}", _Convolution(width, after, kernel, stride))
                width = width if name.endswith("a") else after
        if pool:
            self.branch_pool = _Convolution(before, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for names in self.names:
            y = x
            for name in names:
                layer = getattr(self, name)
                if name.endswith("a"):
                    outputs.append(layer(y))
                else:
                    y = layer(y)
            outputs.append(y)
        if self.pooling == "reduce":
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self.pooling == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, dim=1)


def _a(before: int, pool: int) -> _Block:
    double: Chain = [("3x3dbl_1", 64, 1, 1), ("3x3dbl_2", 96, 3, 1), ("3x3dbl_3", 96, 3, 1)]
    return _Block(before, [[("1x1", 64, 1, 1)], [("5x5_1", 48, 1, 1), ("5x5_2", 64, 5, 1)], double], pool)


def _b(before: int) -> _Block:
    double: Chain = [("3x3dbl_1", 64, 1, 1), ("3x3dbl_2", 96, 3, 1), ("3x3dbl_3", 96, 3, 2)]
    return _Block(before, [[("3x3", 384, 3, 2)], double], 0)


def _c(before: int, inner: int) -> _Block:
    across, down = (1, 7), (7, 1)
    single: Chain = [("7x7_1", inner, 1, 1), ("7x7_2", inner, across, 1), ("7x7_3", 192, down, 1)]
    double: Chain = [
        ("7x7dbl_1", inner, 1, 1),
        ("7x7dbl_2", inner, down, 1),
        ("7x7dbl_3", inner, across, 1),
        ("7x7dbl_4", inner, down, 1),
        ("7x7dbl_5", 192, across, 1),
    ]
    return _Block(before, [[("1x1", 192, 1, 1)], single, double], 192)


def _d(before: int) -> _Block:
    long: Chain = [("7x7x3_1", 192, 1, 1), ("7x7x3_2", 192, (1, 7), 1), ("7x7x3_3", 192, (7, 1), 1)]
    return _Block(before, [[("3x3_1", 192, 1, 1), ("3x3_2", 320, 3, 2)], [*long, ("7x7x3_4", 192, 3, 2)]], 0)


def _e(before: int, pooling: str) -> _Block:
    single: Chain = [("3x3_1", 384, 1, 1), ("3x3_2a", 384, (1, 3), 1), ("3x3_2b", 384, (3, 1), 1)]
    double: Chain = [
        ("3x3dbl_1", 448, 1, 1),
        ("3x3dbl_2", 384, 3, 1),
        ("3x3dbl_3a", 384, (1, 3), 1),
        ("3x3dbl_3b", 384, (3, 1), 1),
    ]
    return _Block(before, [[("1x1", 320, 1, 1)], single, double], 192, pooling)


def inception_network() -> nn.Sequential:
    """The network up to its last block, with random weights; names are those of the published files."""
    layers: dict[str, nn.Module] = {
        "Conv2d_1a_3x3": _Convolution(3, 32, 3, 2),
        "Conv2d_2a_3x3": _Convolution(32, 32, 3, padded=False),
        "Conv2d_2b_3x3": _Convolution(32, 64, 3),
        "pool_1": nn.MaxPool2d(3, 2),
        "Conv2d_3b_1x1": _Convolution(64, 80, 1),
        "Conv2d_4a_3x3": _Convolution(80, 192, 3, padded=False),
        "pool_2": nn.MaxPool2d(3, 2),
        "Mixed_5b": _a(192, 32),
        "Mixed_5c": _a(256, 64),
        "Mixed_5d": _a(288, 64),
        "Mixed_6a": _b(288),
        "Mixed_6b": _c(768, 128),
        "Mixed_6c": _c(768, 160),
        "Mixed_6d": _c(768, 160),
        "Mixed_6e": _c(768, 192),
        "Mixed_7a": _d(768),
        "Mixed_7b": _e(1280, "average"),
        "Mixed_7c": _e(2048, "max"),
    }
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    return network.eval().requires_grad_(False)


def inception(path: Path, device: str = "cpu") -> Extractor:
    """Build the extractor from a local file of weights, safetensors or a state dict of PyTorch's.

    Raises:
        BadInput: The file is not a state dict of this network.
    """
    network = inception_network()
    try:
        if path.suffix == ".safetensors":
            state = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        # The classifier and the training-time head are in the files, and not in the features.
        kept = {name: t for name, t in state.items() if not name.startswith(("fc.", "AuxLogits."))}
        network.load_state_dict(kept)
    except Exception as error:
        raise BadInput(
            f"{path}: not the weights of Inception v3 in PyTorch's layout ({type(error).__name__}); name "
            "pt_inception-2015-12-05-6726825d.pth or a file with the same names and shapes"
        ) from error
    network.to(device)

    def forward(images: Tensor) -> Tensor:
        features: Tensor = network(prepare(images)).mean(dim=(2, 3))
        return features

    return Extractor(EXTRACTOR_NAME, FEATURE_WIDTH, PREPROCESSING, sha256_file(path), forward, device=device)


def prepare(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 1] to what the network was trained on, [N, 3, 299, 299]."""
    x = (255 * images.clamp(0, 1)).round()
    for dim in (2, 3):
        x = _resize_like_tensorflow(x, dim)
    return (x - 128) / 128


def _resize_like_tensorflow(x: Tensor, dim: int) -> Tensor:
    """Linear interpolation along one axis: output i lies at i * (old size / new size), edges repeat."""
    size = x.shape[dim]
    place = torch.arange(SIDE, device=x.device) * (size / SIDE)
    low = place.long()
    high = (low + 1).clamp_max(size - 1)
    share = (place - low).view([-1 if axis == dim else 1 for axis in range(4)])
    return x.index_select(dim, low).lerp(x.index_select(dim, high), share.expand_as(x.index_select(dim, low)))
