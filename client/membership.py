"""Can the final generator tell who was trained on? A site's own test; its result never leaves.

The loss-threshold attack (Yeom et al. 2018, 1709.01604) at matched noise levels (Carlini et al. 2023,
2301.13188): every patient is noised with the same draws at the same levels, and who has the smaller loss is
guessed to be trained on. An AUC near 0.5 does not prove that no attack works; one far above is a finding.
"""

from __future__ import annotations

from math import comb

import torch
from pydantic import BaseModel, ConfigDict
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

from polyclinic.common.data.cache import Cached
from polyclinic.common.generators.base import Family, Views
from polyclinic.common.progress import track

LEVELS, DRAWS = 8, 2
FEWEST = 5  # patients on either side
ALARM = 1e-3  # chance of a false alarm


class Membership(BaseModel):
    """What the test found.

    Attributes:
        auc: Chance that a patient who was trained on has the smaller loss than one who was not.
        low: Lower end of a 95 % interval over patients (`auc_interval`).
        high: Upper end.
        chance: Of so large an AUC if training left no trace (Mann-Whitney, one-sided).
        trained: Patients trained on.
        held_out: Patients kept out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    auc: float
    low: float
    high: float
    chance: float
    trained: int
    held_out: int

    @property
    def alarming(self) -> bool:
        """Whether a trace is there beyond reasonable doubt."""
        return self.chance < ALARM


def idle_words(trained: int, held_out: int) -> str:
    """Say why the test cannot be made, or can find nothing, among so many patients; empty where it can."""
    if min(trained, held_out) < FEWEST:
        return f"cannot be made: fewer than {FEWEST} patients on one side (releases.held_out)"
    if comb(trained + held_out, held_out) * ALARM <= 1:  # that of the clearest order there is
        return f"cannot raise an alarm: {trained} and {held_out} patients are too few for one by chance"
    return ""


def membership_test(family: Family, trained: Cached, held_out: Cached) -> Membership | None:
    """Compare losses of patients who were trained on with those of patients who were not.

    Args:
        family: With the final state.
        trained: Cache of the patients that were trained on.
        held_out: Cache of those that were not.

    Returns:
        None where one side has fewer than five patients.
    """
    if min(len(trained.patients), len(held_out.patients)) < FEWEST:
        return None
    losses = torch.cat([patient_losses(family, cached) for cached in (trained, held_out)])
    # Levels differ in size and spread: each counts the same.
    spread = losses.std(0).clamp_min(1e-12)
    scores = -((losses - losses.mean(0)) / spread).mean(1)
    return compare(scores[: len(trained.patients)], scores[len(trained.patients) :])


def compare(trained: Tensor, held_out: Tensor) -> Membership:
    """AUC of two groups' scores, with an interval over patients.

    Args:
        trained: `[n]`, larger where the guess is "trained on".
        held_out: `[m]`.
    """
    n, m = len(trained), len(held_out)
    found = stats.mannwhitneyu(trained.numpy(), held_out.numpy(), alternative="greater")
    auc = float(found.statistic) / (n * m)
    low, high = auc_interval(auc, n, m)
    return Membership(auc=auc, low=low, high=high, chance=float(found.pvalue), trained=n, held_out=m)


def auc_interval(auc: float, n: int, m: int) -> tuple[float, float]:
    """95 % score interval of an AUC: every value that the found one does not contradict.

    The variance is that of the value asked about, not of the one found, so the interval has a width at an AUC
    of 1, too, where a bootstrap has none: Newcombe 2006 (Statistics in Medicine 25:559), method 5, on the
    variance of Hanley & McNeil 1982 with both group sizes at their mean.

    Args:
        auc: As found.
        n: Patients of one group.
        m: Patients of the other.
    """
    z, mean = stats.norm.ppf(0.975), (n + m) / 2

    def excess(value: float) -> float:
        """Squared distance from the found one, less the most that it may be."""
        spread = 1 + (mean - 1) * ((1 - value) / (2 - value) + value / (1 + value))
        return float((auc - value) ** 2 - z**2 * value * (1 - value) * spread / (n * m))

    # Where the found one is 0 or 1 it is a root itself: the other one is wanted.
    low = 0.0 if auc == 0 else brentq(excess, 0, min(auc, 1 - 1e-9))
    high = 1.0 if auc == 1 else brentq(excess, max(auc, 1e-9), 1)
    return float(low), float(high)


@torch.no_grad()
def patient_losses(family: Family, cached: Cached) -> Tensor:
    """Loss of each patient at each noise level, `[patients, LEVELS]`: mean over images and draws.

    Noise and levels are the same for everybody, so that only the image makes a difference.
    """
    device = next(family.module.parameters()).device
    shape = family.normal_shape({name: rows[[0]] for name, rows in cached.image.items()})
    generator = torch.Generator().manual_seed(0)  # public: the same draws for everybody
    normal = torch.randn(LEVELS * DRAWS, *shape, generator=generator)
    normal[:, 0] = 0.0  # the latent's mean, for families that sample it first
    uniform = (torch.arange(LEVELS * DRAWS) // DRAWS + 0.5) / LEVELS
    rows = []
    with track("membership test", len(cached.patients)) as advance:
        for images in cached.images:
            losses = torch.zeros(LEVELS)
            for image in images:
                prompt = cached.captions[image][0]
                views = Views(
                    {k: _repeat(v[[image]]) for k, v in cached.image.items()},
                    {k: _repeat(v[[prompt]]) for k, v in cached.prompt.items()},
                    normal,
                    uniform,
                )
                moved = Views.of({name: tensor.to(device) for name, tensor in views.tensors().items()})
                losses += family.view_losses(moved).float().cpu().view(LEVELS, DRAWS).mean(1)
            rows.append(losses / len(images))
            advance(1)
    return torch.stack(rows).double()


def _repeat(tensor: Tensor) -> Tensor:
    return tensor.expand(LEVELS * DRAWS, *tensor.shape[1:])
