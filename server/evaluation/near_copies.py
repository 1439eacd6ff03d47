"""Public patients of whom a drawn image is a near copy, judged by patients whom the generator never saw.

A rehearsal of the gate that every hospital runs over its own images (common/features/near.py), where
everything is public. Looked for are the patients of the pretrain part, which the autoencoder and the warm
start have seen; the threshold comes from how near *the same drawn images* come to the patients of the
evaluate part, which neither has seen. So whatever draws near to everybody, such as a smooth or an average
picture, draws the threshold down with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    "Looks for public patients whom the starting weights have seen among the drawn images. It finds gross "
    "copying only: distances do not tell whether a patient's membership can be found out, and few finds are "
    "no proof of privacy. Each hospital compares with its own images itself."
)
COARSE = " The reference has too few patients for a chance of {wanted:.0%}: it is {alpha:.1%}."
TWICE = " Left out of the calibration, since the pretrain part has an image of theirs under another id: {n}."
SAME = 1e-3  # between thumbnails of one image


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
    images: Tensor, extractor: Extractor, reference: Reference, store: FeatureStore
) -> list[NearCopies]:
    """Look for the pretrain part's patients among drawn images, by features and by aligned pixels.

    Args:
        images: [N, 3, H, W] in [0, 1].
        extractor: Gives the features.
        reference: Public images. Nothing is compared where the pretrain part is empty, or where the evaluate
            part has fewer than `FEWEST_PATIENTS`: the threshold would flag every tenth patient.
        store: Keeps the features of both.
    """
    if not reference.pretrain:
        return []
    twice = _seen_under_another_id(reference, store)
    parts = reference.pretrain, [record for record in reference.evaluate if record.patient not in twice]
    seen_names, fresh_names = ([record.patient for record in part] for part in parts)
    if len(set(fresh_names)) < FEWEST_PATIENTS:
        return []
    more = TWICE.format(n=len(twice)) if twice else ""

    def sets(by: Extractor) -> list[Tensor]:
        return [store.of_images(by, images), *(store.of_records(by, part) for part in parts)]

    drawn, seen, fresh = sets(extractor)
    if extractor.standardise:
        # Features in units of their own: the largest would be all that a cosine sees.
        mean, scale = seen.mean(dim=0), seen.std(dim=0).clamp_min(1e-6)
        drawn, seen, fresh = ((features - mean) / scale for features in (drawn, seen, fresh))
    by_features = [nearest_by_features(some, drawn) for some in (seen, fresh)]
    drawn, seen, fresh = (rows.reshape(-1, SIDE, SIDE) for rows in sets(thumbnail_extractor()))
    by_pixels = [nearest_by_pixels(some, drawn) for some in (seen, fresh)]
    return [
        measure_near_copies(found[0], seen_names, found[1], fresh_names, measure, more)
        for found, measure in (
            (by_features, f"{FEATURE_MEASURE}, {extractor.name}"),
            (by_pixels, PIXEL_MEASURE),
        )
    ]


def measure_near_copies(
    seen: Nearest,
    seen_patients: Sequence[str],
    fresh: Nearest,
    fresh_patients: Sequence[str],
    measure: str,
    more: str = "",
) -> NearCopies:
    """Count patients with a near copy, under a threshold that fresh patients fall below with chance alpha.

    A patient counts once, by the nearest of their images: given the drawn images, a patient whom the
    generator has not seen is exchangeable with the fresh ones, so the conformal threshold holds exactly.

    Args:
        seen: Nearest drawn image of each public image that the generator has seen.
        seen_patients: Patient of each of those.
        fresh: Nearest drawn image of each public image that it has not seen.
        fresh_patients: Patient of each of those.
        measure: What the distance is.
        more: What else the note is to say.
    """
    near, control = _by_patient(seen, seen_patients), _by_patient(fresh, fresh_patients)
    alpha = max(ALPHA, smallest_alpha(list(control)))
    limit = threshold(torch.tensor([*control.values()], dtype=torch.float64), list(control), alpha)
    flags = [distance < limit for distance in near.values()]
    copies = seen.rows[seen.distances < limit]
    bootstrap = draw_weights(list(near), "patients")
    rows = list(range(len(flags)))
    draws = share_draws([group_counts(rows, flags, bootstrap)], bootstrap.weights)[0]
    return NearCopies(
        found=sum(flags),
        n=len(flags),
        images=len(copies.unique()),
        share=estimate([Answer(rows, sum(flags) / len(flags), draws)], bootstrap),
        expected=sum(distance < limit for distance in control.values()) / len(control),
        alpha=alpha,
        threshold=limit,
        measure=measure,
        note=NOTE + (COARSE.format(wanted=ALPHA, alpha=alpha) if alpha > ALPHA else "") + more,
    )


def _seen_under_another_id(reference: Reference, store: FeatureStore) -> set[str]:
    """Find patients of the evaluate part of whom the pretrain part has an image.

    Copies of it would count as what falls near to the unseen by chance, and put the threshold at 0.
    """
    seen, fresh = (
        store.of_records(thumbnail_extractor(), part) for part in (reference.pretrain, reference.evaluate)
    )
    same = (nearest_by_features(fresh, seen).distances < SAME).tolist()
    return {record.patient for record, twice in zip(reference.evaluate, same, strict=True) if twice}


def _by_patient(nearest: Nearest, patients: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for patient, distance in zip(patients, nearest.distances.tolist(), strict=True):
        found[patient] = min(found.get(patient, distance), distance)
    return found
