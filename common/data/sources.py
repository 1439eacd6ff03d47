"""Every door by its name in `data.source`. The server reads its reference through the same ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from polyclinic.common.data import dicom, folder, kvasir, medvqa, nih, rocov2
from polyclinic.common.data.table import Record, Table
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.settings import DataSettings

REFERENCE_MARK = "reference.json"


class Door(NamedTuple):
    """What a door's file offers; `table.py` has the protocol."""

    files: Callable[[Path, DataSettings], list[Path]]
    read: Callable[[Path, DataSettings, bytes | None], Table]


DOORS = {
    "folder": Door(folder.files, folder.read),
    "phantoms": Door(folder.files, folder.read),
    "medvqa-gi-2024": Door(medvqa.files, medvqa.read),
    "kvasir-vqa": Door(kvasir.files, kvasir.read),
    "rocov2": Door(rocov2.files, rocov2.read),
    "nih-chest-xray14": Door(nih.files, nih.read),
    "dicom": Door(dicom.files, dicom.read),
}


def table_files(data: DataSettings, folder: Path) -> list[Path]:
    """Find a source's table files, without reading them."""
    return DOORS[data.source].files(folder, data)


def read_table(data: DataSettings, folder: Path, key: bytes | None = None) -> Table:
    """Read a source with its problems.

    Args:
        data: Names the door.
        folder: Data folder.
        key: A site's own key for patient ids; None for public data.

    Raises:
        BadInput: The source as a whole cannot be read.
    """
    return DOORS[data.source].read(folder, data, key)


def read_records(data: DataSettings, folder: Path, key: bytes | None = None) -> list[Record]:
    """Read a source strictly: all of it, or a sentence.

    Raises:
        BadInput: The first problem, with file, row and fix.
    """
    return strict(read_table(data, folder, key))


def reference_settings(data: DataSettings, folder: Path) -> DataSettings:
    """Say how a reference is read: as the study's own data, or as what `polyclinic-simulate reference` wrote.

    Such a folder has each image's id in its column `patient`, whatever the study's unit.
    """
    if not (folder / REFERENCE_MARK).is_file():
        return data
    plain = {"source": "folder", "table": "images.csv", "unit": "patient", "caption": ""}
    return data.model_copy(update=plain)


def strict(table: Table) -> list[Record]:
    """Take a table's records where nothing is wrong with it.

    Raises:
        BadInput: Its first problem.
    """
    for problem in table.problems:
        if not problem.skipped:
            raise BadInput(str(problem))
    if not table.records:
        raise BadInput(f"{table.files[0] if table.files else 'the folder'}: no image can be used")
    return table.records
