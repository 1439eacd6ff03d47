"""Does a synthetic image show what its prompt asked for? A linear probe answers.

The probe is trained on the reference's probe part, whose labels are known, and then reads the
synthetic images. Its accuracy on real patients it never saw is the ceiling. CLIP-type scores are
not used: they handle "no polyp" badly (facts/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.data.holdout import position
from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.bootstrap import Bootstrap, balanced_accuracy_draws, draw_weights
from polyclinic.server.evaluation.estimate import Estimate

L2_GRID = (10.0, 1.0, 0.1, 0.01)
FOLDS = 3
FOLD_KEY = "polyclinic-probe-folds"
# Raise it whenever a number would change for the same images.
PROTOCOL = "polyclinic-faithfulness-1"
INTERVAL = "95 % Bayesian bootstrap over {unit}, class by class"
OVERALL = "overall"

Labels = dict[str, str]


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe.

    Attributes:
        classes: Label of each output, sorted.
        mean: Feature means of the training images, [d], float64.
        scale: Feature standard deviations, [d]; 1 where a feature never varies.
        weight: Weights on standardised features, [d, classes].
        bias: [classes].
        l2: Strength of the L2 penalty that cross-validation chose.
    """

    classes: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    l2: float

    def logits(self, features: Tensor) -> Tensor:
        """Scores of each class; features [n, d] to [n, classes], float64."""
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias

    def predict(self, features: Tensor) -> list[str]:
        """Most likely label of each row of features [n, d]."""
        return [self.classes[i] for i in self.logits(features).argmax(dim=1).tolist()]


class ConceptFaithfulness(BaseModel):
    """How often images show one concept as their prompt asked; or the mean over concepts.

    Attributes:
        concept: Name of the label, or "overall".
        counts: Synthetic images for each value that a prompt asked for (empty for "overall").
        accuracy: Balanced accuracy of the probe on synthetic images against their prompts;
            `groups` counts prompts.
        real: Balanced accuracy of the same probe on real patients it never saw, over the same
            values: the ceiling. None where the holdout lacks one of the values.
        chance: What a constant answer scores, 1 / number of values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str
    counts: dict[str, int]
    accuracy: Estimate
    real: Estimate | None
    chance: float


class Faithfulness(BaseModel):
    """Faithfulness to the prompt, one row a concept.

    Attributes:
        rows: One row a concept that could be measured, in the order asked for.
        overall: Mean over the rows; its interval resamples prompts for all concepts jointly.
        protocol: Version of this measurement.
        warnings: Sentences to print beside the numbers, among them concepts left out and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: list[ConceptFaithfulness]
    overall: ConceptFaithfulness
    protocol: str
    warnings: list[str]


