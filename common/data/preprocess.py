"""The one preprocessing that training images and reference images both go through."""

from __future__ import annotations

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
    pixels = torch.from_numpy(np.asarray(make_square(image, size, fit), dtype=np.float32).copy())
    return pixels.permute(2, 0, 1) / 127.5 - 1


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
