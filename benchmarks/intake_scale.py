"""Check and cache of 80,000 images: memory over time, images a second, and what a kill costs.

    python benchmarks/intake_scale.py --films DIR --work DIR [--images 80000]

FILMS holds chest X-rays; ROCOv2's folder is made of blends of them under WORK (its names, splits, captions
and concepts; each picture has its own size and crop), once. Then `polyclinic-client check` is killed (-9)
halfway and run again, and so is the cache, with a small random VAE at 32 px: what is measured is everything
around the encoder. Then msdm-tiny takes three DP-SGD steps from that cache. Memory is what is resident and
not backed by files, sampled every two seconds: of the parent, and of the largest worker.
"""

import argparse
import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SPLITS = {"train": 59_958, "valid": 9_904, "test": 9_927}
CUIS = ("C0040405", "C1306645", "C0024485", "C0041618", "C0002978", "C0032743", "C0817096")
WORDS = [
    "axial",
    "sagittal",
    "contrast",
    "enhanced",
    "CT",
    "MRI",
    "image",
    "showing",
    "a",
    "large",
    "hypodense",
    "lesion",
    "in",
    "the",
    "left",
    "right",
    "upper",
    "lobe",
    "kidney",
    "liver",
    "with",
    "arrow",
    "thickening",
    "of",
    "wall",
    "and",
    "adjacent",
    "fat",
    "stranding",
]
SETUP = """
import sys
from pathlib import Path
from diffusers import AutoencoderKL
from polyclinic.common.data.cache import build_cache, load_cache
from polyclinic.common.data.sources import read_records
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.study import parse_study
from polyclinic.common.training import PrivateEngine, train
folder, work, images = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
study = parse_study({
    "name": "scale",
    "data": {"source": "rocov2", "unit": "image", "image_size": 32},
    "generator": {"size": "msdm-tiny", "max_tokens": 8},
    "privacy": {"epsilon": 8.0, "delta": 1e-6, "sampling_rate": 32 / images, "views": 2, "micro_batch": 8},
    "training": {"rounds": 1, "steps_per_round": 3, "learning_rate": 1e-3, "device": "cpu", "threads": 1},
    "evaluation": {"prompts": [{"text": "a CT image"}]},
}, "scale")
if not (work / "vae").exists():
    AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                  block_out_channels=(16,) * 4, latent_channels=8, norm_num_groups=16,
                  ).save_pretrained(work / "vae")
"""
CACHE = f"""{SETUP}
family = Msdm(study.generator, 32, work / "vae")
name = build_cache(read_records(study.data, folder), family, study.data, work / "cache")
(work / "cache.name").write_text(name)
"""
TRAIN = f"""{SETUP}
import time
def held(what):
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    print(f"{{what}}: {{int(line.split()[1]) / 1e3:.0f}} MB")
family = Msdm(study.generator, 32, work / "vae", encoders=False)
held("before")
cached = load_cache(work / "cache", (work / "cache.name").read_text())
held(f"cache of {{len(cached.patients):,}} images opened")
random = KeyedRandom.from_os()
engine = PrivateEngine(family, cached, study, random, sigma=1.0, divisor=32.0, device="cpu")
for first in range(0, 3):
    start = time.monotonic()
    train(engine, first, 1, "train")
    held(f"{{first + 1}} steps, the last in {{time.monotonic() - start:.1f}} s")
"""
Sample = tuple[float, int, float, float]


