"""Colonoscopy phantoms: drawn patients of three sites with known findings, for the demo and the tests.

Every picture is a function of (seed, patient id, image number) and of nothing else.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polyclinic.common.refusals import BadInput
from polyclinic.simulation.phantom_scene import QUADRANTS, SIZES, Attributes, Camera, Generator, Style, draw

__all__ = ["CLINICS", "COLUMNS", "Attributes", "Style", "attributes", "captions", "draw", "patient_style",
           "write_phantoms"]  # fmt: skip

# Raised whenever the same seed draws other pictures, so that a folder of older ones is not taken for new.
DRAWING = 1
COLUMNS = (
    "image", "caption", "patient", "site", "polyp", "polyp_size", "polyp_quadrant", "instrument", "overlay",
)  # fmt: skip


@dataclass(frozen=True)
class Clinic:
    """A site's endoscope and case mix.

    Attributes:
        camera: The endoscope.
        polyp: Probability of a polyp in an image.
        sizes: Probabilities of `SIZES`, given a polyp.
        instrument: Probability of an instrument.
        overlay: Probability of the text-overlay box.
    """

    camera: Camera
    polyp: float
    sizes: tuple[float, float, float]
    instrument: float
    overlay: float


CLINICS = {
    "north": Clinic(
        Camera("circle", extent=0.97, falloff=0.35, cast=(0.98, 0.97, 1.06), noise=0.010),
        polyp=0.50, sizes=(0.25, 0.35, 0.40), instrument=0.35, overlay=0.35,
    ),
    "coast": Clinic(
        Camera("octagon", extent=0.96, falloff=0.20, cast=(1.10, 0.96, 0.82), noise=0.014),
        polyp=0.60, sizes=(0.40, 0.35, 0.25), instrument=0.50, overlay=0.60,
    ),
    "valley": Clinic(
        Camera("circle", extent=1.18, falloff=0.50, cast=(0.92, 1.03, 0.88), noise=0.020),
        polyp=0.40, sizes=(0.30, 0.40, 0.30), instrument=0.40, overlay=0.45,
    ),
}  # fmt: skip


def attributes(rng: Generator, site: str) -> Attributes:
    """Draw what one image of a site shows.

    Args:
        rng: Source of randomness.
        site: Key of `CLINICS`.
    """
    clinic = CLINICS[site]
    polyp = rng.random() < clinic.polyp
    size, quadrant = str(rng.choice(SIZES, p=clinic.sizes)), str(rng.choice(QUADRANTS))
    return Attributes(
        polyp=polyp,
        polyp_size=size if polyp else "",
        polyp_quadrant=quadrant if polyp else "",
        instrument=rng.random() < clinic.instrument,
        overlay=rng.random() < clinic.overlay,
    )


def patient_style(rng: Generator, site: str) -> Style:
    """Draw what all images of one patient of a site share.

    Args:
        rng: Source of randomness.
        site: Key of `CLINICS`.
    """
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.08, 0.34)
    return Style(
        camera=CLINICS[site].camera,
        mucosa=(rng.uniform(0.86, 0.96), rng.uniform(0.58, 0.70), rng.uniform(0.46, 0.58)),
        lumen=(distance * math.cos(angle), distance * math.sin(angle)),
        folds=rng.uniform(1.3, 2.1),
        triangle=rng.uniform(0.05, 0.18),
        turn=rng.uniform(0, 2 * math.pi),
    )


def captions(shown: Attributes, rng: Generator) -> tuple[str, ...]:
    """Describe an image three times, in the manner of MedVQA-GI's prompts.

    Args:
        shown: What the image shows.
        rng: Chooses the wording.

    Returns:
        Three different captions, all true: one that states polyp, instrument and box, one about the
        polyp, and one about one or two of the three that is not about the polyp alone.
    """
    polyp = "a polyp" if shown.polyp else "no polyp"
    instrument = "an instrument" if shown.instrument else "no instrument"
    box = "a green/black box artefact" if shown.overlay else "no green/black box artefact"

    if shown.polyp:
        size, place = f"of size {shown.polyp_size}", f"in the {shown.polyp_quadrant}"
        about_polyp = ["containing a polyp", "with a polyp", f"with a polyp {size}", f"with a polyp {place}"]
        # Twice: it is the only wording that says everything there is to say about the polyp.
        about_polyp += [f"with a polyp {size} {place}"] * 2
    else:
        about_polyp = ["with no polyp", "not containing a polyp"]
    others = [
        f"with {instrument}",
        f"with {box}",
        "containing an instrument" if shown.instrument else "not containing an instrument",
        f"{'' if shown.overlay else 'not '}containing a green/black box artefact",
        f"with {polyp} and {instrument}",
        f"with {polyp} and {box}",
        f"with {instrument} and {box}",
    ]
    chosen = (f"with {polyp}, {instrument} and {box}", str(rng.choice(about_polyp)), str(rng.choice(others)))
    return tuple(f"Generate an image {words}." for words in chosen)


def write_phantoms(
    folder: Path,
    *,
    patients_per_site: int,
    seed: int,
    size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a folder of phantoms: `images/*.png`, the table `images.csv`, and `phantoms.json`.

    The table has the columns `COLUMNS` and one row for each caption of each image. The folder appears
    whole or not at all; one that already holds exactly these phantoms is left alone.

    Args:
        folder: Folder to make.
        patients_per_site: Patients of each of the sites in `CLINICS`; each has 1 to 6 images.
        seed: Not negative; names the whole set.
        size: Width and height of an image, pixels.
        on_progress: Told how many patients are done, and of how many.

    Raises:
        BadInput: The folder holds something else.
    """
    made = {"drawing": DRAWING, "patients_per_site": patients_per_site, "seed": seed, "size": size}
    if _holds(folder, made):
        return
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        (part / "images").mkdir(parents=True)
        _write(part, patients_per_site, seed, size, on_progress)
        (part / "phantoms.json").write_text(json.dumps(made, indent=2) + "\n")
        os.sync()  # once for thousands of small pictures, where one fsync each would take minutes on a disk
        try:
            part.rename(folder)
        except OSError:
            # Another process may have finished the same set meanwhile; then its folder is as good as ours.
            if not _holds(folder, made):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _holds(folder: Path, made: dict[str, int]) -> bool:
    """Tell whether a folder holds exactly these phantoms; refuse one that holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    note = folder / "phantoms.json"
    if note.is_file() and note.read_text() == json.dumps(made, indent=2) + "\n":
        return True
    raise BadInput(
        f"{folder} holds something other than these phantoms; name another folder, or delete this one"
    )


def _write(
    part: Path, patients_per_site: int, seed: int, size: int, on_progress: Callable[[int, int], None] | None
) -> None:
    """Draw every patient and write the pictures and the table."""
    patients = [
        (site, f"{site}-{number:04d}") for site in CLINICS for number in range(1, patients_per_site + 1)
    ]
    with (part / "images.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for done, (site, patient) in enumerate(patients, start=1):
            rng = _generator(seed, patient, 0)
            style, images = patient_style(rng, site), int(rng.integers(1, 7))
            for number in range(1, images + 1):
                rng = _generator(seed, patient, number)
                shown = attributes(rng, site)
                said = captions(shown, rng)
                name = f"images/{patient}-{number}.png"
                draw(rng, style, shown, size).save(part / name)
                row = {"image": name, "patient": patient, "site": site, **shown.labels()}
                table.writerows({**row, "caption": caption} for caption in said)
            if on_progress is not None:
                on_progress(done, len(patients))
        file.flush()
        os.fsync(file.fileno())


def _generator(seed: int, patient: str, image: int) -> Generator:
    """Seed a generator from (seed, patient, image), so that no patient's pictures depend on another's."""
    digest = hashlib.blake2b(patient.encode(), digest_size=16).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "big"), image])
