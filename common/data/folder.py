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
        raise BadInput(f"{path}: no such file; the data folder needs a CSV with columns image, caption, patient")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for column in (*REQUIRED, *(["patient"] if unit == "patient" else [])):
            if column not in columns:
                hint = "; or set data.unit = \"image\" in the study" if column == "patient" else ""
                raise BadInput(f"{path}: column `{column}` is missing; add it to the header{hint}")
        rows = list(reader)
    captions: dict[str, list[str]] = {}
    first: dict[str, tuple[int, dict[str, str]]] = {}
    for number, row in enumerate(rows, start=2):
        image = row["image"]
        if not (row["caption"] or "").strip():
            raise BadInput(f"{path}, row {number}: the caption of {image} is empty; write one or remove the row")
        known = first.setdefault(image, (number, row))[1]
        if unit == "patient" and known["patient"] != row["patient"]:
            raise BadInput(
                f"{path}, row {number}: image {image} belongs to patients {known['patient']} and "
                f"{row['patient']}; an image has one patient"
            )
        captions.setdefault(image, []).append(row["caption"].strip())
    inside = folder.resolve()
    records: list[Record] = []
    for image, (number, row) in first.items():
        file_path = (folder / image).resolve()
        if not file_path.is_file():
            raise BadInput(
                f"{path}, row {number}: a caption without its image: {image} is not in {folder}; "
                "add the file or remove the row"
            )
        if inside not in file_path.parents:
            raise BadInput(f"{path}, row {number}: {image} lies outside {folder}; copy it into the folder")
        labels = {
            k: v for k, v in row.items() if k not in ("image", "caption", "patient", "site") and isinstance(v, str)
        }
        patient = row["patient"] if unit == "patient" else image
        if not patient:
            raise BadInput(f"{path}, row {number}: the patient of {image} is empty; fill it in")
        records.append(Record(patient, file_path, tuple(captions[image]), row.get("site") or None, labels))
    if not records:
        raise BadInput(f"{path}: has no rows; add at least one image")
    one_site_each(records, str(path))
    return records


def one_site_each(records: list[Record], source: str) -> None:
    """Refuse a table in which a patient is on two sites: their epsilons would add up.

    Raises:
        BadInput: Names the patient and both sites.
    """
    home: dict[str, str | None] = {}
    for record in records:
        if home.setdefault(record.patient, record.site) != record.site:
            raise BadInput(
                f"{source}: patient {record.patient} is on two sites, {home[record.patient]} and {record.site}; "
                "give each patient one site"
            )


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        BadInput: The file is not an image that can be read whole.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: unreadable image ({error}); replace the file or remove its row") from error
