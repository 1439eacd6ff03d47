"""How long an evaluation takes beyond sampling, part by part, beside torchmetrics where it has the metric.

    python benchmarks/evaluation_speed.py              1,000 against 1,000 images at 64 px
    python benchmarks/evaluation_speed.py --n 200      smaller

Drawn colour pictures; 125 prompts of 8 draws, 500 patients of 2 images on each side. The reference holds
twice as many images, so that score and floor both stand on n. Metrics are interleaved with torchmetrics;
medians of 3.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.features.radiomic import radiomic
from polyclinic.server.evaluation import diversity, estimate, fidelity, neighbours


class Through(nn.Module):
    """Hands features through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def pictures(n: int, size: int, seed: int) -> Tensor:
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def theirs(metric: FrechetInceptionDistance | KernelInceptionDistance, x: Tensor, y: Tensor) -> None:
    metric.update(y, real=True)
    metric.update(x, real=False)
    metric.compute()


def single_metrics(x: Tensor, y: Tensor, prompts: list[str], patients: list[str]) -> None:
    """Print each metric's median beside torchmetrics', where it has the metric."""
    of_both, width = (x, y, prompts, patients), x.shape[1]
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
        "KID with interval; torchmetrics without": (
            lambda: fidelity.grouped_kid(*of_both),
            lambda: theirs(KernelInceptionDistance(feature=Through(width), subset_size=len(x) // 2), x, y),
        ),
        "Frechet, value only": (
            lambda: fidelity.frechet_distance(x, y),
            lambda: theirs(FrechetInceptionDistance(feature=Through(width)), x, y),
        ),
        "Frechet with interval": (lambda: fidelity.grouped_frechet(*of_both), None),
        "CMMD with interval": (lambda: fidelity.grouped_cmmd(*of_both), None),
        "precision, recall, density, coverage": (lambda: neighbours.neighbour_metrics(*of_both), None),
        "Vendi": (lambda: diversity.vendi_score(x, prompts), None),
    }
    for name, (ours, oracle) in pairs.items():
        times: tuple[list[float], list[float]] = [], []
        for _ in range(3):
            times[0].append(seconds(ours))
            if oracle is not None:
                times[1].append(seconds(oracle))
        other = f"{statistics.median(times[1]):.2f}" if oracle is not None else ""
        print(f"| of these: {name} | {statistics.median(times[0]):.2f} | {other} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    n = arguments.n
    drawn, real = pictures(n, arguments.size, 0), pictures(2 * n, arguments.size, 1)
    prompts, patients = [f"{i // 8}" for i in range(n)], [f"p{i // 2}" for i in range(2 * n)]
    print(f"{n} against {n} images at {arguments.size} px, {torch.get_num_threads()} threads\n")
    print("| part | seconds | torchmetrics, seconds |\n|---|---|---|")
    total = 0.0
    for extractor in (efficientnet(), radiomic()):
        spent = {}
        spent[f"features, {extractor.name}: drawn"] = seconds(lambda e=extractor: e.extract(drawn))
        spent[f"features, {extractor.name}: reference, once"] = seconds(lambda e=extractor: e.extract(real))
        x, y = extractor.extract(drawn).double(), extractor.extract(real).double()
        spent[f"all metrics with floors, {extractor.name}"] = seconds(
            lambda x=x, y=y, e=extractor: estimate.measure_fidelity(
                x, prompts, y, patients, "k", standardise=e.standardise
            )
        )
        total += sum(spent.values())
        for part, took in spent.items():
            print(f"| {part} | {took:.1f} | |", flush=True)
        if extractor.standardise:
            continue
        single_metrics(x, y[:n], prompts, patients[:n])
    within = diversity.pairs_within(prompts)
    took = seconds(
        lambda: diversity.mean_similarity(diversity.luminance(drawn), within, [prompts[a] for a, _ in within])
    )
    print(f"| MS-SSIM of {len(within)} pairs | {took:.1f} | |")
    print(f'| **all, without the lines "of these"** | **{total + took:.1f}** | |')


if __name__ == "__main__":
    main()
