"""Synthetic images that are nearer to a public image than public patients are to each other.

A calibration of the gate that every hospital runs over its own images (common/features/near.py): the same
distances, and a threshold found in the same way, where everything is public. The images searched are the
pretrain part, which the autoencoder and the warm start have seen; the threshold comes from the evaluate
part, whose patients are others.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polyclinic.common.features.extractor import Extractor
from polyclinic.common.features.near import (
    FEATURE_MEASURE,
    PIXEL_MEASURE,
    SIDE,
    Nearest,
    nearest_by_features,
    nearest_by_pixels,
    smallest_alpha,
    threshold,
    thumbnails,
)
from polyclinic.server.evaluation.answers import Answer, estimate
from polyclinic.server.evaluation.bootstrap import draw_weights, group_counts, share_draws
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.results import NearCopies
from polyclinic.server.reference import Reference

ALPHA = 0.01
FEWEST_PATIENTS = 10
NOTE = (
    "Compares drawn images with the public images that the starting weights have seen. It finds gross "
    "copying only: distances do not tell whether a patient's membership can be found out, and few finds are "
    "no proof of privacy. A smooth picture is nearer to every other than a detailed one, so look at the "
    "finds before you call them copies. Each hospital compares with its own images itself."
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


def near_copies(
    images: Tensor, prompts: Sequence[str], extractor: Extractor, reference: Reference, store: FeatureStore
) -> list[NearCopies]:
    """Compare drawn images with the pretrain part, by features and by aligned pixels.

    Args:
        images: [N, 3, H, W] in [0, 1].
        prompts: Prompt of each.
        extractor: Gives the features.
        reference: Public images. Nothing is compared where the pretrain part is empty, or where the evaluate
            part has fewer than `FEWEST_PATIENTS`: the threshold would flag every tenth image.
        store: Keeps the features of both.
    """
    patients = [record.patient for record in reference.evaluate]
    if not reference.pretrain or len(set(patients)) < FEWEST_PATIENTS:
        return []

    def sets(by: Extractor) -> list[Tensor]:
        return [
            store.of_images(by, images),
            store.of_records(by, reference.pretrain),
            store.of_records(by, reference.evaluate),
        ]

    drawn, seen, other = sets(extractor)
    if extractor.standardise:
        # Features in units of their own: the largest would be all that a cosine sees.
        mean, scale = seen.mean(dim=0), seen.std(dim=0).clamp_min(1e-6)
        drawn, seen, other = ((features - mean) / scale for features in (drawn, seen, other))
    found = [nearest_by_features(some, seen) for some in (drawn, other)]
    by_features = measure_near_copies(
        found[0], prompts, found[1], patients, f"{FEATURE_MEASURE}, {extractor.name}"
    )
    drawn, seen, other = (rows.reshape(-1, SIDE, SIDE) for rows in sets(thumbnail_extractor()))
    found = [nearest_by_pixels(some, seen) for some in (drawn, other)]
    return [by_features, measure_near_copies(found[0], prompts, found[1], patients, PIXEL_MEASURE)]


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
