"""Intake: images a second of loading and of checking beside a plain PIL and torch loop; burned-in text.

    python benchmarks/intake.py --data DIR [--images 300] [--repeats 5]

DIR holds chest X-rays (any sizes) in `images/`. The three ways take turns on the same files. `look` does
more than the others: two hashes, a small copy, text, metadata. Worker processes are warm; files are cached.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageStat

from polyclinic.client.check.burned_in import LONGEST, text_lines
from polyclinic.client.check.look import look, pixel_hash, resemblance
from polyclinic.client.check.workers import started
from polyclinic.common.data.images import open_image
from polyclinic.common.data.pixels import load_pixels, spread, workers
from polyclinic.common.data.table import Record

SIZE = 256
TEXTS = ("DOE^JANE", "MRN 00481516", "12.03.1961 F", "St. Mary Hospital", "2023-11-04 10:32", "Acc# 99182736")


def plain(paths: list[Path]) -> None:
    """What a user would write: open, crop, resize, stack."""
    for start in range(0, len(paths), 64):
        batch = []
        for path in paths[start : start + 64]:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            square = square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            batch.append(torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 127.5 - 1)
        torch.stack(batch)


def through_the_door(paths: list[Path]) -> None:
    records = [Record(path.stem, path, ("x",)) for path in paths]
    for start in range(0, len(records), 64):
        load_pixels(records[start : start + 64], SIZE, "crop")


def rates(paths: list[Path], repeats: int) -> str:
    seconds: dict[str, list[float]] = {}
    with started() as fleet:

        def look(paths: list[Path]) -> None:
            for _ in spread(lambda path: fleet.look(path, ""), paths):
                pass

        ways: dict[str, Callable[[list[Path]], None]] = {
            "plain PIL + torch loop": plain,
            "load_pixels": through_the_door,
            "check's look": look,
        }
        for repeat in range(repeats + 1):
            for name, act in ways.items():
                start = time.perf_counter()
                act(paths)
                if repeat:  # the first turn warms up
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
    base = statistics.median(seconds["plain PIL + torch loop"])
    rows = [
        f"| {name} | {len(paths) / statistics.median(took):.0f} | {base / statistics.median(took):.2f} |"
        for name, took in seconds.items()
    ]
    return "\n".join(["| way | images/s | of the plain loop |", "|---|---|---|", *rows])


def costs(paths: list[Path]) -> str:
    """CPU time of each thing that a look does, one thread, beside the plain loop's."""
    torch.set_num_threads(1)
    films = [open_image(path) for path in paths]
    grays = [film.convert("L") for film in films]
    small = [gray.copy() for gray in grays]
    for gray in small:
        gray.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
    parts: dict[str, Callable[[], object]] = {
        "plain PIL + torch loop": lambda: plain(paths),
        "load_pixels": lambda: through_the_door(paths),
        "the whole look": lambda: [look(path, "") for path in paths],
        "of it: decode": lambda: [open_image(path) for path in paths],
        "of it: hash of the pixels": lambda: [pixel_hash(film) for film in films],
        "of it: flatness": lambda: [ImageStat.Stat(film).stddev for film in films],
        "of it: near-duplicates": lambda: [resemblance(gray) for gray in grays],
        "of it: burned-in text": lambda: [text_lines(np.asarray(gray)) for gray in small],
    }
    rows = ["| what | CPU ms an image |", "|---|---|"]
    for name, act in parts.items():
        act()
        start = time.process_time()
        act()
        rows.append(f"| {name} | {1000 * (time.process_time() - start) / len(paths):.1f} |")
    return "\n".join(rows)


def burned_in(paths: list[Path]) -> str:
    """Precision and recall of the heuristic on typed overlays, one overlaid copy beside each clean film."""
    random = np.random.default_rng(0)
    films = [Image.open(path).convert("L") for path in paths]
    false = sum(bool(text_lines(np.asarray(film))) for film in films)
    rows = ["| letters | recall | precision |", "|---|---|---|"]
    for size in (9, 12, 16, 20):
        for name, ink in (("white", 255), ("light grey", 200), ("black", 0)):
            hits = sum(bool(text_lines(np.asarray(overlaid(film, size, ink, random)))) for film in films)
            precision = f"{hits / (hits + false):.2f}" if hits + false else "–"
            rows.append(f"| {size} px, {name} | {hits / len(films):.2f} | {precision} |")
    return "\n".join(rows)


def overlaid(film: Image.Image, size: int, ink: int, random: np.random.Generator) -> Image.Image:
    shown, font = film.copy(), ImageFont.load_default(size)
    text = TEXTS[random.integers(len(TEXTS))]
    pen = ImageDraw.Draw(shown)
    room = max(1, int(film.width - pen.textlength(text, font=font) - 4))
    height = (3, film.height // 2, film.height - size - 6)[random.integers(3)]
    pen.text((2 + int(random.integers(room)), height), text, fill=ink, font=font)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    paths = sorted((arguments.data / "images").iterdir())[: arguments.images]
    load = os.getloadavg()[0]
    print(f"{len(paths)} images, {workers()} threads, medians of {arguments.repeats}, load {load:.1f}\n")
    print(costs(paths[:100]), "\n", rates(paths, arguments.repeats), "\n", burned_in(paths[:150]), sep="\n")


if __name__ == "__main__":
    main()
