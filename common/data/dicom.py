"""The door `dicom`: a folder of DICOM files at any depth, as a PACS or a research export writes it.

One record a frame. The patient is PatientID, at a site through its own keyed hash (`key`), so that the
id itself gets into no file of ours. The caption comes from a template over tags that name nobody
(`data.caption`), or from a CSV with columns SOPInstanceUID and caption (`data.table`; several rows, several
captions). Reports, plans, directories and other files without pixels are left aside and named.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic.common.data.dicom_pixels import frames_of, read_header
from polyclinic.common.data.images import UnusableImage, is_dicom
from polyclinic.common.data.table import Problem, Row, Table, assemble
from polyclinic.common.data.tabular import need_columns, read_rows
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.settings import DataSettings

# Attributes a caption may be made of: what was done and to which part, never who or when.
CAPTION_TAGS = frozenset(
    [
        "Modality",
        "BodyPartExamined",
        "ViewPosition",
        "Laterality",
        "ImageLaterality",
        "PatientPosition",
        "PatientOrientation",
        "PatientSex",
        "AnatomicRegionSequence",
        "ContrastBolusAgent",
        "ScanningSequence",
        "SequenceVariant",
        "MRAcquisitionType",
        "AcquisitionDeviceProcessingDescription",
        "SliceThickness",
        "RepetitionTime",
        "EchoTime",
        "KVP",
    ]
)
LABEL_TAGS = ("Modality", "BodyPartExamined", "ViewPosition", "PatientSex")
_FIELD = re.compile(r"\{(\w+)\}")


def fields_of(template: str) -> list[str]:
    """Name the tags of a caption template.

    Raises:
        ValueError: A tag that may name a person or a day, or braces that are no field.
    """
    names = _FIELD.findall(template)
    for name in names:
        if name not in CAPTION_TAGS:
            raise ValueError(
                f"{{{name}}} may not be in a caption; choose of {', '.join(sorted(CAPTION_TAGS))}"
            )
    if set(_FIELD.sub("", template)) & set("{}"):
        raise ValueError("braces hold the keyword of one DICOM attribute each, such as {Modality}")
    return names


def files(folder: Path, data: DataSettings) -> list[Path]:
    """The table of captions, where there is one."""
    return [] if data.caption else [folder / data.table]


def read(folder: Path, data: DataSettings, key: bytes | None) -> Table:
    """Read the headers of every file of a folder. See `table.py` for the protocol.

    Args:
        folder: Data folder.
        data: Says where captions come from.
        key: The site's own; None keeps PatientID as it is, for public collections.

    Raises:
        BadInput: No such folder, no caption source, no DICOM file in it.
    """
    from polyclinic.common.progress import track

    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; name the folder of the DICOM files")
    tables = files(folder, data)
    captions = _captions(tables[0]) if tables else None
    problems: list[Problem] = []
    rows: list[Row] = []
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() and path not in tables)
    with track(f"read headers of {folder.name}", len(paths)) as advance:
        for path in paths:
            rows.extend(_rows(path, folder, data, captions, key, problems))
            advance()
    if not rows and not [problem for problem in problems if not problem.skipped]:
        raise BadInput(f"{folder}: no DICOM image is in it; name the folder of the export")
    table = assemble(rows, folder, tables) if rows else Table([], [], tables)
    if captions:  # what no image took
        what = (
            f"{len(captions)} SOPInstanceUIDs with captions are not in {folder}, e.g. {next(iter(captions))}"
        )
        fix = "nothing, unless they should be"
        problems.append(Problem("no-image-file", str(tables[0]), what, fix, skipped=True))
    return Table(table.records, problems + table.problems, tables)


def _captions(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise BadInput(
            f"{path}: no such file; DICOM needs captions: a CSV with columns SOPInstanceUID and caption, or "
            'a template in the study, such as data.caption = "{Modality} of the {BodyPartExamined}"'
        )
    columns, rows = read_rows(path)
    need_columns(path, columns, "SOPInstanceUID", "caption")
    found: dict[str, list[str]] = {}
    for _, row in rows:
        found.setdefault(row["SOPInstanceUID"], []).append(row["caption"])
    return found


def _rows(
    path: Path,
    folder: Path,
    data: DataSettings,
    captions: dict[str, list[str]] | None,
    key: bytes | None,
    problems: list[Problem],
) -> Iterator[Row]:
    image = str(path.relative_to(folder))
    if folder.resolve() not in path.resolve().parents:
        what = f"{image} lies outside {folder}"
        problems.append(Problem("outside", str(path), what, "copy it into the folder", image))
        return
    try:
        if not path.is_file() or not is_dicom(path):  # opening a pipe would wait for ever
            fix = "nothing, unless it should be an image"
            problems.append(Problem("not-an-image", str(path), "not a DICOM file", fix, image, skipped=True))
            return
        header = read_header(path)
        frames = frames_of(header, path)
    except UnusableImage as error:
        skipped = error.code == "not-an-image"
        problems.append(Problem(error.code, str(path), error.what, error.fix, image, skipped=skipped))
        return
    except OSError as error:
        what = f"unreadable image ({error.strerror})"
        problems.append(Problem("unreadable", str(path), what, "let this user read it", image))
        return
    number = _text(header, "PatientID")
    patient = pseudonym(number, key) if number and key else number
    texts = [_fill(data.caption, header)]
    if captions is not None:
        texts = captions.pop(_text(header, "SOPInstanceUID"), [""])
    labels = {name: _text(header, name) for name in LABEL_TAGS if _text(header, name)}
    for frame in range(frames):
        for text in texts:
            yield Row(str(path), image, text, patient, "", labels, str(frame) if frames > 1 else "")


def pseudonym(patient: str, key: bytes) -> str:
    """Name a patient by a keyed hash (HMAC-SHA-256, 128 bits): nobody without the key can undo or test it."""
    return hmac.new(key, patient.encode(), hashlib.sha256).hexdigest()[:32]


def _text(header: Any, name: str) -> str:
    value = header.get(name)
    if value is None:
        return ""
    many = isinstance(value, list) or type(value).__name__ == "MultiValue"
    return " ".join("/".join(str(item) for item in value).split() if many else str(value).split())


def _fill(template: str, header: Any) -> str:
    """Put a file's values into the template; what is absent leaves no gap."""
    filled = _FIELD.sub(lambda match: _text(header, match[1]), template)
    return re.sub(r"\s+([,.;:])", r"\1", " ".join(filled.split())).strip(" ,;:")
