"""Fidelity as it is reported: no number without its interval, its floor and its sample size."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from polyclinic.common.features import efficientnet
from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.diversity import vendi_score
from polyclinic.server.evaluation.fidelity import grouped_cmmd, grouped_frechet, grouped_kid
from polyclinic.server.evaluation.jackknife import Jackknifed
from polyclinic.server.evaluation.neighbours import NAMES as NEIGHBOUR_METRICS
from polyclinic.server.evaluation.neighbours import neighbour_metrics
from polyclinic.server.evaluation.split import equal_n, floor

# Raise it whenever a number would change for the same images.
PROTOCOL = "polyclinic-fidelity-3"
FEWEST_IMAGES = 50
FEWEST_GROUPS = 3
ADVISED_IMAGES = 500
ADVISED_PATIENTS = 50
# A feature that varies less than this over the reference is divided by this: where all real images are grey,
# the rounding of a colour must not become a distance.
LEAST_SPREAD = 0.02

KID_INTERVAL = "95 %, delete-one-group jackknife over patients and prompts, t quantile"
SAMPLING_INTERVAL = (
    "95 % sampling interval at this n (bias included), block jackknife over patients and prompts"
)
SCORE_INTERVAL = (
    "95 % sampling interval at this n (bias included), score interval at the effective size that a block "
    "jackknife over patients and prompts gives"
)
# It looks at the drawn images alone.
VENDI_INTERVAL = "95 % sampling interval at this n (bias included), block jackknife over prompts"
INTERVALS = {
    "cmmd": KID_INTERVAL,
    "vendi": VENDI_INTERVAL,
    **dict.fromkeys(NEIGHBOUR_METRICS, SCORE_INTERVAL),
}
REAL_SCORES = "the floor is what real images of as many other patients score"


class Estimate(BaseModel):
    """One measured number.

    Attributes:
        value: The estimate.
        low: Lower end of the interval, or None where there is none.
        high: Upper end of the interval.
        interval: What the interval is.
        n: Images on each side.
        groups: Independent groups behind it: patients of the reference, or prompts.
        resampled: Of a fidelity: what its interval resamples ("patients", "prompts") and how many of each;
            empty where an earlier release measured.
        floor: The same metric between two patient-disjoint halves of the reference at equal n: what a
            perfect generator scores.
        floor_low: Lower end of the floor's own interval; None where an earlier release wrote it.
        floor_high: Upper end of that.
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
    floor_low: float | None = None
    floor_high: float | None = None
    note: str = ""
    resampled: dict[str, int] = {}


class Fidelity(BaseModel):
    """How close the synthetic images are to the reference.

    Attributes:
        extractor: Name of the feature extractor.
        preprocessing: What happens to an image before it.
        weights: SHA-256 of the extractor's weights; empty where it has none.
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
    weights: str = ""
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
    preprocessing: str = efficientnet.PREPROCESSING,
    weights: str = "",
    standardise: bool = False,
) -> Fidelity:
    """Measure everything that features alone can tell, with intervals, and floors at equal n.

    Args:
        features_synthetic: Features of the synthetic images, [n, d].
        prompt_groups: Prompt of each synthetic image.
        features_reference: Features of the reference's evaluate part, [m, d].
        patient_groups: Patient of each reference image.
        key: Name of the split of the reference in two halves, for the keyed hash; the same in every
            round and for every model that will be compared.
        extractor: Name of the extractor that made the features.
        preprocessing: What happened to an image before it.
        weights: SHA-256 of its weights.
        standardise: Z-score features by the reference first.

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
    synthetic, reference = features_synthetic.double(), features_reference.double()
    if standardise:
        synthetic, reference = (z_scores(features, reference) for features in (synthetic, reference))
    chosen = equal_n(prompt_groups, patient_groups, key, minimum=FEWEST_IMAGES)
    n = len(chosen.reference)
    x_groups = [prompt_groups[i] for i in chosen.synthetic]
    y_groups = [patient_groups[i] for i in chosen.reference]
    found = all_metrics(synthetic[chosen.synthetic], reference[chosen.reference], x_groups, y_groups)
    floors: dict[str, Jackknifed] = {}
    if chosen.has_floor:
        floors = floor(reference, patient_groups, key, n, all_metrics)

    patients, prompts = len(set(y_groups)), {"prompts": len(set(x_groups))}
    both = {"patients": patients} | prompts
    estimate = functools.partial(with_floor, n=n, resampled=both)
    return Fidelity(
        extractor=extractor,
        preprocessing=preprocessing,
        weights=weights,
        protocol=PROTOCOL,
        kid=estimate(found.pop("kid"), floors.get("kid"), KID_INTERVAL),
        frechet=estimate(found.pop("frechet"), floors.get("frechet"), SAMPLING_INTERVAL),
        others={
            name: estimate(
                value,
                floors.get(name),
                INTERVALS.get(name, SAMPLING_INTERVAL),
                resampled=prompts if name == "vendi" else both,
                note="" if name == "cmmd" else REAL_SCORES,
            )
            for name, value in found.items()
        },
        warnings=_warnings(n, patients, chosen.has_floor),
    )


