"""One look at one image: what is wrong with it, and what it resembles. Runs in a worker process."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageStat
from scipy import ndimage

from polyclinic.client.check.burned_in import LONGEST, text_lines
from polyclinic.client.check.identifiers import in_dicom, in_photo
from polyclinic.common.data.images import FORMATS, TABLES, UnusableImage, is_dicom, open_image

# Raise it whenever a look at the same image would say something else.
VERSION = 2
THUMB = 32
FINE = THUMB * THUMB
SMALLEST, LONGEST_SHAPE = 16, 4.0
FLAT = 2.0
SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "MPO": {".jpg", ".jpeg", ".mpo"},
    "PNG": {".png"},
    "TIFF": {".tif", ".tiff"},
    "BMP": {".bmp"},
    "GIF": {".gif"},
    "WEBP": {".webp"},
    "PPM": {".ppm", ".pgm", ".pbm", ".pnm"},
}
Said = list[tuple[str, str]]


def look(path: Path, part: str) -> dict[str, Any]:
    """Examine one image.

    Args:
        path: Its file.
        part: Frame or row.

    Returns:
        JSON-safe: `found`, a list of (code, detail); and where it could be decoded `size`, `pixels` (hash of
        the decoded pixels), `hash` (64 bits) and `fine` (`FINE` signed bytes), both hexadecimal, to compare
        it by.
    """
    found: Said = []
    try:
        image = open_image(path, part)
        found += _of_the_file(path, part)
    except UnusableImage as error:
        return {"found": [(error.code, error.what)]}
    except MemoryError:
        return {"found": [("too-large", "does not fit into a worker's memory")]}
    width, height = image.size
    seen: dict[str, Any] = {"size": [width, height], "pixels": pixel_hash(image)}
    if min(width, height) < SMALLEST:
        return {"found": [*found, ("too-small", f"{width} x {height} pixels")], **seen}
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        found.append(("extreme-shape", f"{width} x {height} pixels"))
    gray = image.convert("L")
    spread = max(ImageStat.Stat(image).stddev)
    if spread < FLAT:
        found.append(("blank", f"standard deviation {spread:.1f} of 255"))
    else:
        seen |= resemblance(gray)
        gray.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
        lines = text_lines(np.asarray(gray))
        if lines:
            found.append(
                ("burned-in-text", f"{len(lines)} lines, the first at {_place(lines[0], gray.size)}")
            )
    return {"found": found, **seen}


def _place(box: tuple[int, int, int, int], size: tuple[int, int]) -> str:
    across, down = (box[1] + box[3]) / 2 / size[0], (box[0] + box[2]) / 2 / size[1]
    names = (
        ("left", "centre", "right")[min(2, int(3 * across))],
        ("top", "middle", "bottom")[min(2, int(3 * down))],
    )
    return f"{names[1]} {names[0]}"


def _of_the_file(path: Path, part: str) -> Said:
    """What the file around the pixels says: its format and its identifiers."""
    if path.suffix in TABLES and part:
        return []
    if is_dicom(path):
        from polyclinic.common.data.dicom_pixels import read_header

        header = read_header(path)
        attributes = in_dicom(header)
        found = [("dicom-identifiers", ", ".join(attributes))] if attributes else []
        if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
            found.append(("burned-in-text", "the header says so (BurnedInAnnotation)"))
        return found
    found = []
    with Image.open(path, formats=FORMATS) as image:
        suffixes = SUFFIXES.get(image.format or "", set())
        if path.suffix.lower() not in suffixes:
            found.append(("wrong-extension", f"{image.format} named {path.suffix or 'without a suffix'}"))
        located, entries = in_photo(image)
    if located:
        found.append(("photo-location", "EXIF GPS"))
    if entries:
        found.append(("photo-metadata", ", ".join(entries)))
    return found


def pixel_hash(image: Image.Image) -> str:
    """Hash decoded pixels: equal for one picture in two lossless files."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:32]


def resemblance(gray: Image.Image) -> dict[str, str]:
    """Take what near-duplicates share: a 64-bit difference hash, and the fine detail of a small grey copy.

    Bodies are alike, their detail is not: what a blur of 2 px keeps is taken off.
    """
    tiny = np.asarray(gray.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits((tiny[:, 1:] > tiny[:, :-1]).ravel())
    small = np.asarray(gray.resize((THUMB, THUMB), Image.Resampling.BOX), dtype=np.float32)
    fine = small - ndimage.gaussian_filter(small, 2)
    fine -= fine.mean()
    fine *= 127 / max(float(np.abs(fine).max()), 1e-6)
    return {"hash": bits.tobytes().hex(), "fine": fine.round().astype(np.int8).tobytes().hex()}
