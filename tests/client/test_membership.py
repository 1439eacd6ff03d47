"""The interval of the membership test's AUC: what it covers, and where groups are small or apart."""

import numpy as np
import pytest
import torch
from scipy import stats

from polyclinic.client.membership import auc_interval, compare


@pytest.mark.parametrize(("n", "m"), [(5, 5), (18, 5), (180, 20), (30, 200)])
@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95, 0.99])
def test_interval_covers_the_auc(n: int, m: int, truth: float) -> None:
    """Normal scores, whose AUC is Phi(shift / sqrt 2)."""
    generator, trials = np.random.default_rng(n + m), 1500
    shift = stats.norm.ppf(truth) * 2**0.5
    trained = generator.normal(shift, size=(trials, n, 1))
    wins = (trained > generator.normal(size=(trials, 1, m))).mean(axis=(1, 2))
    ends = {auc: auc_interval(auc, n, m) for auc in set(wins.tolist())}
    covered = np.mean([ends[auc][0] <= truth <= ends[auc][1] for auc in wins.tolist()])
    assert covered >= 0.93  # 3.6 standard errors below 95 %


def test_groups_that_are_apart_leave_a_doubt_that_shrinks() -> None:
    widths = []
    for n in (5, 20, 80):
        found = compare(torch.arange(n).double() + n, torch.arange(n).double())
        assert (found.auc, found.high) == (1, 1)
        widths.append(1 - found.low)
        turned = compare(torch.arange(n).double(), torch.arange(n).double() + n)
        assert (turned.auc, turned.low) == (0, 0)
        assert turned.high == pytest.approx(1 - found.low)
    assert 0.2 < widths[0] < 0.6
    assert widths[0] > 2 * widths[1] > 4 * widths[2] > 0


def test_interval_is_the_published_one() -> None:
    """Where the ends are, the squared distance is z^2 times Hanley & McNeil's variance at mean sizes."""
    low, high = auc_interval(0.8, 30, 50)
    for end in (low, high):
        mean = (30 + 50) / 2
        q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
        variance = (end * (1 - end) + (mean - 1) * (q1 - end**2) + (mean - 1) * (q2 - end**2)) / (30 * 50)
        assert (0.8 - end) ** 2 == pytest.approx(stats.norm.ppf(0.975) ** 2 * variance)
