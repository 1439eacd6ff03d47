"""A class-balanced logistic regression on fixed features, its penalty chosen by cross-validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.data.holdout import position
from polyclinic.common.files import canonical_json

L2_GRID = (10.0, 1.0, 0.1, 0.01)
FOLDS = 3
FOLD_KEY = "polyclinic-probe-folds"
REMEMBERED = 64
_trained: dict[str, Probe] = {}  # oldest first


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


def train_probe(features: Tensor, labels: Sequence[str], patients: Sequence[str] | None = None) -> Probe:
    """Fit a class-balanced logistic regression; the L2 strength comes from 3-fold cross-validation.

    Folds are patient-disjoint and stratified by the patient's first label. The strength with the
    lowest class-balanced log loss on the held-out folds wins. The last probes are remembered by content:
    those on real images are asked for again after every judged round.

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
    if len(set(labels)) < 2:
        raise ValueError(f"a probe needs two or more different labels, got {sorted(set(labels))}")
    x = features.double()
    told = canonical_json([list(x.shape), str(x.device), list(labels), list(patients)])
    key = hashlib.sha256(told + x.cpu().numpy().tobytes()).hexdigest()
    if key not in _trained:
        while len(_trained) >= REMEMBERED:
            del _trained[next(iter(_trained))]
        _trained[key] = _train(x, labels, patients)
    return _trained[key]


def _train(x: Tensor, labels: Sequence[str], patients: Sequence[str]) -> Probe:
    classes = tuple(sorted(set(labels)))
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