def synthesise(films: Path, folder: Path, images: int) -> None:
    """Write ROCOv2's form; a picture that is there is not drawn again."""
    shown = [Image.open(p).convert("L").resize((720, 720)) for p in sorted(films.iterdir())[:400]]
    for split, share in SPLITS.items():
        count = round(images * share / sum(SPLITS.values()))
        (folder / f"{split}_images").mkdir(parents=True, exist_ok=True)
        names = [f"ROCOv2_2023_{split}_{number:06d}" for number in range(1, count + 1)]
        draw = partial(_draw, shown, folder / f"{split}_images", ord(split[1]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, count, 2000):
                list(pool.map(draw, enumerate(names[start : start + 2000], start + 1)))
        random = np.random.default_rng(ord(split[0]))
        said = [f"{' '.join(random.choice(WORDS, int(random.integers(6, 40))))} {n}." for n in names]
        _table(folder / f"{split}_captions.csv", "Caption", names, said)
        _table(
            folder / f"{split}_concepts.csv", "CUIs", names, [";".join(random.choice(CUIS, 3)) for _ in names]
        )


def _table(path: Path, head: str, names: list[str], cells: list[str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("ID", head), *zip(names, cells, strict=True)])


def _draw(films: list[Image.Image], folder: Path, seed: int, named: tuple[int, str]) -> None:
    number, name = named
    path = folder / f"{name}.jpg"
    if path.exists():
        return
    random = np.random.default_rng([seed, number])
    a, b = (films[int(i)] for i in random.integers(0, len(films), 2))
    a = a if random.random() < 0.5 else ImageOps.mirror(a)
    image = Image.blend(a, b.rotate(int(random.integers(0, 4)) * 90), float(random.uniform(0.3, 0.7)))
    width, height = (int(v) for v in random.integers(400, 720, 2))
    left, top = int(random.integers(0, 721 - width)), int(random.integers(0, 721 - height))
    image.crop((left, top, left + width, top + height)).convert("RGB").save(path, quality=95)


def _resident(pid: int) -> tuple[float, float]:
    """Resident set of a process in MB: all of it, and what is not backed by files."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) / 1e3, int(lines["RssAnon"].split()[0]) / 1e3
    except (OSError, KeyError, ValueError):
        return 0.0, 0.0


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except OSError:
        return []


def watched(
    command: list[str], done: Callable[[], int], stop_at: int | None, log: Path
) -> tuple[int, list[Sample], float]:
    """Run a process to its end, or kill it (-9) at `stop_at` images: exit code, samples, seconds."""
    start, samples = time.monotonic(), []
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            parent, workers = _resident(child.pid), [_resident(c) for c in _children(child.pid)]
            count = done()
            samples.append(
                (time.monotonic() - start, count, parent[1], max((w[1] for w in workers), default=0))
            )
            if stop_at is not None and count >= stop_at:
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(2)
        return child.wait(), samples, time.monotonic() - start


def looks(home: Path) -> int:
    """Looks that are on disk."""
    store = home / "data" / "looks.sqlite"
    if not store.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as base:
            return int(base.execute("SELECT count(*) FROM looks").fetchone()[0])
    except sqlite3.Error:
        return 0


def show(name: str, samples: list[Sample], images: int) -> None:
    """Print memory at tenths of the work, after the table was read."""
    print(f"\n{name}\n\n| images done | seconds | parent, MB | largest worker, MB |\n|---|---|---|---|")
    marks = np.linspace(0, images, 11)
    for low, high in pairwise(marks):
        some = [s for s in samples if low < s[1] <= high]
        if some:
            at, count, parent, worker = some[-1]
            print(f"| {count:,} | {at:.0f} | {parent:.0f} | {worker:.0f} |")


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--films", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=80_000)
    parser.add_argument("--only", choices=["check", "cache", "train"])
    arguments = parser.parse_args()
    work, folder, images = arguments.work, arguments.work / "roco", arguments.images
    if arguments.only != "train":
        synthesise(arguments.films, folder, images)
    if arguments.only not in ("cache", "train"):
        home = work / "home"
        command = [
            sys.executable,
            "-m",
            "polyclinic.client.cli",
            "check",
            str(folder),
            "--source",
            "rocov2",
            "--home",
        ]
        command += [str(home), "--json", "--fix"]
        _, samples, seconds = watched(command, partial(looks, home), images // 2, work / "killed.log")
        kept = looks(home)
        code, more, rest = watched(command, partial(looks, home), None, work / "check.log")
        text = (work / "check.log").read_text()
        facts = json.loads(text[text.index("\n{") :])
        show("check", [*samples, *more], images)
        print(
            f"\nkilled at {kept:,} looks on disk after {seconds:.0f} s; then {facts['remembered']:,} "
            f"remembered, {facts['looked_at']:,} looked at in {rest:.0f} s, exit code {code}; "
            f"{images / (seconds + rest):.0f} images/s; peak {max(s[2] for s in more):.0f} MB\n",
            [(row["code"], row["count"]) for row in facts["findings"]],
            flush=True,
        )
        command[3], command = "snapshot", command[:-1]
        code, more, seconds = watched(command, lambda: 1, None, work / "snapshot.log")
        print(
            f"snapshot: {seconds:.0f} s, exit code {code}, peak {max(s[2] for s in more):.0f} MB", flush=True
        )
    if arguments.only not in ("check", "train"):
        cache = work / "cache"

        def shards() -> int:
            return 64 * sum(1 for _ in cache.glob("*.safetensors")) if cache.exists() else 0

        command = [sys.executable, "-c", CACHE, str(folder), str(work), str(images)]
        _, samples, seconds = watched(command, shards, images // 2, work / "cache-killed.log")
        before = {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
        code, more, rest = watched(command, shards, None, work / "cache.log")
        same = sum(path.stat().st_mtime_ns == at for path, at in before.items())
        show("cache (shards of 64 images, then of 256 captions)", [*samples, *more], 2 * images)
        print(
            f"\nkilled at {len(before):,} shards after {seconds:.0f} s; {same:,} of them untouched after the "
            f"second run of {rest:.0f} s, exit code {code}; peak {max(s[2] for s in more):.0f} MB"
        )
    if arguments.only not in ("check", "cache"):
        command = [sys.executable, "-c", TRAIN, str(folder), str(work), str(images)]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
