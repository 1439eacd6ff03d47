"""Where a reader study's images come from, and the one treatment that all of them get.

Whatever could tell real from synthetic without looking at what is shown is taken away: name, metadata,
orientation tag, size, shape and the traces of the last compression. Every image is cut to a square,
resized to the side of the smallest one, so that none is enlarged, and written as the same kind of JPEG.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from polyclinic.common.data.images import open_image
from polyclinic.common.data.sources import read_records
from polyclinic.common.progress import track
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings
from polyclinic.common.study import Resolved

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
REAL = "real"
QUALITY = 92
LARGEST = 1024  # a larger side needs `--size`: a form of 100 such images has about 25 MB
SMALLEST = 32
MOSTLY = 0.2  # of a group's prompts may have words of their own


@dataclass(frozen=True)
class Candidate:
    """An image that may be shown.

    Attributes:
        path: File that holds it.
        patient: Whose it is; None where the source does not say.
        prompt: What it shows in words, where the source says so.
        box: Left, top, right, bottom in the file, where that is a sheet of several images.
    """

    path: Path
    patient: str | None = None
    prompt: str | None = None
    box: tuple[int, int, int, int] | None = None

    @property
    def name(self) -> str:
        """How the local table of sources calls it."""
        return str(self.path) if self.box is None else f"{self.path}, at {self.box[0]},{self.box[1]}"


@dataclass(frozen=True)
class Treatment:
    """What every image goes through: side in pixels, `crop` or `pad`, and whether colour is dropped."""

    size: int
    fit: str
    gray: bool

    def apply(self, candidate: Candidate) -> Shown:
        """Treat an image; nothing of its file but its pixels is left."""
        from polyclinic.common.data.preprocess import make_square  # torch: only `make` waits for it

        image = open_image(candidate.path)
        if candidate.box:
            image = image.crop(candidate.box)
        square = make_square(image, self.size, self.fit)
        pixels = np.asarray(square.convert("L" if self.gray else "RGB"))
        colourless = pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all())
        digest = hashlib.sha256(pixels.tobytes()).digest()
        return Shown((_encode(pixels), _encode(pixels)), colourless, digest)


@dataclass(frozen=True)
class Shown:
    """A treated image: its JPEG for a first showing and for a repeat, and what `make` must know of it.

    Attributes:
        showings: The two files, each with noise of its own that nobody sees: by equal files, whoever looks
            into a form would find the repeats.
        colourless: Whether every pixel is exactly gray, as films are and a generator's colours are not.
        digest: SHA-256 of the pixels before the noise.
    """

    showings: tuple[bytes, bytes]
    colourless: bool
    digest: bytes


def _encode(pixels: np.ndarray) -> bytes:
    """Write JPEG after moving each pixel by at most one level, all channels alike."""
    noise = np.random.default_rng(secrets.randbits(128)).integers(-1, 2, pixels.shape[:2], dtype=np.int16)
    moved = pixels + (noise if pixels.ndim == 2 else noise[..., None])
    # An exactly black or white pixel stays: a speckled border would look like no border of a film.
    moved = np.where((pixels == 0) | (pixels == 255), pixels, moved)
    data = io.BytesIO()
    Image.fromarray(moved.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=QUALITY, subsampling=0)
    return data.getvalue()


def read_candidates(source: Path, table: str = "images.csv") -> list[Candidate]:
    """Read a data folder with its table, a plain folder of image files, or a run's last sample sheet.

    Raises:
        BadInput: There is nothing to read, or it cannot be read; names path and fix.
    """
    if not source.is_dir():
        raise BadInput(f"{source}: no such folder; name a folder of images, or a run folder")
    if (source / table).is_file():
        with (source / table).open(newline="", encoding="utf-8-sig", errors="replace") as file:
            unit = "patient" if "patient" in next(csv.reader(file), []) else "image"
        records = read_records(DataSettings.model_validate({"table": table, "unit": unit}), source)
        return [Candidate(r.image, r.patient if unit == "patient" else None, r.captions[0]) for r in records]
    if (source / "study.json").is_file():
        return _cells(source)
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise BadInput(f"{source}: holds no images and no {table}; name a folder of images, or a run folder")
    return [Candidate(path) for path in files]


def _cells(run: Path) -> list[Candidate]:
    """Find the single images on the last sample sheet of a run: a row a prompt, without gaps."""
    sheets = sorted((run / "samples").glob("round-*.png"))
    if not sheets:
        raise BadInput(f"{run}: this run has no sample sheet yet; wait for its first evaluation")
    try:
        study = Resolved.model_validate_json((run / "study.json").read_bytes()).study
    except ValidationError as error:
        raise BadInput(f"{run / 'study.json'}: not a resolved study; name a run folder") from error
    size, prompts = study.data.image_size, study.evaluation.prompts
    width, height = _size(sheets[-1])
    if height != len(prompts) * size or width % size:
        raise BadInput(f"{sheets[-1]}: not a sheet of {len(prompts)} rows of {size} px; evaluate it again")
    return [
        Candidate(sheets[-1], None, prompt.text, (x, y * size, x + size, (y + 1) * size))
        for y, prompt in enumerate(prompts)
        for x in range(0, width, size)
    ]


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: unreadable image ({error}); replace the file") from error


def draw(
    candidates: Sequence[Candidate], count: int, group: str, source: Path, rng: random.Random
) -> list[Candidate]:
    """Draw images, at most one a patient, so that they are independent of each other.

    Raises:
        BadInput: There are too few.
    """
    by_patient: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_patient.setdefault(candidate.patient or candidate.name, []).append(candidate)
    if len(by_patient) < count:
        what = "patients (one image each is shown)" if candidates[0].patient else "images"
        raise BadInput(
            f"{group}: {source} has {len(by_patient)} {what}, but {count} are to be shown; "
            f"lower --per-group to {len(by_patient)} or add images"
        )
    return [rng.choice(by_patient[name]) for name in rng.sample(sorted(by_patient), count)]


def choose_size(candidates: Sequence[Candidate], fit: str, asked: int | None) -> int:
    """Choose the side that all images get: no larger than the smallest, so that none is enlarged.

    Raises:
        BadInput: The asked side is larger than that, or too small to look at.
    """
    side = min if fit == "crop" else max
    smallest, which = min(
        (
            (side(c.box[2] - c.box[0], c.box[3] - c.box[1]) if c.box else side(_size(c.path)), c.name)
            for c in candidates
        ),
    )
    if asked is not None and asked > smallest:
        raise BadInput(
            f"--size {asked}: {which} has only {smallest} px, and an enlarged image looks soft, which would "
            f"tell the groups apart; ask for at most {smallest}"
        )
    size = min(smallest, LARGEST) if asked is None else asked
    if size < SMALLEST:
        raise BadInput(f"{which}: {size} px a side is too small to be read; at least {SMALLEST} are needed")
    return size


def treat_all(groups: dict[str, list[Candidate]], treatment: Treatment) -> dict[str, list[Shown]]:
    """Treat every image of every group alike.

    Raises:
        BadInput: Two images are the same after the treatment: one group has a copy of another's.
    """
    made: dict[str, list[Shown]] = {}
    seen: dict[bytes, Candidate] = {}
    with track("prepare images", sum(map(len, groups.values()))) as advance:
        for group, candidates in groups.items():
            for candidate in candidates:
                shown = treatment.apply(candidate)
                other = seen.setdefault(shown.digest, candidate)
                if other is not candidate:
                    raise BadInput(
                        f"{candidate.name} and {other.name} are the same image; take one of them away"
                    )
                made.setdefault(group, []).append(shown)
                advance()
    return made


def gray_groups(made: dict[str, list[Shown]]) -> list[str]:
    """Name the groups without any colour, where another group has some: the rest must lose theirs."""
    without = [group for group, images in made.items() if all(image.colourless for image in images)]
    return without if len(without) < len(made) else []


def giveaways(groups: dict[str, list[Candidate]], made: dict[str, list[Shown]], prompts: bool) -> list[str]:
    """Name what would still tell real from synthetic without looking at what is shown."""
    found = []
    gray = {group: sum(image.colourless for image in images) for group, images in made.items()}
    if any(gray.values()) and 0 in gray.values():
        some = ", ".join(f"{group}: {count} of {len(made[group])}" for group, count in gray.items() if count)
        found.append(f"only some groups have images without any colour ({some}); --gray takes it from all")
    if prompts:
        said = {group: [_words(c.prompt or "") for c in candidates] for group, candidates in groups.items()}
        for group, ours in said.items():
            others = set[str]().union(*(words for other in said if other != group for words in said[other]))
            strange = sum(not words <= others for words in ours)
            if strange > MOSTLY * len(ours):
                found.append(
                    f"{strange} of {len(ours)} prompts of {group} have words that no prompt of another group "
                    "has: whoever reads the wording can tell this group without looking at the image"
                )
    return found


def _words(prompt: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", prompt.lower()))
