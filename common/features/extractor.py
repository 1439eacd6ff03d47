"""What an image feature extractor is, whatever network or formula stands behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Extractor:
    """Turns images into one row of features each.

    Attributes:
        name: How a report calls it.
        width: Features an image, d.
        preprocessing: What happens to an image in [0, 1] until its features are there, in words.
        weights: SHA-256 of the weights; empty where there are none.
        forward: Images [B, 3, H, W] in [0, 1] on `device` to features [B, d].
        standardise: Whether features have units of their own and must be z-scored by the reference
            before distances are taken.
        device: Where `forward` computes.
        batch_size: Images a forward pass.
    """

    name: str
    width: int
    preprocessing: str
    weights: str
    forward: Callable[[Tensor], Tensor]
    standardise: bool = False
    device: str = "cpu"
    batch_size: int = 32

    def extract(self, images: Tensor, on_progress: OnProgress | None = None) -> Tensor:
        """Compute features, batch by batch.

        Images that will be compared must have the same size: networks see resolution.

        Args:
            images: RGB images in [0, 1], [N, 3, H, W], floating point; repeat a grey image's channel.
            on_progress: Called after each batch with (images done, images in all).

        Returns:
            Features [N, d], float32, on the CPU. A row that is not finite belongs to a broken image.

        Raises:
            ValueError: The images have another shape, type or range.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"expected floating-point images [N, 3, H, W], got {images.dtype} {tuple(images.shape)}"
            )
        total = len(images)
        features = torch.empty(total, self.width)
        with torch.inference_mode():
            for start in range(0, total, self.batch_size):
                batch = images[start : start + self.batch_size].float()
                if bool((batch < -1e-3).any()) or bool((batch > 1 + 1e-3).any()):
                    raise ValueError("expected images in [0, 1]; rescale them before extracting features")
                features[start : start + len(batch)] = self.forward(batch.to(self.device)).cpu()
                if on_progress is not None:
                    on_progress(start + len(batch), total)
        return features
