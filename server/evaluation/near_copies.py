"""Synthetic images that are nearer to a public image than public patients are to each other.

A calibration of the gate that every hospital runs over its own images (common/features/near.py): the same
distances, and a threshold found in the same way, where everything is public. The images searched are the
pretrain part, which the autoencoder and the warm start have seen; the threshold comes from the evaluate
part, whose patients are others.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyclinic.common.features.extractor import Extractor
from polyclinic.common.features.near import (
    PIXEL_MEASURE,
    SIDE,
    Nearest,
    smallest_alpha,
    threshold,
    thumbnails,
)
from polyclinic.server.evaluation.answers import Answer, estimate
from polyclinic.server.evaluation.bootstrap import draw_weights, group_counts, share_draws
from polyclinic.server.evaluation.results import NearCopies

ALPHA = 0.01
NOTE = (
    "Compares drawn images with the public images that the starting weights have seen. It finds gross "
    "copying only: distances do not tell whether a patient's membership can be found out, and few finds are "
    "no proof of privacy. Each hospital compares with its own images itself."
)
COARSE = " The reference has too few patients for a chance of {wanted:.0%}: it is {alpha:.1%}."


def thumbnail_extractor() -> Extractor:
    """Thumbnails for `nearest_by_pixels` as flat rows, so that they are kept as features are."""
    return Extractor(
        name="thumbnail",
        width=SIDE * SIDE,
        preprocessing=PIXEL_MEASURE,
        weights="",
        forward=lambda images: thumbnails(images).flatten(1),
    )


def measure_near_copies(
    synthetic: Nearest, prompts: Sequence[str], real: Nearest, patients: Sequence[str], measure: str
) -> NearCopies:
    """Count near copies under a threshold that real images of other patients fall below with chance alpha.

    Args:
        synthetic: Distances from drawn images to the public images the model has seen.
        prompts: Prompt of each drawn image.
        real: Distances from public images of other patients to the same images.
        patients: Patient of each of those.
        measure: What the distance is.
    """
    alpha = max(ALPHA, smallest_alpha(patients))
    limit = threshold(real.distances, patients, alpha)
    near = (synthetic.distances < limit).tolist()
    bootstrap = draw_weights(prompts, "prompts")
    rows = list(range(len(near)))
    draws = share_draws([group_counts(rows, near, bootstrap)], bootstrap.weights)[0]
    return NearCopies(
        found=sum(near),
        n=len(near),
        share=estimate([Answer(rows, sum(near) / len(near), draws)], bootstrap),
        expected=float((real.distances < limit).double().mean()),
        alpha=alpha,
        threshold=limit,
        measure=measure,
        note=NOTE + (COARSE.format(wanted=ALPHA, alpha=alpha) if alpha > ALPHA else ""),
    )
