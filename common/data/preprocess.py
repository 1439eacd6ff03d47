"""The one preprocessing that training images and reference images both go through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def preprocess(image: Image.Image, size: int, fit: str) -> Tensor:
    """Make an image square and turn it into pixels.

    Args:
        image: RGB image.
        size: Pixels a side.
        fit: `crop` takes the centre square, `pad` adds black borders.

    Returns:
        `[3, size, size]` in [-1, 1], float32.
    """
    return to_pixels([make_square(image, size, fit)])[0]


def to_pixels(squares: Sequence[Image.Image]) -> Tensor:
    """Turn square RGB images of one size into `[B, 3, size, size]` in [-1, 1], float32."""
    stack = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))
    return stack.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def make_square(image: Image.Image, size: int, fit: str) -> Image.Image:
    """Cut or pad an image to a square around its centre and resize it; arguments as in `preprocess`."""
    width, height = image.size
    side = min(width, height) if fit == "crop" else max(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # PIL's crop fills what lies outside the image with black, which is what `pad` asks for.
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def describe(size: int, fit: str) -> str:
    """Say in words what `preprocess` does, for the report."""
    way = "centre square" if fit == "crop" else "padded to a square with black"
    return f"{way}, Lanczos to {size} px"
