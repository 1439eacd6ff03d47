"""Cut single images out of sample sheets and make them part of the page as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from polyclinic.common.refusals import BadInput
from polyclinic.server.report.metrics import SampleSheet

# Larger images are shown smaller than they are, so that a page of them still travels by mail.
LARGEST_SHOWN = 256
AGAIN = "remove the round's file from judgements/ and run with --resume: it is drawn and judged again"


def cut(run_dir: Path, sheet: SampleSheet, columns: int) -> list[list[str]]:
    """Cut the first draws of every prompt out of a sheet.

    Args:
        run_dir: The run directory.
        sheet: The sheet, at a path inside the run directory.
        columns: How many draws of each prompt are wanted.

    Returns:
        Data URIs of PNGs, [prompt][draw].

    Raises:
        BadInput: The sheet lies outside the run, is missing, is not an image, or has another size.
    """
    path = run_dir / sheet.path
    if not path.resolve().is_relative_to(run_dir.resolve()):
        raise BadInput(f"{sheet.path}: a sample sheet must lie inside {run_dir}; correct metrics.json")
    size = sheet.image_size
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except FileNotFoundError as error:
        raise BadInput(f"{path}: the sample sheet is missing; {AGAIN}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise BadInput(f"{path}: not a readable image; {AGAIN}") from error
    if picture.size != (sheet.columns * size, sheet.rows * size):
        raise BadInput(
            f"{path}: is {picture.width} x {picture.height} px, not {sheet.columns} x {sheet.rows} images of "
            f"{size} px; {AGAIN}"
        )
    return [
        [data_uri(picture.crop((c * size, r * size, (c + 1) * size, (r + 1) * size))) for c in range(shown)]
        for r in range(sheet.rows)
        for shown in (min(columns, sheet.columns),)
    ]


def data_uri(picture: Image.Image) -> str:
    """Encode an image as a PNG data URI, no larger than `LARGEST_SHOWN` a side."""
    if max(picture.size) > LARGEST_SHOWN:
        picture = picture.copy()
        picture.thumbnail((LARGEST_SHOWN, LARGEST_SHOWN), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def spread(items: list[int], most: int) -> list[int]:
    """Keep the first, the last, and evenly spaced items between, at most `most` of them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