def measure_faithfulness(
    synthetic_features: Tensor,
    wanted: Sequence[Labels],
    prompt_groups: Sequence[str],
    probe_features: Tensor,
    probe_labels: Sequence[Labels],
    probe_patients: Sequence[str],
    holdout_features: Tensor,
    holdout_labels: Sequence[Labels],
    concepts: Sequence[str],
    holdout_patients: Sequence[str] | None = None,
) -> Faithfulness:
    """Train one probe a concept on real images and ask it what the synthetic images show.

    A prompt or record that says nothing about a concept is left out of that concept. Intervals
    speak of the drawn images and prompts; the probe itself is taken as given.

    Args:
        synthetic_features: Features of the synthetic images, [n, d].
        wanted: For each synthetic image, concept to the value its prompt asks for.
        prompt_groups: Prompt of each synthetic image.
        probe_features: Features of the reference's probe part, [m, d].
        probe_labels: For each of its images, concept to value.
        probe_patients: Patient of each of its images.
        holdout_features: Features of real images of patients the probe never sees, [k, d].
        holdout_labels: For each of them, concept to value.
        concepts: Concepts to measure, in the order of the rows.
        holdout_patients: Patient of each held-out image. Where left out, the ceiling has no interval.

    Raises:
        BadInput: Sets that do not fit together, features that are not finite, patients on both
            sides of the ceiling, a wanted value the probe part never shows, or nothing to measure.
    """
    _check("synthetic", synthetic_features, [wanted, prompt_groups], synthetic_features.shape[-1])
    _check("probe", probe_features, [probe_labels, probe_patients], synthetic_features.shape[-1])
    _check("holdout", holdout_features, [holdout_labels], synthetic_features.shape[-1])
    if holdout_patients is not None:
        _check("holdout", holdout_features, [holdout_patients], synthetic_features.shape[-1])
        shared = set(holdout_patients) & set(probe_patients)
        if shared:
            raise BadInput(
                f"{len(shared)} patients, such as {min(shared)}, are both in the probe part and in the "
                "holdout; split the reference by patient"
            )
    prompts = draw_weights(prompt_groups, "prompts")
    patients = None if holdout_patients is None else draw_weights(holdout_patients, "held-out patients")

    rows, answers, ceilings, warnings = [], [], [], []
    for concept in concepts:
        asked = [i for i, labels in enumerate(wanted) if concept in labels]
        known = [i for i, labels in enumerate(probe_labels) if concept in labels]
        values = sorted({wanted[i][concept] for i in asked})
        if len(values) < 2:
            warnings.append(f"{concept}: left out; prompts ask for {len(values)} of its values, not for two.")
            continue
        unknown = set(values) - {probe_labels[i][concept] for i in known}
        if unknown:
            raise BadInput(
                f"prompts ask for {concept} = {min(unknown)}, which no image of the probe part shows; "
                "correct the prompt's label or label the reference"
            )
        probe = train_probe(
            probe_features[known],
            [probe_labels[i][concept] for i in known],
            [probe_patients[i] for i in known],
        )
        answers.append(_ask(probe, synthetic_features, wanted, concept, asked, prompts))
        seen = [i for i, labels in enumerate(holdout_labels) if labels.get(concept) in values]
        ceiling = None
        if {holdout_labels[i][concept] for i in seen} == set(values):
            ceiling = _ask(probe, holdout_features, holdout_labels, concept, seen, patients)
            ceilings.append(ceiling)
        else:
            warnings.append(f"{concept}: no ceiling; the held-out real images do not show all its values.")
        counts = {value: sum(wanted[i][concept] == value for i in asked) for value in values}
        rows.append(
            ConceptFaithfulness(
                concept=concept,
                counts=counts,
                accuracy=_estimate(answers[-1:], prompts),
                real=None if ceiling is None else _estimate([ceiling], patients),
                chance=1 / len(values),
            )
        )
    if not rows:
        raise BadInput("no concept can be measured: " + (" ".join(warnings) or "name at least one"))
    overall = ConceptFaithfulness(
        concept=OVERALL,
        counts={},
        accuracy=_estimate(answers, prompts),
        # A ceiling over fewer concepts than the accuracy would not be its ceiling.
        real=_estimate(ceilings, patients) if len(ceilings) == len(rows) else None,
        chance=sum(row.chance for row in rows) / len(rows),
    )
    return Faithfulness(rows=rows, overall=overall, protocol=PROTOCOL, warnings=warnings)


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


