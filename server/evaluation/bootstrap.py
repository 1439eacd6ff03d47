"""Bayesian bootstrap of balanced accuracies over groups (patients or prompts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Bootstrap:
    """Random weights of groups, drawn once so that all concepts are resampled together.

    Attributes:
        groups: Group of each row of a set.
        ids: Number of each row's group, [n].
        weights: Exponential weight of each group in each draw, [RESAMPLES, groups].
        unit: What the groups are, for the report.
    """

    groups: Sequence[str]
    ids: Tensor
    weights: Tensor
    unit: str


def draw_weights(groups: Sequence[str], unit: str) -> Bootstrap:
    """Draw exponential weights (Rubin's Bayesian bootstrap) for each group.

    Args:
        groups: Group of each row of a set.
        unit: What the groups are, for the report.
    """
    names = {name: i for i, name in enumerate(sorted(set(groups)))}
    uniform = torch.rand(
        RESAMPLES, len(names), dtype=torch.float64, generator=torch.Generator().manual_seed(len(names))
    )
    weights = -uniform.clamp_min(1e-300).log()
    return Bootstrap(groups, torch.tensor([names[group] for group in groups]), weights, unit)


def balanced_accuracy_draws(
    predicted: list[str], given: list[str], rows: list[int], bootstrap: Bootstrap
) -> Tensor:
    """Draw balanced accuracies with random weights of groups, each class normalised on its own.

    Args:
        predicted: Predicted label of each of the rows.
        given: True or wanted label of each of them.
        rows: Which rows of the bootstrap's set they are.
        bootstrap: Weights of that set's groups.

    Returns:
        Balanced accuracies, [RESAMPLES], float64.
    """
    ids, count = bootstrap.ids[rows], bootstrap.weights.shape[1]
    classes = []
    for label in sorted(set(given)):
        of_class = torch.tensor([value == label for value in given])
        hit = torch.tensor([p == label for p in predicted]) & of_class
        classes.append([torch.bincount(ids[part], minlength=count).double() for part in (of_class, hit)])
    return draws_from_counts(classes, bootstrap.weights)


def paired_draws(
    better: list[str], base: list[str], given: list[str], rows: list[int], bootstrap: Bootstrap
) -> Tensor:
    """Draw differences of two balanced accuracies on the same images.

    The pseudo-group of each class is half won and half lost by each side (Jeffreys): where both sides
    gave the same answers, all that is known is that they seldom differ.

    Args:
        better: Predicted label of each of the rows.
        base: The other side's.
        given: True label of each of them.
        rows: Which rows of the bootstrap's set they are.
        bootstrap: Weights of that set's groups.

    Returns:
        Accuracy of `better` less accuracy of `base`, [RESAMPLES], float64.
    """
    generator = torch.Generator().manual_seed(2)
    ids, count = bootstrap.ids[rows], bootstrap.weights.shape[1]
    wins = torch.tensor([(a == g) - (b == g) for a, b, g in zip(better, base, given, strict=True)])
    differences = []
    for label in sorted(set(given)):
        of_class = torch.tensor([value == label for value in given])
        images = torch.bincount(ids[of_class], minlength=count).double()
        won = torch.bincount(ids[of_class], weights=wins[of_class].double(), minlength=count)
        up, down = _pseudo_group(images, generator)
        differences.append((bootstrap.weights @ won + up - down) / (bootstrap.weights @ images + up + down))
    return torch.stack(differences).mean(dim=0)


def draws_from_counts(classes: Sequence[Sequence[Tensor]], weights: Tensor) -> Tensor:
    """Draw balanced accuracies from what each group has of each class.

    One pseudo-group a class, on average half right and half wrong (Jeffreys), as large as the mean
    group: without it the interval has no width where all images, or the only prompt, are right. Its
    draws are the same on every call, so that differences between two calls are paired.

    Args:
        classes: For each class, images and hits of each group, [groups] each.
        weights: As in `Bootstrap`.

    Returns:
        Balanced accuracies, [RESAMPLES], float64.
    """
    generator = torch.Generator().manual_seed(1)
    recalls = []
    for images, hits in classes:
        right, wrong = _pseudo_group(images, generator)
        recalls.append((weights @ hits + right) / (weights @ images + right + wrong))
    return torch.stack(recalls).mean(dim=0)


def _pseudo_group(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the two halves of a pseudo-group as large as the mean group that has images of a class."""
    size = images.sum() / (images > 0).sum()
    # Half a squared normal is Gamma(1/2): half of the pseudo-group's weight.
    halves = 0.5 * torch.randn(2, RESAMPLES, generator=generator, dtype=torch.float64).square() * size
    return halves[0], halves[1]
