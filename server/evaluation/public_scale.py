"""What the sites' extra releases measure with, taken from the public reference and the start alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.common.data.holdout import position
from polyclinic.common.data.table import Record
from polyclinic.common.features import near
from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import PublicScale, Study
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.reference import Reference

FEWEST_PATIENTS = 12  # public ones, to take a scale from
CHANCE = 0.005  # of a false near copy, per image and distance, where the reference is large enough


def public_scale(
    study: Study, reference: Reference, store: FeatureStore, draw: Callable[[], Tensor] | None = None
) -> PublicScale | None:
    """Take what the sites measure with from the reference's evaluate part; None where nothing is asked for.

    The bandwidth is the median distance between two halves of its patients, by a keyed hash. Below a
    threshold an image falls seldom in both of two searches that have nothing to find: for public images of
    one half among those of the other, and for public images among what *the start* draws, which has seen none
    of these patients: smooth, average pictures, which are nearer to everybody than people are.

    Args:
        study: With extra releases, or without.
        reference: Public images.
        store: Keeps their features.
        draw: Draws what a site will draw, by the start; None where the start is untrained, and draws noise.

    Raises:
        BadInput: Too few public patients.
    """
    asked = study.releases
    if not asked.epsilons and not asked.leakage_gate:
        return None
    records = reference.evaluate
    halves: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        halves[position(record.patient, f"{study.reference.key}/near") < 0.5].append(record)
    if min(len({r.patient for r in half}) for half in halves) < FEWEST_PATIENTS // 2:
        raise BadInput(
            f"[releases] needs at least {FEWEST_PATIENTS} patients in the reference's evaluate part to take "
            "its scales from; enlarge the reference, or its evaluate share"
        )
    extractor = efficientnet()
    one, other = (store.of_records(extractor, half) for half in halves)
    more = max(1.0, study.evaluation.images / len(other))  # a site searches that many more images
    chance = max(CHANCE / more, near.smallest_alpha([record.patient for record in halves[0]]))
    limits = [_limits(_looks(halves[0], extractor, store), _looks(halves[1], extractor, store), chance)]
    if asked.leakage_gate and draw is not None:
        drawn = draw()
        looks = Looks(store.of_images(extractor, drawn), near.thumbnails(drawn), [])
        # More patients, and no more images than a site searches: this chance is at most the other.
        seldom = max(CHANCE, near.smallest_alpha([record.patient for record in records]))
        limits.append(_limits(_looks(records, extractor, store), looks, seldom))
    return PublicScale(
        extractor=extractor.weights,
        bandwidth=float(torch.cdist(one.double(), other.double()).median()),
        near_features=min(by_features for by_features, _ in limits),
        near_pixels=min(by_pixels for _, by_pixels in limits),
        alpha=min(1.0, 2 * chance * more),
        targets=len(other),
    )


class Looks(NamedTuple):
    """Features, thumbnails and patients of images, row by row."""

    features: Tensor
    small: Tensor
    patients: list[str]


def _looks(records: list[Record], extractor: Extractor, store: FeatureStore) -> Looks:
    small = near.thumbnails(store.pixels(records))
    return Looks(store.of_records(extractor, records), small, [record.patient for record in records])


def _limits(queries: Looks, targets: Looks, chance: float) -> tuple[float, float]:
    """Distances by features and by pixels below which a query falls with at most this chance."""
    by_features = near.nearest_by_features(queries.features, targets.features).distances
    by_pixels = near.nearest_by_pixels(queries.small, targets.small).distances
    return (
        near.threshold(by_features, queries.patients, chance),
        near.threshold(by_pixels, queries.patients, chance),
    )