def train_probe(features: Tensor, labels: Sequence[str], patients: Sequence[str] | None = None) -> Probe:
    """Fit a class-balanced logistic regression; the L2 strength comes from 3-fold cross-validation.

    Folds are patient-disjoint and stratified by the patient's first label. The strength with the
    lowest class-balanced log loss on the held-out folds wins.

    Args:
        features: Features of the training images, [n, d].
        labels: Label of each image; two or more different ones.
        patients: Patient of each image; each image its own patient where left out.

    Raises:
        ValueError: Lengths differ, or all labels are the same.
    """
    patients = [str(row) for row in range(len(labels))] if patients is None else patients
    if not len(features) == len(labels) == len(patients):
        raise ValueError(f"{len(features)} rows, {len(labels)} labels, {len(patients)} patients")
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise ValueError(f"a probe needs two or more different labels, got {classes}")
    x = features.double()
    y = torch.tensor([classes.index(label) for label in labels], device=x.device)
    folds = _folds(labels, patients).to(x.device)

    losses = [0.0] * len(L2_GRID)
    for fold in range(FOLDS):
        held_out, kept = folds == fold, folds != fold
        if len(y[kept].unique()) < len(classes) or not bool(held_out.any()):
            continue  # A rare label sits in one fold only: nothing to learn it from.
        for step, probe in enumerate(_path(x[kept], y[kept], classes, L2_GRID)):
            losses[step] += float(_balanced_loss(probe.logits(x[held_out]), y[held_out], len(classes)))
    # Ties (also: no usable fold) go to the strongest penalty, which stands first.
    best = losses.index(min(losses))
    return _path(x, y, classes, L2_GRID[: best + 1])[-1]


def _folds(labels: Sequence[str], patients: Sequence[str]) -> Tensor:
    """Deal patients into folds in hash order, label by label; fold of each row, [n]."""
    first_label: dict[str, str] = {}
    for patient, label in zip(patients, labels, strict=True):
        first_label.setdefault(patient, label)
    ordered = sorted(first_label, key=lambda p: (first_label[p], position(p, FOLD_KEY), p))
    fold_of = {patient: rank % FOLDS for rank, patient in enumerate(ordered)}
    return torch.tensor([fold_of[patient] for patient in patients])


def _balanced_loss(logits: Tensor, y: Tensor, classes: int) -> Tensor:
    """Cross-entropy in which every class that occurs weighs the same."""
    counts = torch.bincount(y, minlength=classes).clamp_min(1).double()
    return F.cross_entropy(logits, y, weight=1.0 / counts)


def _path(x: Tensor, y: Tensor, classes: tuple[str, ...], strengths: Sequence[float]) -> list[Probe]:
    """Fit one probe a penalty strength, each started from the one before (strongest first)."""
    mean, scale = x.mean(dim=0), x.std(dim=0)
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
    standard = (x - mean) / scale
    parameters = torch.zeros(x.shape[1] + 1, len(classes), dtype=torch.float64, device=x.device)
    probes = []
    for l2 in strengths:
        parameters = _fit(standard, y, len(classes), l2, parameters)
        probes.append(Probe(classes, mean, scale, parameters[:-1], parameters[-1], l2))
    return probes


def _fit(standard: Tensor, y: Tensor, classes: int, l2: float, start: Tensor) -> Tensor:
    """Minimise the balanced loss plus l2/2 |weights|^2; weights and bias as [d + 1, classes]."""
    parameters = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=200,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = standard @ parameters[:-1] + parameters[-1]
        loss = _balanced_loss(logits, y, classes) + 0.5 * l2 * parameters[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return parameters.detach()


@dataclass(frozen=True)
class _Answer:
    """How well the probe's answers fit, for the rows that have a value of one concept.

    Attributes:
        rows: These rows.
        value: Balanced accuracy.
        draws: Its bootstrap draws, [RESAMPLES]; None where the groups are not known.
    """

    rows: list[int]
    value: float
    draws: Tensor | None


def _ask(
    probe: Probe,
    features: Tensor,
    labels: Sequence[Labels],
    concept: str,
    rows: list[int],
    bootstrap: Bootstrap | None,
) -> _Answer:
    """Compare the probe's answers on these rows with their labels."""
    given, predicted = [labels[row][concept] for row in rows], probe.predict(features[rows])
    draws = None if bootstrap is None else balanced_accuracy_draws(predicted, given, rows, bootstrap)
    return _Answer(rows, balanced_accuracy(predicted, given), draws)


def _estimate(answers: Sequence[_Answer], bootstrap: Bootstrap | None) -> Estimate:
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


def _check(side: str, features: Tensor, columns: Sequence[Sequence[object]], width: int) -> None:
    """Refuse features that do not fit their labels and groups, or are not finite."""
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
