"""Is each synthetic image like some real one, and each real one like some synthetic one?

Improved precision and recall (Kynkaanniemi et al. 2019, 1904.06991) and density and coverage (Naeem et
al. 2020, 2002.09797), all from the same three matrices of distances between features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyclinic.server.evaluation.jackknife import Jackknifed, block_jackknife, score_interval

NEIGHBOURS = 3  # of precision and recall
DENSITY_NEIGHBOURS = 5  # of density and coverage
NAMES = ("precision", "recall", "density", "coverage")


def neighbour_metrics(
    x: Tensor, y: Tensor, x_groups: Sequence[str], y_groups: Sequence[str]
) -> dict[str, Jackknifed]:
    """Precision, recall, density and coverage with sampling intervals at this n.

    Memory: three matrices of n x n float64.

    Args:
        x: Features of the synthetic images, [n, d], n > 5.
        y: Features of the real images, [m, d], m > 5.
        x_groups: Prompt of each synthetic image.
        y_groups: Patient of each real image.

    Returns:
        By name: the share of synthetic images inside the real manifold; the share of real images inside
        the synthetic one; how many real balls hold a synthetic image, over its expectation, which is 1;
        the share of real balls that hold one.

    Raises:
        ValueError: A side has fewer than three groups.
    """
    x, y = x.double(), y.double()
    among_x, among_y, across = squared_distances(x, x), squared_distances(y, y), squared_distances(x, y)
    # An image is not its own neighbour.
    among_x.fill_diagonal_(torch.inf)
    among_y.fill_diagonal_(torch.inf)

    def statistic(keep_x: Tensor, keep_y: Tensor) -> Tensor:
        return _four(among_x[keep_x][:, keep_x], among_y[keep_y][:, keep_y], across[keep_x][:, keep_y])

    rows, groups = min(len(x), len(y)), min(len(set(x_groups)), len(set(y_groups)))
    return {
        name: score_interval(found, rows, groups, share=name != "density")
        for name, found in zip(NAMES, block_jackknife(statistic, x_groups, y_groups), strict=True)
    }


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances between rows; [n, d] and [m, d] to [n, m]."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None, :]
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)


def _four(among_x: Tensor, among_y: Tensor, across: Tensor) -> Tensor:
    """The four numbers from squared distances; a set's own matrix has infinity on its diagonal."""
    x_radius = _radii(among_x)[NEIGHBOURS - 1]
    y_radii = _radii(among_y)
    inside_y = across <= y_radii[NEIGHBOURS - 1][None, :]
    in_ball = across <= y_radii[DENSITY_NEIGHBOURS - 1][None, :]
    return torch.stack(
        [
            inside_y.any(dim=1).double().mean(),
            (across <= x_radius[:, None]).any(dim=0).double().mean(),
            in_ball.sum(dim=1).double().mean() / DENSITY_NEIGHBOURS,
            in_ball.any(dim=0).double().mean(),
        ]
    )


def _radii(among: Tensor) -> Tensor:
    """Squared distance of each image to its nearest others, nearest first; [5, n]."""
    return among.topk(DENSITY_NEIGHBOURS, dim=0, largest=False).values
