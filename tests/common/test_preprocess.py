"""One preprocessing: square, resized, in [-1, 1], and the same for every image of a set."""

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.common.data.preprocess import describe, preprocess


def _halves(width: int, height: int) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(40, 40), (90, 30), (30, 91), (7, 5)])
def test_shape_type_and_range(fit: str, size: tuple[int, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    pixels = preprocess(noise, 32, fit)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_an_image_of_the_right_size_only_changes_scale(fit: str) -> None:
    values = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    expected = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(preprocess(Image.fromarray(values), 16, fit), expected, atol=1e-6, rtol=0)


def test_crop_keeps_the_centre_and_pad_keeps_everything() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    cropped = preprocess(Image.fromarray(wide), 20, "crop")
    assert torch.equal(cropped, torch.ones(3, 20, 20))
    padded = preprocess(Image.fromarray(wide), 60, "pad")
    expected = -torch.ones(3, 60, 60)
    expected[:, 20:40, 20:40] = 1
    assert torch.equal(padded, expected)


def test_pad_centres_a_tall_image_between_black_borders() -> None:
    padded = preprocess(Image.new("RGB", (10, 30), (255, 255, 255)), 30, "pad")
    assert torch.equal(padded[:, :, 10:20], torch.ones(3, 30, 10))
    assert torch.equal(padded[:, :, :10], -torch.ones(3, 30, 10))
    assert torch.equal(padded[:, :, 20:], -torch.ones(3, 30, 10))


def test_colour_and_direction_are_kept() -> None:
    pixels = preprocess(_halves(64, 64), 32, "crop")
    red, blue = pixels[:, :, :12].mean((1, 2)), pixels[:, :, 20:].mean((1, 2))
    torch.testing.assert_close(red, torch.tensor([1.0, -1.0, -1.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(blue, torch.tensor([-1.0, -1.0, 1.0]), atol=0.02, rtol=0)


def test_shrinking_filters_before_it_samples() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = preprocess(Image.fromarray(board).convert("RGB"), 16, "crop")
    assert float(pixels[:, 2:-2, 2:-2].abs().max()) < 0.05


def test_words_say_what_is_done() -> None:
    assert describe(64, "crop") == "centre square, Lanczos to 64 px"
    assert describe(256, "pad") == "padded to a square with black, Lanczos to 256 px"
