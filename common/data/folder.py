"""A folder with a CSV: columns image, caption, patient, and optionally site and labels.

Several rows with the same image are several captions of that image. Every other column is a label.
"""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from polyclinic.common.data.table import Record
from polyclinic.common.refusals import BadInput

REQUIRED = ("image", "caption")


def read_folder(folder: Path, table: str = "images.csv", *, unit: str = "patient") -> list[Record]:
    """Read the table of a data folder; images stay on disk.

    Args:
        folder: Data folder; image paths are relative to it.
        table: Name of its CSV file.
        unit: `patient`, or `image` where there are no patient ids.

    Raises:
        BadInput: A missing file or column, an empty caption, an image that is not there, or a
            patient on two sites; names file, row and fix.
    """
    path = folder / table
    if not path.is_file():
        raise BadInput(
            f"{path}: no such file; the data folder needs a CSV with columns image, caption, patient"
        )
    columns, rows = _read_rows(path)
    for column in (*REQUIRED, *(["patient"] if unit == "patient" else [])):
        if column not in columns:
            hint = '; or set data.unit = "image" in the study' if column == "patient" else ""
            raise BadInput(f"{path}: column `{column}` is missing; add it to the header{hint}")
    if unit == "image" and "patient" in columns:
        raise BadInput(
            f'{path}: has a column `patient`, but the study protects single images (data.unit = "image"), '
            "which is less; ask for a study that protects patients, or take the column out if it names none"
        )
    inside = folder.resolve()
    captions: dict[Path, list[str]] = {}
    first: dict[Path, tuple[int, dict[str, str]]] = {}
    for number, row in rows:
        image = row["image"]
        if not image:
            raise BadInput(f"{path}, row {number}: the image is empty; name its file or remove the row")
        if not row["caption"]:
            raise BadInput(
                f"{path}, row {number}: the caption of {image} is empty; write one or remove the row"
            )
        # One file has one patient and one site, however its path is written.
        file_path = (folder / image).resolve()
        known = first.setdefault(file_path, (number, row))[1]
        if unit == "patient" and known["patient"] != row["patient"]:
            raise BadInput(
                f"{path}, row {number}: image {image} belongs to patients {known['patient']} and "
                f"{row['patient']}; an image has one patient"
            )
        if known.get("site", "") != row.get("site", ""):
            raise BadInput(
                f"{path}, row {number}: image {image} is on two sites, {known['site']} and {row['site']}; "
                "give each patient one site"
            )
        captions.setdefault(file_path, []).append(row["caption"])
    records: list[Record] = []
    for file_path, (number, row) in first.items():
        image = row["image"]
        if not file_path.is_file():
            raise BadInput(
                f"{path}, row {number}: a caption without its image: {image} is not in {folder}; "
                "add the file or remove the row"
            )
        if inside not in file_path.parents:
            raise BadInput(f"{path}, row {number}: {image} lies outside {folder}; copy it into the folder")
        labels = {k: v for k, v in row.items() if k not in ("image", "caption", "patient", "site")}
        patient = row["patient"] if unit == "patient" else image
        if not patient:
            raise BadInput(f"{path}, row {number}: the patient of {image} is empty; fill it in")
        records.append(
            Record(patient, file_path, tuple(captions[file_path]), row.get("site") or None, labels)
        )
    if not records:
        raise BadInput(f"{path}: has no rows; add at least one image")
    one_site_each(records, str(path))
    return records


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a CSV: its columns, and each row with the line it ends on; cells without outer spaces.

    A patient id with a stray space must not become a second patient.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows = [
                (reader.line_num, {key: cell.strip() for key, cell in row.items() if isinstance(cell, str)})
                for row in reader
            ]
            return list(reader.fieldnames or []), rows
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason}); save the table as UTF-8") from error
    except csv.Error as error:
        raise BadInput(
            f"{path}: not a CSV table ({error}); write it again as comma-separated text"
        ) from error


def one_site_each(records: list[Record], source: str) -> None:
    """Refuse a table in which a patient is on two sites: their epsilons would add up.

    Raises:
        BadInput: Names the patient and both sites.
    """
    home: dict[str, str | None] = {}
    for record in records:
        if home.setdefault(record.patient, record.site) != record.site:
            raise BadInput(
                f"{source}: patient {record.patient} is on two sites, {home[record.patient]} and "
                f"{record.site}; "
                "give each patient one site"
            )


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        BadInput: The file is not an image that can be read whole, or holds more than 8 bits a pixel.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                # Pillow would cut every value above 255 to white.
                raise BadInput(f"{path}: more than 8 bits a pixel ({image.mode}); save it with 8 bits")
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: unreadable image ({error}); replace the file or remove its row") from error
