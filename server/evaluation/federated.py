"""DP-CMMD: the final images against the sites' own, from one noisy vector a site (PRIVACY.md, rule 15).

A site sends s = sum over its patients of (phi(x), a) + N(0, z^2 (1 + a^2) I), phi being random Fourier
features of a Gaussian kernel. Sums over sites add up, and so do the noises' variances. What the server
computes from the total is post-processing: it costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.features.fourier import CONSTANT, fourier, frequencies
from polyclinic.common.files import write_atomic
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Resolved, Study
from polyclinic.common.wire import ReleaseFacts
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.results import FederatedFidelity

FEWEST_SIGMAS = 4  # a number of patients that its own noise may have made is no number


class Mmd(NamedTuple):
    """Squared MMD from a noisy sum.

    Attributes:
        value: Unbiased: may be below 0.
        deviation: Standard deviation that the sites' noise gives it.
        patients: Noisy number.
    """

    value: float
    deviation: float
    patients: float


def noisy_mmd(total: Tensor, variance: float, synthetic: Tensor, groups: Sequence[str]) -> Mmd:
    """Estimate the squared MMD between drawn images and the sites' patients.

    With S the sum of phi over n patients plus noise of variance v a coordinate, T that over m images:

        (|S|^2 - D v - n) / (n (n - 1))  -  2 S T / (n m)  +  mean of phi(y) phi(y') over prompts' pairs,

    where D v is the noise's own energy, n = sum of |phi(x)|^2 the diagonal, and n itself is read from the
    constant's noisy sum. Its deviation by the noise, to first order, with the squares' own:

        4 v |S/n - T/m|^2 / n^2  +  2 D v^2 / n^4  +  (2 (A - B) / n)^2 v / a^2,

    A and B being the first term and S T / (n m).

    Args:
        total: `[D + 1]`, the sites' sums added up.
        variance: v, of a coordinate: the sites' z^2 (1 + a^2) added up.
        synthetic: `[m, D + 1]`, Fourier features of the drawn images.
        groups: Prompt of each; images of one prompt are not paired.

    Raises:
        BadInput: The noise leaves nothing to be told.
    """
    total, synthetic = total.double(), synthetic.double()
    real, length = total[:-1], len(total) - 1
    n = float(total[-1]) / CONSTANT
    if n < 2 or n * CONSTANT < FEWEST_SIGMAS * math.sqrt(variance):
        raise BadInput("the sites' noise is larger than their number of patients: nothing can be told")
    drawn = synthetic[:, :-1]
    m, names = len(drawn), sorted(set(groups))
    if len(names) < 2:
        raise BadInput("images of at least two prompts are needed: evaluation.prompts has one")
    rows = torch.tensor([names.index(group) for group in groups])
    sums = torch.zeros(len(names), length, dtype=torch.float64).index_add_(0, rows, drawn)
    sizes = torch.bincount(rows).double()
    whole = sums.sum(0)
    within = (whole.square().sum() - sums.square().sum()) / (m**2 - sizes.square().sum())
    first = float((real.square().sum() - length * variance - n) / (n * (n - 1)))
    across = float(real @ whole) / (n * m)
    value = first - 2 * across + float(within)
    # |S/n - T/m|^2, its noise taken out; below 0 only by that noise.
    apart = max(0.0, float((real / n - whole / m).square().sum()) - length * variance / n**2)
    spread = (
        4 * variance * apart / n**2
        + 2 * length * variance**2 / n**4
        + (2 * (first - across) / n) ** 2 * variance / CONSTANT**2
    )
    return Mmd(value, math.sqrt(spread), n)


def measure_federated(
    resolved: Resolved, sums: dict[str, tuple[Tensor, ReleaseFacts]], final: Path
) -> FederatedFidelity | None:
    """Compare the final images with what the sites sent; None where too little came.

    Args:
        resolved: The study.
        sums: Site to its noisy sum and facts.
        final: Features of the final images, as `keep_final` wrote them.
    """
    if resolved.public is None or not sums or not final.exists():
        return None
    features, prompts = read_final(final, resolved.study)
    drawn = fourier(
        features,
        frequencies(
            resolved.hash,
            features.shape[1],
            resolved.study.releases.fourier_features,
            resolved.public.bandwidth,
        ),
    )
    # Undo what kept every patient within the bound.
    total = sum((1 + facts.tau) * sent.double() for sent, facts in sums.values())
    variance = sum(((1 + facts.tau) * facts.sigma * facts.bound) ** 2 for _, facts in sums.values())
    assert isinstance(total, Tensor)
    try:
        found = noisy_mmd(total, variance, drawn, prompts)
    except BadInput as error:
        return _nothing(resolved, sums, str(error))
    reach = 1.96 * found.deviation
    private = resolved.study.privacy.enabled
    return FederatedFidelity(
        cmmd=Estimate(
            value=found.value,
            low=found.value - reach if variance else None,
            high=found.value + reach if variance else None,
            interval="95 %, of the sites' noise alone",
            n=len(drawn),
            groups=len(set(prompts)),
            floor=None,
            ratio=None,
        ),
        epsilon=resolved.study.releases.fidelity_epsilon if private else None,
        delta=resolved.study.privacy.delta if private else None,
        sites=sorted(sums),
        patients=found.patients,
        features=len(total) - 1,
        note="Squared MMD (unbiased: may be below 0) with a Gaussian kernel on "
        f"{efficientnet().name} features, bandwidth {resolved.public.bandwidth:.3g} from public images. The "
        "interval is that of the noise; it does not speak of other patients or other draws.",
    )


def _nothing(
    resolved: Resolved, sums: dict[str, tuple[Tensor, ReleaseFacts]], why: str
) -> FederatedFidelity | None:
    from polyclinic.common.progress import say

    say(f"DP-CMMD of {', '.join(sorted(sums))}: {why}")
    return None


def keep_final(path: Path, features: Tensor) -> None:
    """Keep the features of the final images, a prompt's draws side by side; they are public."""
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, save({"features": features.contiguous()}))


def read_final(path: Path, study: Study) -> tuple[Tensor, list[str]]:
    """Read them, with the prompt of each."""
    each = [prompt.text for prompt in study.evaluation.prompts for _ in range(study.evaluation.draws)]
    return load_file(str(path))["features"], each
