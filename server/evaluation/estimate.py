"""Fidelity as it is reported: no number without its interval, its floor and its sample size."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from polyclinic.common.features import efficientnet
from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.fidelity import Distance, equal_n, floor, grouped_frechet, grouped_kid

# Raise it whenever a number would change for the same images.
PROTOCOL = "polyclinic-fidelity-1"
FEWEST_IMAGES = 50
FEWEST_GROUPS = 3
ADVISED_IMAGES = 500
ADVISED_PATIENTS = 50

KID_INTERVAL = "95 %, delete-one-group jackknife over patients and prompts, t quantile"
FRECHET_INTERVAL = (
    "95 % sampling interval at this n (bias included), block jackknife over patients and prompts"
)


class Estimate(BaseModel):
    """One measured number.

    Attributes:
        value: The estimate.
        low: Lower end of the interval, or None where there is none.
        high: Upper end of the interval.
        interval: What the interval is.
        n: Images on each side.
        groups: Independent groups behind it: patients of the reference, or prompts.
        floor: The same metric between two patient-disjoint halves of the reference at equal n.
        ratio: value / floor; None where the floor cannot be told from zero.
        note: What a reader must know beside the number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float | None
    high: float | None
    interval: str
    n: int
    groups: int
    floor: float | None
    ratio: float | None
    note: str = ""


class Fidelity(BaseModel):
    """How close the synthetic images are to the reference.

    Attributes:
        extractor: Name of the feature extractor.
        preprocessing: What happens to an image before it.
        protocol: Version of this measurement.
        kid: Grouped kernel distance, the headline.
        frechet: Frechet distance on the same features, for comparison with papers.
        others: Further metrics on the same features by name: cmmd, precision, recall, density, coverage,
            vendi, ms_ssim.
        warnings: Sentences to print beside the numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    extractor: str
    preprocessing: str
    protocol: str
    kid: Estimate
    frechet: Estimate
    others: dict[str, Estimate] = {}
    warnings: list[str]


def measure_fidelity(
    features_synthetic: Tensor,
    prompt_groups: Sequence[str],
    features_reference: Tensor,
    patient_groups: Sequence[str],
    key: str,
    *,
    extractor: str = efficientnet.EXTRACTOR_NAME,
    preprocessing: str | None = None,
) -> Fidelity:
    """Measure grouped KID and the Frechet distance with intervals and floors at equal n.

    Args:
        features_synthetic: Features of the synthetic images, [n, d].
        prompt_groups: Prompt of each synthetic image.
        features_reference: Features of the reference's evaluate part, [m, d].
        patient_groups: Patient of each reference image.
        key: Name of the split of the reference in two halves, for the keyed hash; the same in every
            round and for every model that will be compared.
        extractor: Name of the extractor that made the features.
        preprocessing: What happened to an image before it; the default extractor's where left out.

    Raises:
        BadInput: Fewer than 50 images or 3 groups on a side, features that are not finite, or
            features of different widths.
    """
    check_features("synthetic", features_synthetic, prompt_groups, "prompts")
    check_features("reference", features_reference, patient_groups, "patients")
    if features_synthetic.shape[1] != features_reference.shape[1]:
        raise BadInput(
            f"synthetic features have width {features_synthetic.shape[1]}, the reference's "
            f"{features_reference.shape[1]}; use one extractor for both"
        )
    features_reference = features_reference.to(features_synthetic.device)
    chosen = equal_n(prompt_groups, patient_groups, key, minimum=FEWEST_IMAGES)
    n = len(chosen.reference)
    x, x_groups = features_synthetic[chosen.synthetic], [prompt_groups[i] for i in chosen.synthetic]
    y, y_groups = features_reference[chosen.reference], [patient_groups[i] for i in chosen.reference]
    patients = len(set(y_groups))

    between_halves = functools.partial(floor, features_reference, patient_groups, key, n)
    kid_floor = between_halves(grouped_kid) if chosen.has_floor else None
    frechet_floor = between_halves(grouped_frechet) if chosen.has_floor else None
    return Fidelity(
        extractor=extractor,
        preprocessing=efficientnet.PREPROCESSING if preprocessing is None else preprocessing,
        protocol=PROTOCOL,
        kid=_estimate(grouped_kid(x, y, x_groups, y_groups), kid_floor, KID_INTERVAL, n, patients),
        frechet=_estimate(
            grouped_frechet(x, y, x_groups, y_groups), frechet_floor, FRECHET_INTERVAL, n, patients
        ),
        warnings=_warnings(n, patients, chosen.has_floor),
    )


def check_features(side: str, features: Tensor, groups: Sequence[str], kind: str) -> None:
    """Refuse features that no metric can use.

    Args:
        side: What they are features of, for the message.
        features: Features, [n, d].
        groups: Group of each row.
        kind: What the groups are, for the message.

    Raises:
        BadInput: Too few rows or groups, another shape, or values that are not finite.
    """
    if features.ndim != 2 or len(features) != len(groups):
        raise BadInput(
            f"the {side} features have shape {tuple(features.shape)} for {len(groups)} images; "
            "give one row an image and one group a row"
        )
    if len(features) < FEWEST_IMAGES:
        raise BadInput(f"{len(features)} {side} images are too few to measure; give at least {FEWEST_IMAGES}")
    if len(set(groups)) < FEWEST_GROUPS:
        raise BadInput(
            f"the {side} images come from {len(set(groups))} {kind}; "
            f"give at least {FEWEST_GROUPS} different ones"
        )
    broken = int((~torch.isfinite(features)).any(dim=1).sum())
    if broken:
        raise BadInput(
            f"{broken} of {len(features)} {side} images have features that are not finite; "
            "look at these images (black or NaN pixels?) before measuring"
        )


def _estimate(
    distance: Distance, at_floor: Distance | None, interval: str, n: int, patients: int
) -> Estimate:
    """Put a distance beside its floor."""
    ratio, note = None, ""
    if at_floor is None:
        note = "no floor: the reference is too small to be halved"
    elif at_floor.low <= 0:
        # Dividing by noise around zero gives any number at all.
        note = (
            f"no ratio: the floor's own interval ({at_floor.low:.3g} to {at_floor.high:.3g}) "
            "cannot be told from zero"
        )
    else:
        ratio = distance.value / at_floor.value
    return Estimate(
        value=distance.value,
        low=distance.low,
        high=distance.high,
        interval=interval,
        n=n,
        groups=patients,
        floor=None if at_floor is None else at_floor.value,
        ratio=ratio,
        note=note,
    )


def _warnings(n: int, patients: int, has_floor: bool) -> list[str]:
    """Say what makes these numbers weak."""
    warnings = []
    if n < ADVISED_IMAGES:
        warnings.append(f"Measured on {n} images a side; below {ADVISED_IMAGES} the intervals are wide.")
    if patients < ADVISED_PATIENTS:
        warnings.append(
            f"The reference shows {patients} patients; below {ADVISED_PATIENTS} it is a narrow sample."
        )
    if not has_floor:
        warnings.append(
            f"No floor: halving the reference by patient leaves fewer than {FEWEST_IMAGES} images or "
            f"{FEWEST_GROUPS} patients in a half."
        )
    return warnings