def all_metrics(
    x: Tensor, y: Tensor, x_groups: Sequence[str], y_groups: Sequence[str]
) -> dict[str, Jackknifed]:
    """Every metric on features: kid, frechet, cmmd, precision, recall, density, coverage, vendi.

    Args:
        x: Features of the synthetic images, [n, d].
        y: Features of the real images, [m, d].
        x_groups: Prompt of each synthetic image.
        y_groups: Patient of each real image.
    """
    return {
        "kid": grouped_kid(x, y, x_groups, y_groups),
        "frechet": grouped_frechet(x, y, x_groups, y_groups),
        "cmmd": grouped_cmmd(x, y, x_groups, y_groups),
        **neighbour_metrics(x, y, x_groups, y_groups),
        "vendi": vendi_score(x, x_groups),
    }


def z_scores(features: Tensor, reference: Tensor) -> Tensor:
    """Features [n, d] in standard deviations from the mean of the reference [m, d]."""
    return (features - reference.mean(dim=0)) / reference.std(dim=0).clamp_min(LEAST_SPREAD)


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


def too_few_images(drawn: int, real: int) -> str:
    """Say why fidelity is not measured; "" where both sides have images enough.

    Args:
        drawn: Images drawn in one evaluation.
        real: Images in the reference's evaluate part.
    """
    sides = ((drawn, "drawn in one evaluation"), (real, "in the reference's evaluate part"))
    few = [f"{n} {where}" for n, where in sides if n < FEWEST_IMAGES]
    said = f"it takes {FEWEST_IMAGES} images a side, and there are {' and '.join(few)}"
    return f"Fidelity was not measured: {said}." if few else ""


def with_floor(
    found: Jackknifed,
    at_floor: Jackknifed | None,
    interval: str,
    n: int,
    resampled: dict[str, int],
    note: str = "",
) -> Estimate:
    """Put a number beside its floor.

    Args:
        found: The number.
        at_floor: The same between halves of the reference; None where it is too small.
        interval: What the interval is.
        n: Images on each side.
        resampled: What the interval resamples, and how many of each; the first counts as its groups.
        note: What a reader must know, where there is a floor.
    """
    ratio = None
    if at_floor is None:
        note = "no floor: the reference is too small to be halved"
    elif at_floor.low <= 0:
        # Dividing by noise around zero gives any number at all.
        note = (
            f"no ratio: the floor's own interval ({at_floor.low:.3g} to {at_floor.high:.3g}) "
            "cannot be told from zero"
        )
    else:
        ratio = found.value / at_floor.value
    return Estimate(
        value=found.value,
        low=found.low,
        high=found.high,
        interval=interval,
        n=n,
        groups=next(iter(resampled.values())),
        resampled=resampled,
        floor=None if at_floor is None else at_floor.value,
        floor_low=None if at_floor is None else at_floor.low,
        floor_high=None if at_floor is None else at_floor.high,
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
