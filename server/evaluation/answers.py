"""How well a probe's answers fit what was wanted or known, with an interval over patients or prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.bootstrap import Bootstrap, balanced_accuracy_draws, paired_draws
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.linear_probe import Probe

INTERVAL = "95 % Bayesian bootstrap over {unit}, class by class"
OVERALL = "overall"

Labels = dict[str, str]


@dataclass(frozen=True)
class Labelled:
    """Images with what is known of them, or what was asked of them.

    Attributes:
        features: [n, d].
        labels: For each image, concept to value.
        groups: Patient, or prompt, of each image.
    """

    features: Tensor
    labels: Sequence[Labels]
    groups: Sequence[str]

    def showing(self, concept: str, values: Sequence[str]) -> list[int]:
        """Rows whose label of this concept is one of these values."""
        return [i for i, labels in enumerate(self.labels) if labels.get(concept) in values]

    def values(self, concept: str) -> set[str]:
        """Values of a concept that occur."""
        return {labels[concept] for labels in self.labels if concept in labels}


@dataclass(frozen=True)
class Answer:
    """A probe's answers for one concept, or the difference of two probes' answers.

    Attributes:
        rows: Rows that were asked.
        value: Balanced accuracy, or its difference.
        draws: Its bootstrap draws, [RESAMPLES]; None where the groups are not known.
    """

    rows: list[int]
    value: float
    draws: Tensor | None


def balanced_accuracy(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean, over the classes that were wanted, of the share of their images predicted right.

    A constant guess scores 1 / classes whatever the class sizes.

    Raises:
        ValueError: The lists differ in length or are empty.
    """
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(
            f"need as many predictions as labels and at least one, got {len(predicted)}, {len(wanted)}"
        )
    recalls = []
    for label in sorted(set(wanted)):
        hits = [p == label for p, w in zip(predicted, wanted, strict=True) if w == label]
        recalls.append(sum(hits) / len(hits))
    return sum(recalls) / len(recalls)


def ask(
    probe: Probe,
    features: Tensor,
    labels: Sequence[Labels],
    concept: str,
    rows: list[int],
    bootstrap: Bootstrap | None,
) -> Answer:
    """Compare the probe's answers on these rows with their labels."""
    given, predicted = [labels[row][concept] for row in rows], probe.predict(features[rows])
    draws = None if bootstrap is None else balanced_accuracy_draws(predicted, given, rows, bootstrap)
    return Answer(rows, balanced_accuracy(predicted, given), draws)


def ask_both(
    better: Probe, base: Probe, known: Labelled, concept: str, rows: list[int], bootstrap: Bootstrap
) -> Answer:
    """Balanced accuracy of one probe less another's on the same rows, paired image by image."""
    given = [known.labels[row][concept] for row in rows]
    answers = [probe.predict(known.features[rows]) for probe in (better, base)]
    value = balanced_accuracy(answers[0], given) - balanced_accuracy(answers[1], given)
    return Answer(rows, value, paired_draws(answers[0], answers[1], given, rows, bootstrap))


def estimate(answers: Sequence[Answer], bootstrap: Bootstrap | None) -> Estimate:
    """Mean over answers (one a concept) with the 2.5 % and 97.5 % quantiles of the mean's draws."""
    value = sum(answer.value for answer in answers) / len(answers)
    rows = {row for answer in answers for row in answer.rows}
    draws = [answer.draws for answer in answers if answer.draws is not None]
    low, high, interval, groups = None, None, "none: the groups of the images are not known", 0
    if bootstrap is not None:
        ends = (
            torch.stack(draws)
            .mean(dim=0)
            .quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
            .tolist()
        )
        # The pseudo-group pulls towards one half; an interval without its own estimate misleads.
        low, high = min(ends[0], value), max(ends[1], value)
        interval = INTERVAL.format(unit=bootstrap.unit)
        groups = len({bootstrap.groups[row] for row in rows})
    return Estimate(
        value=value, low=low, high=high, interval=interval, n=len(rows), groups=groups, floor=None, ratio=None
    )


def check_rows(side: str, features: Tensor, columns: Sequence[Sequence[object]], width: int) -> None:
    """Refuse features that do not fit their labels and groups, or are not finite.

    Raises:
        BadInput: Names the side and what is wrong with it.
    """
    if features.ndim != 2 or features.shape[1] != width or any(len(c) != len(features) for c in columns):
        raise BadInput(
            f"the {side} features have shape {tuple(features.shape)}, their labels and groups lengths "
            f"{[len(column) for column in columns]}, and the width must be {width}; "
            "give one row an image, from the same extractor on every side"
        )
    broken = int((~torch.isfinite(features)).any(dim=1).sum())
    if broken:
        raise BadInput(
            f"{broken} of {len(features)} {side} images have features that are not finite; "
            "look at these images before measuring"
        )


def check_disjoint(probe_patients: Sequence[str], holdout_patients: Sequence[str]) -> None:
    """Refuse patients on whom a probe would be trained and tested.

    Raises:
        BadInput: Some are on both sides.
    """
    shared = set(holdout_patients) & set(probe_patients)
    if shared:
        raise BadInput(
            f"{len(shared)} patients, such as {min(shared)}, are both in the probe part and in the "
            "holdout; split the reference by patient"
        )
