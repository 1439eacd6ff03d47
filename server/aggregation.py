"""From the sites' differences to the next state, piece by piece.

Differences lie on disk; a piece of a tensor is read from every site, in the order of their names, so that
sums do not depend on who answered first, and memory does not grow with the sites. Flower's strategies
have the same rules (FedAvg, FedTrimmedAvg, FedMedian), but hold every reply in memory at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from polyclinic.common.generators.base import Tensors
from polyclinic.common.settings import FederationSettings
from polyclinic.server.server_optimizer import Moments, in_order, moments_like, remembered, server_step
from polyclinic.server.spool import PIECE, Spooled, write_tensors


def combine(
    pieces: Sequence[Tensor], factors: Sequence[float], weights: Sequence[float], settings: FederationSettings
) -> Tensor:
    """Combine one piece of every site's difference by the study's rule.

    Args:
        pieces: `[N]` of each site; overwritten.
        factors: What each site's whole difference is scaled by; 1 but for clipped-mean.
        weights: Public weights; renormalised over the sites that are here.
        settings: Names the rule.

    Returns:
        `[N]`: mean, weighted; trimmed mean, without the floor(trim x sites) smallest and largest values of
        each coordinate (Yin et al. 2018); or median, between the middle two where sites are even.
    """
    if settings.aggregation in ("mean", "clipped-mean"):
        # Product and sum are rounded apart: a fused one would depend on where pieces and threads end.
        total = torch.zeros_like(pieces[0])
        for piece, factor, weight in zip(pieces, factors, weights, strict=True):
            total += piece.mul_(factor * weight)
        return total.div_(sum(weights))
    ranked = torch.stack(list(pieces)).sort(dim=0).values
    count = len(pieces)
    cut = (count - 1) // 2 if settings.aggregation == "median" else int(settings.trim * count)
    return ranked[cut : count - cut].mean(dim=0)


def clip_factors(norms: Mapping[str, float], settings: FederationSettings) -> dict[str, float]:
    """Factor of each site's difference: clipped-mean shortens it to clip_norm, or to the median length."""
    if settings.aggregation != "clipped-mean":
        return dict.fromkeys(norms, 1.0)
    bound = median(norms.values()) if settings.clip_norm is None else settings.clip_norm
    return {site: min(1.0, bound / norm) if norm else 1.0 for site, norm in norms.items()}


def advance(
    state: Tensors,
    average: Tensors,
    replies: Mapping[str, Spooled],
    settings: FederationSettings,
    moments: Moments = Moments(),  # noqa: B008 - a tuple of nothing
) -> None:
    """Take the server's step and update the moving average, both in place.

    Args:
        state: Trainable state of the round; becomes the next.
        average: Its exponential moving average over rounds, the generator that is judged; shares no memory
            with the state.
        replies: Site to its difference. A tensor that no difference holds stays as it is.
        settings: Rule, weights, server optimizer and EMA decay.
        moments: What the server's optimizer remembers of earlier rounds, and where it goes on.
    """
    steps = _steps(state, average, replies, settings, moments.before)
    if moments.after is None:
        deque(steps, maxlen=0)
    else:
        write_tensors(moments.after, steps, moments_like(state, settings), sync=True)


def _steps(
    state: Tensors,
    average: Tensors,
    replies: Mapping[str, Spooled],
    settings: FederationSettings,
    before: Spooled | None,
) -> Iterator[tuple[str, Tensor]]:
    """Step tensor by tensor; yield what the optimizer remembers of each."""
    sites = sorted(replies)
    by_site = clip_factors({site: replies[site].norm for site in sites}, settings)
    factors = [by_site[site] for site in sites]
    weights = [1.0 if settings.weights == "equal" else settings.weights[site] for site in sites]
    size = max(1, PIECE // len(sites))
    sent = replies[sites[0]].places
    for name in in_order(state):
        flat, mean = state[name].view(-1), average[name].view(-1)
        memory = remembered(name, flat, before, settings)
        if "steps" in memory and name in sent:
            memory["steps"] += 1
        for start in range(0, len(flat) if name in sent else 0, size):
            stop = min(start + size, len(flat))
            pieces = [replies[site].read(name, start, stop) for site in sites]
            step = combine(pieces, factors, weights, settings)
            piece = {kind: x if kind == "steps" else x[start:stop] for kind, x in memory.items()}
            flat[start:stop].add_(server_step(step, piece, settings))
        mean.lerp_(flat, 1 - settings.ema)
        yield from (
            (f"{name}/{kind}", x.view_as(state[name]) if kind != "steps" else x) for kind, x in memory.items()
        )
