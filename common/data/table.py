"""The one table every data source becomes: (patient, image, captions, labels).

A *door* reads one kind of source: one small file with `files(folder, data)`, which finds its table files,
and `read(folder, data, key)`, which gives a `Table`; `sources.py` lists them all. A door reads tables and
headers, never pixels, and yields one `Row` a caption; `assemble` turns rows into records. What is wrong
with a single row, image or patient is a `Problem`, not an exception, so that `polyclinic-client check` can
show all of them; whoever trains reads strictly (`sources.read_records`) and stops at the first. A table that
cannot be read as a whole is a `BadInput`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from polyclinic.common.refusals import BadInput

# Halves of a character, which JSON can write and no text encoder reads; `check` finds what takes their place.
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """One image with what is known about it. The image stays on disk until it is encoded.

    Attributes:
        patient: Privacy unit this image belongs to (an image id where no patient ids exist).
        image: Path of the file that holds the image.
        captions: Captions of this image, in the source's order; several captions are views of
            the same image, not more data.
        site: Name of the hospital that holds it, where the source says so.
        labels: Label name to value; used for splits and by the coordinator's evaluation, never
            by training.
        part: Which image of a file that holds several: the frame of a DICOM file, the row of a
            parquet or arrow file, both from 0. Empty where the file is one image.
    """

    patient: str
    image: Path
    captions: tuple[str, ...]
    site: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    part: str = ""

    @property
    def name(self) -> str:
        """File and part in words, for messages."""
        return f"{self.image} [{self.part}]" if self.part else str(self.image)


@dataclass(frozen=True, slots=True)
class Row:
    """One caption of one image as a source has it.

    Attributes:
        where: Table and row, for messages.
        image: Path relative to the data folder.
        caption: Without outer spaces.
        patient: Patient id; "" is a mistake.
        site: Name of the site, or "".
        labels: Label name to value.
        part: As in `Record`.
    """

    where: str
    image: str
    caption: str
    patient: str
    site: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    part: str = ""


@dataclass(frozen=True)
class Problem:
    """Something wrong with one row, image or patient.

    Attributes:
        code: A code of `client/check/codes.py`.
        where: File, and row if it has one.
        what: What is wrong.
        fix: What a person does about it.
        image: Image it concerns, relative to the folder; "" for none.
        patient: Patient it concerns; "" for none.
        skipped: The source is whole without it (a report between images, a row of an archive that was
            not downloaded): reading goes on.
    """

    code: str
    where: str
    what: str
    fix: str
    image: str = ""
    patient: str = ""
    skipped: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class Table:
    """What a door read.

    Attributes:
        records: Every image that can be named whole.
        problems: What is wrong with the rest, in the source's order.
        files: The table files that were read; an approval watches them.
    """

    records: list[Record]
    problems: list[Problem]
    files: list[Path]


def assemble(rows: Iterable[Row], folder: Path, files: list[Path]) -> Table:
    """Make records of rows: one an image, with all its captions.

    Refused as problems: an image that is not there or lies outside the folder, also through a link; an
    empty caption, image or patient; an image of two patients or sites; a patient on two sites. One id on two
    images makes them one privacy unit, which protects no less.

    Args:
        rows: One a caption.
        folder: Data folder; nothing outside it is read.
        files: The table files.

    Raises:
        BadInput: There is no row at all.
    """
    source = str(files[0]) if files else str(folder)
    inside = folder.resolve()
    found: dict[tuple[Path, str], tuple[Row, list[str]]] = {}
    problems: list[Problem] = []
    seen = False
    for row in rows:
        seen = True
        if _HALF.search(row.caption + row.patient + row.site):
            caption, patient, site = (_HALF.sub("\ufffd", t) for t in (row.caption, row.patient, row.site))
            row = replace(row, caption=caption, patient=patient, site=site)
        if not row.image:
            problems.append(
                Problem("empty-image", row.where, "the image is empty", "name its file or remove the row")
            )
            continue
        if not row.caption:
            problems.append(
                Problem(
                    "empty-caption",
                    row.where,
                    f"the caption of {row.image} is empty",
                    "write one or remove the row",
                    row.image,
                )
            )
            continue
        # One file has one patient and one site, however its path is written.
        path = _resolve(folder, row.image)
        if path is None:
            problems.append(_missing(row, folder))
            continue
        known, captions = found.setdefault((path, row.part), (row, []))
        if known.patient != row.patient:
            what = f"image {row.image} belongs to patients {known.patient} and {row.patient}"
            problems.append(Problem("two-patients", row.where, what, "an image has one patient", row.image))
        elif known.site != row.site:
            what = f"image {row.image} is on two sites, {known.site} and {row.site}"
            problems.append(Problem("two-sites", row.where, what, "give each patient one site", row.image))
        captions.append(row.caption)
    if not seen:
        raise BadInput(f"{source}: has no rows; add at least one image")
    records: list[Record] = []
    exists: dict[Path, bool] = {}
    shared: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for path, part in list(found):
        row, captions = found.pop((path, part))
        if path not in exists:
            exists[path] = path.is_file()
        if not exists[path]:
            problems.append(_missing(row, folder))
        elif inside not in path.parents:
            what = f"{row.image} lies outside {folder}"
            problems.append(Problem("outside", row.where, what, "copy it into the folder", row.image))
        elif not row.patient:
            what = f"the patient of {row.image} is empty"
            problems.append(Problem("empty-patient", row.where, what, "fill it in", row.image))
        else:
            # Many images have the same labels: one dictionary for all of them.
            labels = shared.setdefault(tuple(row.labels.items()), row.labels)
            records.append(Record(row.patient, path, tuple(captions), row.site or None, labels, part))
    return Table(records, problems + _two_sites(records, source), files)


def _resolve(folder: Path, image: str) -> Path | None:
    """Follow a name to its file; None where no file system could have such a name."""
    try:
        path = (folder / image).resolve()
        path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, links in a circle
        return None
    return path


def _missing(row: Row, folder: Path) -> Problem:
    shown = row.image if len(row.image) <= 200 else f"{row.image[:200]}..."
    what = f"a caption without its image: {shown} is not in {folder}"
    return Problem("no-image-file", row.where, what, "add the file or remove the row", row.image)


def _two_sites(records: list[Record], source: str) -> list[Problem]:
    """Name patients on two sites: their epsilons would add up."""
    home: dict[str, str | None] = {}
    found: dict[str, Problem] = {}
    for record in records:
        if home.setdefault(record.patient, record.site) != record.site:
            what = f"patient {record.patient} is on two sites, {home[record.patient]} and {record.site}"
            found.setdefault(
                record.patient,
                Problem("two-sites", source, what, "give each patient one site", patient=record.patient),
            )
    return list(found.values())


def patients_of(records: list[Record]) -> dict[str, list[Record]]:
    """Group records by patient, both in sorted order, so that the result is a function of the data only."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.patient, str(r.image), r.part)):
        groups.setdefault(record.patient, []).append(record)
    return groups
