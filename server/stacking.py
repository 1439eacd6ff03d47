"""Adapters averaged as what they are, products: stacked exactly, then cut back to the study's rank.

The mean of products is no product of means: `mean(B_i A_i) != mean(B_i) mean(A_i)`. Stacking what each site
*ends* with (its start plus its difference, not its difference alone, which would leave out the cross terms
B dA and dB A) gives the mean exactly, at a rank of sites x r:

    mean_i w_i B_i A_i = [w_1 B_1 | w_2 B_2 | ...] [A_1; A_2; ...]

(FLoRA, Wang et al. 2024, 2409.05976). A truncated SVD then gives the closest factors of rank r (Eckart &
Young 1936), and says what that lost. The matrix itself is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.common.adapters import A, B, layers, rank_of
from polyclinic.common.generators.base import Tensors
from polyclinic.common.progress import say
from polyclinic.common.settings import FederationSettings
from polyclinic.server.aggregation import advance
from polyclinic.server.server_optimizer import Moments
from polyclinic.server.spool import Spooled


class Loss(NamedTuple):
    """What cutting back to the study's rank cost, over all layers together.

    Attributes:
        of_product: Length of what was lost by the length of the exact mean.
        of_update: By the length of what the round changed.
    """

    of_product: float
    of_update: float


def stack(
    state: Tensors,
    average: Tensors,
    replies: Mapping[str, Spooled],
    weights: Mapping[str, float],
    settings: FederationSettings,
) -> Loss:
    """Move the state by the exact mean of the sites' products, in place; the average is set to it.

    The factors have another basis afterwards: nothing that is remembered by coordinate (a server
    optimizer's moments, an average over rounds, what 8-bit rounding lost) means anything any more.

    Args:
        state: Factors of the round, and perhaps other tensors, which are averaged as ever.
        average: Set to the new state.
        replies: Site to its difference, of the state's own rank.
        weights: Public weight of each site.
        settings: Server learning rate.
    """
    sites, rate = sorted(replies), settings.server_learning_rate
    total = sum(weights[site] for site in sites)
    shares = [rate * weights[site] / total for site in sites]
    lost = whole = moved = 0.0
    factors = set()
    for layer in layers(state):
        names = layer + A, layer + B
        factors |= set(names)
        a, b = (state[name].double() for name in names)
        ends = [
            [x + replies[site].read(n, 0, x.numel()).view_as(x) for n, x in zip(names, (a, b), strict=True)]
            for site in sites
        ]
        rows = [a.flatten(1), *(end[0].flatten(1) for end in ends)]
        columns = [b.flatten(1), *(end[1].flatten(1) for end in ends)]
        new_a, new_b, tail = refactorise(rows, columns, [1 - rate, *shares], len(a))
        lost += tail**2
        whole += product_norm([new_b], [new_a], [1.0]) ** 2 + tail**2
        moved += product_norm(columns, rows, [-rate, *shares]) ** 2
        state[names[0]].copy_(new_a.view_as(a))
        state[names[1]].copy_(new_b.view_as(b))
    for name in sorted(state.keys() - factors):
        for site, share in zip(sites, shares, strict=True):
            state[name] += share * replies[site].read(name, 0, state[name].numel()).view_as(state[name])
    for name, tensor in state.items():
        average[name].copy_(tensor)
    return Loss(*(math.sqrt(lost / length) if length else 0.0 for length in (whole, moved)))


def step(
    number: int,
    state: Tensors,
    average: Tensors,
    replies: Mapping[str, Spooled],
    settings: FederationSettings,
    moments: Moments,
) -> None:
    """Take the server's step by the study's rule, in place; say what it lost where it lost anything.

    Args:
        number: Of the round.
        state: As in `aggregation.advance`.
        average: As there.
        replies: As there.
        settings: As there.
        moments: As there.
    """
    if settings.lora_aggregation != "stack" or not layers(state):
        advance(state, average, replies, settings, moments)
        return
    weights = dict.fromkeys(replies, 1.0) if settings.weights == "equal" else settings.weights
    loss = stack(state, average, replies, weights, settings)
    say(
        f"round {number}: adapters stacked and cut back to rank {rank_of(state)}; lost "
        f"{100 * loss.of_product:.2g} % of their product, {100 * loss.of_update:.2g} % of this round's update"
    )


def refactorise(
    rows: Sequence[Tensor], columns: Sequence[Tensor], weights: Sequence[float], rank: int
) -> tuple[Tensor, Tensor, float]:
    """Best factors of a rank of `sum_i w_i columns_i rows_i`.

    A's rows are orthogonal and as long as the first A's were on average, so that B keeps meeting gradients
    of the size it had; B carries the singular values. Signs are fixed, or two machines could differ by them.

    Args:
        rows: A of each term, `[r_i, in]`, float64; the first is the round's start.
        columns: B of each term, `[out, r_i]`.
        weights: One a term.
        rank: r, at most the sum of the r_i.

    Returns:
        A `[r, in]`, B `[out, r]`, and the Frobenius norm of what does not fit into that rank.
    """
    scaled = [weight * column for weight, column in zip(weights, columns, strict=True)]
    left, inner_left = torch.linalg.qr(torch.cat(scaled, dim=1))
    right, inner_right = torch.linalg.qr(torch.cat(list(rows)).T)
    u, sizes, vh = torch.linalg.svd(inner_left @ inner_right.T)
    length = float(rows[0].square().sum(dim=1).mean().sqrt())
    kept = min(rank, len(sizes))
    new_a, new_b = vh[:kept] @ right.T, left @ u[:, :kept] * sizes[:kept]
    signs = new_a.gather(1, new_a.abs().argmax(dim=1, keepdim=True)).sign()
    new_a, new_b = length * signs * new_a, new_b * signs.T / length
    if kept < rank:  # a layer narrower than the rank: what is left over stays empty
        new_a = torch.cat([new_a, rows[0][: rank - kept]])
        new_b = torch.cat([new_b, new_b.new_zeros(len(new_b), rank - kept)], dim=1)
    return new_a, new_b, float(torch.linalg.vector_norm(sizes[kept:]))


def product_norm(columns: Sequence[Tensor], rows: Sequence[Tensor], weights: Sequence[float]) -> float:
    """Frobenius norm of `sum_i w_i columns_i rows_i`, without forming it."""
    b = torch.cat([weight * column for weight, column in zip(weights, columns, strict=True)], dim=1)
    a = torch.cat(list(rows))
    # |BA|^2 = tr(B^T B A A^T); rounding can leave a zero a little below zero.
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
