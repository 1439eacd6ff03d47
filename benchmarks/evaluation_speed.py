"""How long an evaluation takes beyond sampling, whole and part by part, and metrics beside torchmetrics.

    python benchmarks/evaluation_speed.py              1,000 against 1,000 images at 64 px
    python benchmarks/evaluation_speed.py --n 200      smaller

Everything that is measured after a round by default: both extractors with every metric, interval and floor,
MS-SSIM, faithfulness, utility and near copies. Drawn colour pictures: 125 prompts of 8 draws against a
reference of 500 patients of 2 images a half, 500 more to search for near copies and 250 to train probes on.
Metrics are interleaved with torchmetrics; medians of 3, wall time.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from polyclinic.common.data.table import Record
from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.study import Study, parse_study
from polyclinic.server.evaluation import diversity, fidelity, neighbours
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.judge import picture
from polyclinic.server.evaluation.measure import drawn_for, measure
from polyclinic.server.reference import Reference

DRAWS = 8
KINDS = ("bright", "dark")
PARTS = {
    "features of drawn images": ("features.py", "of_images"),
    "features of the reference": ("features.py", "of_records"),
    "all metrics on features, with floors": ("estimate.py", "measure_fidelity"),
    "of these: Frechet": ("fidelity.py", "grouped_frechet"),
    "of these: KID and CMMD": ("fidelity.py", "grouped_mmd"),
    "of these: precision to coverage": ("neighbours.py", "neighbour_metrics"),
    "of these: Vendi": ("diversity.py", "vendi_score"),
    "MS-SSIM": ("diversity.py", "mean_similarity"),
    "faithfulness": ("probe.py", "measure_faithfulness"),
    "utility": ("utility.py", "measure_utility"),
    "near copies, thumbnails included": ("near_copies.py", "near_copies"),
}


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
        print(f"| {name} | {statistics.median(times[0]):.2f} | {other} |", flush=True)


def study_of(n: int, size: int) -> Study:
    """A study with the default extractors, and prompts of eight draws each that ask for one of two kinds."""
    prompts = [{"text": f"{KINDS[i % 2]}, {i}", "labels": {"kind": KINDS[i % 2]}} for i in range(n // DRAWS)]
    return parse_study(
        {
            "name": "speed",
            "data": {"image_size": size},
            "generator": {"size": "msdm-tiny"},
            "reference": {"concepts": ["kind"]},
            "evaluation": {"prompts": prompts, "draws": DRAWS},
        },
        "speed",
    )


def reference_of(folder: Path, n: int, size: int) -> Reference:
    """Files of a reference whose evaluate part holds 2 n images, so that score and floor stand on n each."""
    parts = {"pretrain": n, "probe": n // 2, "evaluate": 2 * n}
    images = iter(pictures(sum(parts.values()), size, 1))
    found: dict[str, list[Record]] = {}
    for part, count in parts.items():
        found[part] = []
        for i in range(count):
            path = folder / f"{part}-{i}.png"
            picture(next(images)[None], 1).save(path)
            label = {"kind": KINDS[i // 2 % 2]}
            found[part].append(Record(f"{part}-{i // 2}", path, (label["kind"],), labels=label))
    return Reference(**found, hash="0" * 64)


def evaluations(n: int, size: int) -> tuple[Tensor, Tensor]:
    """Print what evaluations take, whole and by part; returns features of drawn and of real images."""
    study = study_of(n, size)
    print("| evaluation | wall, s | CPU, s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        reference = reference_of(Path(name), n, size)
        # Each evaluation is a process's first: nothing but the folder of features is kept.
        rounds = {
            "the first, its reference new": pictures(n, size, 0),
            "a round's, its images new": (images := pictures(n, size, 2)),
            "the same again, nothing new": images,
        }
        profiles = {}
        for what, drawn in rounds.items():
            store = FeatureStore(Path(name) / "features", size, "crop")
            profiles[what] = profile = cProfile.Profile(time.process_time)
            wall, cpu = time.perf_counter(), time.process_time()
            profile.runcall(measure, 1, drawn_for(study, drawn), reference, study, store)
            took = time.perf_counter() - wall, time.process_time() - cpu
            print(f"| {what} | {took[0]:.1f} | {took[1]:.1f} |", flush=True)
        print(f"\n| of these, CPU s | {' | '.join(rounds)} |\n|---|---|---|---|")
        for part, place in PARTS.items():
            cells = [f"{cumulative(profile, place):.1f}" for profile in profiles.values()]
            print(f"| {part} | {' | '.join(cells)} |", flush=True)
        extractor = efficientnet()
        real = store.of_records(extractor, reference.evaluate[:n])
        return store.of_images(extractor, images).double(), real.double()


def cumulative(profile: cProfile.Profile, place: tuple[str, str]) -> float:
    """Seconds inside a function, named by the end of its file and its name."""
    found = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    return sum(took[3] for (file, _, name), took in found if (Path(file).name, name) == place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    n = arguments.n // DRAWS * DRAWS
    where = f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    print(f"{n} against {n} images at {arguments.size} px, {where}\n")
    x, y = evaluations(n, arguments.size)
    print("\n| metric on EfficientNet's features | ours, s | torchmetrics, s |\n|---|---|---|")
    single_metrics(x, y, [f"{i // DRAWS}" for i in range(n)], [f"p{i // 2}" for i in range(n)])


if __name__ == "__main__":
    main()
