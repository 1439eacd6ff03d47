"""From a run's checkpoint to a generator that anyone can use."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from polyclinic.common.device import pick_device
from polyclinic.common.files import naming_full_disk
from polyclinic.common.generators.base import BaseFiles, Family, load_family
from polyclinic.common.refusals import BadInput
from polyclinic.common.stored import read_stored
from polyclinic.common.study import Resolved
from polyclinic.server.app import load_resolved
from polyclinic.server.checkpoints import load_checkpoint, rounds_done
from polyclinic.server.evaluation.judge import load_state, picture


def check_run(run_dir: Path) -> None:
    """Refuse a folder that is no run.

    Raises:
        BadInput: Names the folder and what a run looks like.
    """
    if not (run_dir / "study.json").is_file() or not rounds_done(run_dir):
        raise BadInput(
            f"{run_dir}: not a run; name a folder under `runs/` that has study.json and checkpoints"
        )


def open_generator(run_dir: Path, number: int | None) -> tuple[Resolved, Family]:
    """Load a run's generator with its encoders.

    Args:
        run_dir: The run.
        number: Round; None for the last.

    Raises:
        BadInput: No such run or round, or the base is no longer there.
    """
    check_run(run_dir)
    done = rounds_done(run_dir)
    number = done[-1] if number is None else number
    if number not in done:
        raise BadInput(f"{run_dir}: has no round {number}; its rounds are {done[0]} to {done[-1]}")
    resolved = load_resolved(run_dir)
    place = run_dir / "base.json"
    files = read_stored(place, BaseFiles, "put the right one back, or run the study anew")
    for path in files.paths:
        if not path.exists():
            raise BadInput(f"{run_dir}: its base is no longer at {path}; put it back, or correct {place}")
    study = resolved.study
    device = pick_device(study.training.device)
    family = load_family(study, files, device=device)
    if family.base_hash != resolved.base_hash:
        raise BadInput(
            f"{files.vae or files.pipeline}: another base than the run was trained on; put the right one back"
        )
    load_state(family, load_checkpoint(run_dir, number).average)
    return resolved, family


def write_images(folder: Path, images: Tensor, prompts: list[str]) -> None:
    """Save drawn images one by one as a data folder: PNG files and `images.csv` with their prompts.

    Args:
        folder: A new one; it appears whole or not at all.
        images: `[n, 3, H, W]` in [0, 1].
        prompts: Prompt of each.

    Raises:
        BadInput: The folder exists, or the disk is full.
    """
    with _new_folder(folder) as temporary, naming_full_disk(folder):
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(["image", "caption"])
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True), 1):
            name = f"{number:0{len(str(len(images)))}d}.png"
            picture(image[None], 1).save(temporary / name)
            rows.writerow([name, prompt])
        (temporary / "images.csv").write_text(table.getvalue(), encoding="utf-8")


def export(family: Family, folder: Path, *, merged: bool = False) -> None:
    """Save what plain diffusers loads, safetensors only, whole or not at all.

    Args:
        family: With the state to export.
        folder: A new one. MSDM's whole pipeline goes there, or a large model's adapters.
        merged: A large model's whole pipeline, its adapters added to the base's weights.

    Raises:
        BadInput: The folder exists.
    """
    with _new_folder(folder) as temporary:
        family.save(temporary, merged=merged)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    if folder.exists():
        raise BadInput(f"{folder} exists; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
