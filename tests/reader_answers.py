"""A small reader study on drawn images, and raters who answer by the key."""

from __future__ import annotations

import csv
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from polyclinic.common.reader_study.key import Key, Showing, read_key
from polyclinic.common.reader_study.make import Plan, make_study

Choose = Callable[[str, Showing], int]  # the image's group and its showing, to an answer from 1 to 6
CAPTIONS = ("image", "caption")
PATIENTS = (*CAPTIONS, "patient")


def draw_folder(
    folder: Path, count: int, hue: tuple[int, int, int], side: int = 96, columns: Sequence[str] = ()
) -> Path:
    """Write drawings, each a little different; with columns a table, too, two drawings of each patient."""
    folder.mkdir(parents=True)
    rng = random.Random(str(hue))
    rows = []
    for number in range(count):
        image = Image.new("RGB", (side + 20, side), hue)
        draw = ImageDraw.Draw(image)
        x, y = rng.randint(10, side - 30), rng.randint(10, side - 30)
        draw.ellipse((x, y, x + 18, y + 12 + number % 7), fill=(240, 60 + number, 80))
        image.save(folder / f"{number:02d}.png")
        rows.append(
            {"image": f"{number:02d}.png", "caption": "a polyp on the wall", "patient": f"p{number // 2}"}
        )
    if columns:
        with (folder / "images.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, columns, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)
    return folder


@dataclass
class Made:
    """A made study."""

    out: Path
    sealed: Path
    facts: dict[str, Any]
    key: Key
    commitment: str

    def answer(self, rater: str, path: Path, choose: Choose, questions: int = 3) -> Path:
        """Write a rater's answers as the form does."""
        names = [question.name for question in self.key.questions]
        rows = [["study", "key", "rater", "position", "id", "answer", *names, "check"]]
        for position, showing in enumerate(self.key.raters[rater], 1):
            level = choose(self.key.images[showing.image], showing)
            start = [self.key.study, self.commitment, rater, position, showing.id, level]
            cells = list(map(str, [*start, *(questions for _name in names)]))
            rows.append([*cells, str(zlib.crc32("|".join(cells).encode()))])
        path.write_bytes(("\r\n".join(map(",".join, rows)) + "\r\n").encode())
        return path


def small_study(folder: Path, **changes: Any) -> Made:
    """Make a study of 10 real, 10 nearby and 10 faraway drawings for two raters."""
    plan: dict[str, Any] = {
        "real": draw_folder(folder / "real", 24, (180, 100, 80), 128, PATIENTS),
        "synthetic": {
            "nearby": draw_folder(folder / "nearby", 12, (180, 100, 90), columns=CAPTIONS),
            "faraway": draw_folder(folder / "faraway", 12, (90, 140, 80), columns=CAPTIONS),
        },
        "per_group": 10,
        "raters": 2,
        "title": "Polyps, <read> & told",
    }
    out, sealed = folder / "forms", folder / "forms-sealed"
    facts = make_study(Plan(**(plan | changes)), out, sealed)
    return Made(out, sealed, facts, *read_key(sealed))
