"""The door `folder`: a table (CSV, TSV or JSON Lines) beside its images.

Columns image, caption, patient, and optionally site; every other column is a label. Several rows with
the same image are several captions of that image. Hugging Face `imagefolder` metadata is such a table:
`data.table = "metadata.csv"` or "metadata.jsonl", whose column file_name is the image and text the caption.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from polyclinic.common.data.table import Row, Table, assemble
from polyclinic.common.data.tabular import Cells, need_columns, read_rows
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.settings import DataSettings

# What the Hugging Face layout calls our columns.
ALSO = {"file_name": "image", "text": "caption"}
OURS = ("image", "caption", "patient", "site")


def files(folder: Path, data: DataSettings) -> list[Path]:
    """The table."""
    return [folder / data.table]


def read(folder: Path, data: DataSettings, key: bytes | None) -> Table:
    """Read the table of a data folder. See `table.py` for the protocol.

    Raises:
        BadInput: A missing file or column, or a patient column where the study protects single images.
    """
    path = folder / data.table
    if not path.is_file():
        other = next(
            (n for n in ("metadata.csv", "metadata.jsonl", "images.jsonl") if (folder / n).is_file()), ""
        )
        hint = f'; {other} is there: name it in the study, data.table = "{other}"' if other else ""
        raise BadInput(
            f"{path}: no such file; the data folder needs a CSV with columns image, caption, patient{hint}"
        )
    columns, rows = read_rows(path)
    names = {name: ALSO[name] if name in ALSO and ALSO[name] not in columns else name for name in columns}
    columns = list(names.values())
    need_columns(path, columns, "image", "caption")
    if data.unit == "patient" and "patient" not in columns:
        raise BadInput(
            f"{path}: column `patient` is missing; add it to the header; or set "
            'data.unit = "image" in the study'
        )
    if data.unit == "image" and "patient" in columns:
        raise BadInput(
            f'{path}: has a column `patient`, but the study protects single images (data.unit = "image"), '
            "which is less; ask for a study that protects patients, or take the column out if it names none"
        )
    return assemble(_rows(path, rows, names, data.unit), folder, [path])


def _rows(path: Path, rows: Iterable[tuple[int, Cells]], names: dict[str, str], unit: str) -> Iterator[Row]:
    for number, cells in rows:
        row = {names.get(name, name): cell for name, cell in cells.items()}
        image = row.get("image", "")
        patient = row.get("patient", "") if unit == "patient" else image
        labels = {name: cell for name, cell in row.items() if name not in OURS}
        yield Row(
            f"{path}, row {number}", image, row.get("caption", ""), patient, row.get("site", ""), labels
        )
