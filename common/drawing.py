"""Draw images from a generator by prompt and seed: for the coordinator, and for a site's own gate."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from polyclinic.common.generators.base import Family, in_batches
from polyclinic.common.progress import track
from polyclinic.common.study import Study


def sample(
    family: Family, study: Study, wanted: list[tuple[str, int]], label: str, seed: str | None = None
) -> Tensor:
    """Draw images through the family's own pipeline.

    Args:
        family: Loaded with its encoders and the state to sample from.
        study: Gives the sampling settings.
        wanted: Prompt and draw number of each image; an image depends on nothing else.
        label: What the progress bar says.
        seed: Another one than the study's.

    Returns:
        `[N, 3, H, W]` in [0, 1], on the CPU.
    """
    settings, size = study.evaluation, study.data.image_size
    first = settings.seed if seed is None else seed
    pipeline = family.pipeline()
    images: list[Tensor] = []
    with track(label, len(wanted)) as advance, torch.no_grad():
        for batch in in_batches(wanted, settings.batch_size):
            seeds = [hashlib.sha256(f"{first}|{text}|{draw}".encode()).digest() for text, draw in batch]
            generators = [torch.Generator().manual_seed(int.from_bytes(s[:7], "big")) for s in seeds]
            drawn = family.draw(pipeline, [text for text, _ in batch], generators, settings, size)
            # What is judged is what is delivered, 8 bits a channel, as the reference's images are.
            images.append((drawn * 255).round() / 255)
            advance(len(batch))
    return torch.cat(images)
