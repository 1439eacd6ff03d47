"""What the sites' extra releases measure with, taken from the public reference and the start alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.common.data.holdout import position
from polyclinic.common.data.table import Record
from polyclinic.common.features import near
from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import NearScale, PublicScale, Study
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.reference import Reference

FEWEST_PATIENTS = 12  # public ones, to take a scale from
CHANCE = 0.005  # of a false near copy, per image and distance, where the reference is large enough
# Of a false near copy, per image, at most: every twentieth patient. Beyond, a person would look at more false
# finds than they can take seriously, and the alarm takes copies of a large part of a site (docs/privacy.md).
LARGEST_ALPHA = 0.05
# Nearer than this, two images are one: another JPEG of it comes to 0.03 by pixels, no two of 400 patients'
# chest X-rays to 0.15.
SAME = 0.03
ONE_PATIENT = "give them one patient id, or remove all but one of them"


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
        BadInput: Too few public patients, or one image under two of them.
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
    if asked.leakage_gate:
        _check_chance(study, *halves)
        _check_once(records, store)
    extractor = efficientnet()
    one, other = (store.of_records(extractor, half) for half in halves)
    return PublicScale(
        extractor=extractor.weights,
        bandwidth=float(torch.cdist(one.double(), other.double()).median()),
        near=_near(study, halves, store, extractor, draw) if asked.leakage_gate else None,
    )


class Looks(NamedTuple):
    """Features, thumbnails and names of images, row by row."""

    features: Tensor
    small: Tensor
    patients: list[str]
    names: list[str]


def _near(
    study: Study,
    halves: tuple[list[Record], list[Record]],
    store: FeatureStore,
    extractor: Extractor,
    draw: Callable[[], Tensor] | None,
) -> NearScale:
    chance, more = _chance(study, *halves)
    one, other = (_looks(half, extractor, store) for half in halves)
    limits = [_limits(one, other, chance, ONE_PATIENT)]
    if draw is not None:
        drawn = draw()
        names = [f"what the start draws ({number + 1})" for number in range(len(drawn))]
        looks = Looks(store.of_images(extractor, drawn), near.thumbnails(drawn), [], names)
        everybody = Looks(
            torch.cat([one.features, other.features]),
            torch.cat([one.small, other.small]),
            one.patients + other.patients,
            one.names + other.names,
        )
        # More patients, and no more images than a site searches: this chance is at most the other.
        seldom = max(CHANCE, near.smallest_alpha(everybody.patients))
        fix = "bring a start that has not seen them"
        limits.append(_limits(everybody, looks, seldom, fix))
    return NearScale(
        features=min(by_features for by_features, _ in limits),
        pixels=min(by_pixels for _, by_pixels in limits),
        chance=chance * more,
        patients=len(set(one.patients)),
        more=more,
    )


def _chance(study: Study, one: list[Record], other: list[Record]) -> tuple[float, float]:
    """Chance per image and distance to calibrate for, and how many times as many images a site searches."""
    more = max(1.0, study.evaluation.images / len(other))
    return max(CHANCE / more, near.smallest_alpha([record.patient for record in one])), more


def _check_chance(study: Study, one: list[Record], other: list[Record]) -> None:
    """Refuse a reference so small that what it calls near says little.

    Raises:
        BadInput: With how many patients, or draws, it would do.
    """
    chance, more = _chance(study, one, other)
    alpha = 2 * chance * more
    if alpha <= LARGEST_ALPHA:
        return
    patients, targets = (len({record.patient for record in half}) for half in (one, other))
    images = study.evaluation.images
    enough = patients_needed(images, len(other) / targets)
    fewer = int((patients + 1) * LARGEST_ALPHA / 2 * len(other)) // len(study.evaluation.prompts)
    at_once = f"set evaluation.draws = {fewer}, " if patients + 1 >= 2 / LARGEST_ALPHA and fewer else ""
    raise BadInput(
        f"releases.leakage_gate: {patients + targets} patients in the reference's evaluate part are too few "
        f"for {images} images a gate: chance would find {min(1.0, alpha):.1%} of a site's images near, and "
        f"at most {LARGEST_ALPHA:.0%} is of use; bring about {enough} patients (a larger reference, or a "
        f"larger reference.evaluate), {at_once}or set releases.leakage_gate = false"
    )


def patients_needed(images: int, a_patient: float = 1.0) -> int:
    """Say how many patients an evaluate part needs for a gate, and a few, since a hash halves it.

    Args:
        images: That a site's gate draws.
        a_patient: Public images a patient.
    """
    half = next(n for n in count(1) if 2 * max(1, images / (n * a_patient)) / (n + 1) <= LARGEST_ALPHA)
    return 2 * half + 10


def _looks(records: list[Record], extractor: Extractor, store: FeatureStore) -> Looks:
    return Looks(
        store.of_records(extractor, records),
        near.thumbnails(store.pixels(records)),
        [record.patient for record in records],
        [_name(record) for record in records],
    )


def _name(record: Record) -> str:
    return f"{record.image}{record.part and f' ({record.part})'} of {record.patient}"


def _check_once(records: list[Record], store: FeatureStore) -> None:
    """Refuse an image that is there under two patients, on whichever side a hash put them."""
    seen: dict[bytes, Record] = {}
    twice = []
    for record, small in zip(records, near.thumbnails(store.pixels(records)), strict=True):
        first = seen.setdefault(small.numpy().tobytes(), record)
        if first.patient != record.patient:
            twice.append(f"{_name(first)} and {_name(record)}")
    if twice:
        _refuse(twice, ONE_PATIENT)


def _refuse(pairs: list[str], fix: str) -> None:
    more = f"; and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    raise BadInput(
        f"releases.leakage_gate: one image twice, where near copies are measured by how far apart two "
        f"people are: {'; '.join(pairs[:3])}{more}; {fix}"
    )


def _limits(queries: Looks, targets: Looks, chance: float, fix: str) -> tuple[float, float]:
    """Distances by features and by pixels below which a query falls with at most this chance.

    Raises:
        BadInput: A query is one of the targets: the distance between two people would be 0.
    """
    found = (
        near.nearest_by_features(queries.features, targets.features),
        near.nearest_by_pixels(queries.small, targets.small),
    )
    same = {
        (row, int(nearest.rows[row]))
        for nearest in found
        for row in (nearest.distances < SAME).nonzero()[:, 0].tolist()
    }
    if same:
        _refuse([f"{queries.names[row]} and {targets.names[target]}" for row, target in sorted(same)], fix)
    by_features, by_pixels = (near.threshold(n.distances, queries.patients, chance) for n in found)
    return by_features, by_pixels
