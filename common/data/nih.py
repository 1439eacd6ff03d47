"""The door `nih-chest-xray14`: NIH ChestX-ray14 as the NIH Clinical Center hands it out.

`Data_Entry_2017.csv` or `Data_Entry_2017_v2020.csv`, and the images of any of its twelve archives, beside it,
in `images/` or in `images_001/images/` and so on. Rows whose image is not there are left aside: few people
download all 45 GB. Captions are composed from the table's own fields. Patients have ids; there are no sites.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from polyclinic.common.data.table import Problem, Row, Table, assemble
from polyclinic.common.data.tabular import Cells, need_columns, read_rows
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.settings import DataSettings

COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")
SEXES = {"M": "man", "F": "woman"}


def files(folder: Path, data: DataSettings) -> list[Path]:
    """The table, whatever its year."""
    return sorted(folder.glob("Data_Entry_2017*.csv"))


def read(folder: Path, data: DataSettings, key: bytes | None) -> Table:
    """Read the table. See `table.py` for the protocol.

    Raises:
        BadInput: There is no such table, two of them, or none of its images.
    """
    tables = files(folder, data)
    if len(tables) != 1:
        there = " and ".join(path.name for path in tables) or "nothing of that name"
        raise BadInput(f"{folder}: needs one Data_Entry_2017*.csv and has {there}; keep the one to be used")
    path = tables[0]
    columns, rows = read_rows(path)
    need_columns(path, columns, *COLUMNS)
    at = {file.name: str(file.relative_to(folder)) for file in sorted(folder.rglob("*.png"))}
    kept: list[tuple[int, Cells]] = []
    absent = 0
    for number, row in rows:
        if row["Image Index"] in at or not row["Image Index"]:
            kept.append((number, row))
        else:
            absent += 1
    if not kept:
        raise BadInput(f"{folder}: none of the images of {path.name} is in it; unpack an archive there")
    table = assemble(_rows(path, kept, at), folder, [path])
    if absent:
        what = f"{absent} of {absent + len(kept)} rows name images that are not there"
        fix = "nothing, unless they should be"
        return Table(
            table.records,
            [*table.problems, Problem("no-image-file", str(path), what, fix, skipped=True)],
            table.files,
        )
    return table


def _rows(path: Path, rows: list[tuple[int, Cells]], at: dict[str, str]) -> Iterator[Row]:
    for number, row in rows:
        labels = {
            "findings": row["Finding Labels"],
            "age": str(age) if (age := _age(row["Patient Age"])) is not None else "",
            "sex": row["Patient Gender"],
            "view": row["View Position"],
        }
        image = at.get(row["Image Index"], "")
        yield Row(f"{path}, row {number}", image, caption(labels), row["Patient ID"], "", labels)


def _age(text: str) -> int | None:
    """Years of `058Y`, `057` or `57`; None for months, days and the table's typing errors (up to 414)."""
    match = re.fullmatch(r"0*(\d{1,3})Y?", text)
    return int(match[1]) if match and int(match[1]) <= 120 else None


def caption(labels: dict[str, str]) -> str:
    """Compose a caption such as `PA chest X-ray of a 58-year-old man showing effusion, pleural thickening.`

    Args:
        labels: `view`, `age`, `sex` and `findings` (with `|` between).
    """
    age, sex = labels["age"], SEXES.get(labels["sex"], "person")
    article = "an" if age.startswith("8") or age in ("11", "18") else "a"
    who = f"{article} {age}-year-old {sex}" if age else f"a {sex}"
    named = [part.strip().replace("_", " ").lower() for part in labels["findings"].split("|")]
    found = [part for part in named if part and part != "no finding"]
    shows = f"showing {', '.join(found)}" if found else "with no finding"
    return f"{labels['view']} chest X-ray of {who} {shows}.".strip()
