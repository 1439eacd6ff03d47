"""How well a probe's answers fit what was wanted or known, with an interval over patients or prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.bootstrap import Bootstrap, balanced_accuracy_draws, paired_draws
from polyclinic.server.evaluation.estimate import Estimate

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
    """A share of right answers, or a difference of two.

    Attributes:
        rows: Rows that were asked.
        value: The share.
        draws: Its bootstrap draws, [RESAMPLES].
    """

    rows: list[int]
    value: float
    draws: Tensor


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
    predicted: Sequence[str], known: Labelled, concept: str, rows: list[int], bootstrap: Bootstrap
) -> Answer:
    """Balanced accuracy of predictions for these rows."""
    given = [known.labels[row][concept] for row in rows]
    draws = balanced_accuracy_draws(predicted, given, rows, bootstrap)
    return Answer(rows, balanced_accuracy(predicted, given), draws)


def ask_both(
    better: Sequence[str],
    base: Sequence[str],
    known: Labelled,
    concept: str,
    rows: list[int],
    bootstrap: Bootstrap,
) -> Answer:
    """Balanced accuracy of some predictions less that of others for the same rows, paired."""
    given = [known.labels[row][concept] for row in rows]
    value = balanced_accuracy(better, given) - balanced_accuracy(base, given)
    return Answer(rows, value, paired_draws(better, base, given, rows, bootstrap))


def estimate(answers: Sequence[Answer], bootstrap: Bootstrap) -> Estimate:
    """Mean over answers (one a concept) with the 2.5 % and 97.5 % quantiles of the mean's draws."""
    value = sum(answer.value for answer in answers) / len(answers)
    rows = {row for answer in answers for row in answer.rows}
    draws = torch.stack([answer.draws for answer in answers]).mean(dim=0)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(
        value=value,
        # The pseudo-group pulls towards one half; an interval without its own estimate misleads.
        low=min(low, value),
        high=max(high, value),
        interval=INTERVAL.format(unit=bootstrap.unit),
        n=len(rows),
        groups=len({bootstrap.groups[row] for row in rows}),
        floor=None,
        ratio=None,
    )


def check_sets(**sides: Labelled) -> None:
    """Refuse sets that do not fit together, features that are not finite, and shared patients.

    Args:
        sides: Name to set; `probe` and `holdout` must share no patient.

    Raises:
        BadInput: Names the side and what is wrong with it.
    """
    width = next(iter(sides.values())).features.shape[-1]
    for side, known in sides.items():
        shape, lengths = known.features.shape, [len(known.labels), len(known.groups)]
        if len(shape) != 2 or shape[1] != width or lengths != [shape[0], shape[0]]:
            raise BadInput(
                f"the {side} features have shape {tuple(shape)}, their labels and groups lengths {lengths}, "
                f"and the width must be {width}; give one row an image, from the same extractor on every side"
            )
        broken = int((~torch.isfinite(known.features)).any(dim=1).sum())
        if broken:
            raise BadInput(
                f"{broken} of {len(known.features)} {side} images have features that are not finite; "
                "look at these images before measuring"
            )
    shared = set(sides["holdout"].groups) & set(sides["probe"].groups)
    if shared:
        raise BadInput(
            f"{len(shared)} patients, such as {min(shared)}, are both in the probe part and in the "
            "holdout; split the reference by patient"
        )
