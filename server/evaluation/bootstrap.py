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
    predicted: Sequence[str], given: Sequence[str], rows: Sequence[int], bootstrap: Bootstrap
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
    classes = []
    for label in sorted(set(given)):
        of_class = [i for i, value in enumerate(given) if value == label]
        hits = [predicted[i] == label for i in of_class]
        classes.append(group_counts([rows[i] for i in of_class], hits, bootstrap))
    return share_draws(classes, bootstrap.weights).mean(dim=0)


def group_counts(rows: Sequence[int], hits: Sequence[float], bootstrap: Bootstrap) -> Tensor:
    """Count images, and add up what counts as a hit, by group.

    Args:
        rows: Rows of the bootstrap's set.
        hits: For each of them 1 (or True) for a hit, 0 for a miss.
        bootstrap: Gives the groups.

    Returns:
        Images and hits, [2, groups], float64.
    """
    ids, count = bootstrap.ids[list(rows)], bootstrap.weights.shape[1]
    weights = torch.tensor(hits, dtype=torch.float64)
    return torch.stack([torch.bincount(ids, w, minlength=count) for w in (torch.ones_like(weights), weights)])


def paired_draws(
    better: Sequence[str],
    base: Sequence[str],
    given: Sequence[str],
    rows: Sequence[int],
    bootstrap: Bootstrap,
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
    differences = []
    for label in sorted(set(given)):
        of_class = [i for i, value in enumerate(given) if value == label]
        wins = [float(better[i] == label) - float(base[i] == label) for i in of_class]
        images, won = group_counts([rows[i] for i in of_class], wins, bootstrap)
        up, down = _pseudo_group(images, generator)
        differences.append((bootstrap.weights @ won + up - down) / (bootstrap.weights @ images + up + down))
    return torch.stack(differences).mean(dim=0)


def share_draws(classes: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Draw the share of hits of each class from what each group has of it.

    One pseudo-group a class, on average half right and half wrong (Jeffreys), as large as the mean
    group: without it the interval has no width where all images, or the only prompt, are right. Its
    draws are the same on every call, so that differences between two calls are paired.

    Args:
        classes: For each class, images and hits of each group, [2, groups].
        weights: As in `Bootstrap`.

    Returns:
        Shares, [classes, RESAMPLES], float64.
    """
    generator = torch.Generator().manual_seed(1)
    shares = []
    for images, hits in classes:
        right, wrong = _pseudo_group(images, generator)
        shares.append((weights @ hits + right) / (weights @ images + right + wrong))
    return torch.stack(shares)


def _pseudo_group(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the two halves of a pseudo-group as large as the mean group that has images of a class."""
    size = images.sum() / (images > 0).sum()
    # Half a squared normal is Gamma(1/2): half of the pseudo-group's weight.
    halves = 0.5 * torch.randn(2, RESAMPLES, generator=generator, dtype=torch.float64).square() * size
    return halves[0], halves[1]
