"""The door `kvasir-vqa`: Kvasir-VQA with the captions of MedVQA-GI 2025, in both forms it is handed out.

* a folder as its page makes it: `metadata.csv` (source, question, answer, img_id) and `images/<img_id>.jpg`;
* Hugging Face `SimulaMet-HOST/Kvasir-VQA` on disk: parquet files, or arrow files of `save_to_disk`, with
  columns image, question, answer, img_id, source; an image stands in a row for each of its questions.

Either with `kvasir-captions.json`: `{img_id: {group: [caption, ...]}}`. No patient ids: the image is the
unit. `source` names the site; questions with one answer are labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic.common.data.parquet import read_columns, table_files
from polyclinic.common.data.table import Row, Table, assemble
from polyclinic.common.data.tabular import need_columns, read_rows
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.settings import DataSettings

CAPTIONS, TABLE = "kvasir-captions.json", "metadata.csv"
COLUMNS = ("img_id", "question", "answer", "source")
Entry = tuple[str, str, str]


def files(folder: Path, data: DataSettings) -> list[Path]:
    """The captions, and the table in either form."""
    table = folder / TABLE
    return [folder / CAPTIONS, *([table] if table.is_file() else table_files(folder))]


def read(folder: Path, data: DataSettings, key: bytes | None) -> Table:
    """Read either form. See `table.py` for the protocol.

    Raises:
        BadInput: The captions or the table are missing or not what they should be.
    """
    captions = _captions(folder / CAPTIONS)
    tables = files(folder, data)[1:]
    if not tables:
        raise BadInput(f"{folder}: neither {TABLE} nor parquet files; download Kvasir-VQA into this folder")
    where: dict[str, Entry] = {}
    labels: dict[str, dict[str, str]] = {}
    for number, source, row, part in _table(tables):
        image = str(row.get("img_id") or "").strip()
        at = f"images/{image}.jpg" if not part and image else str(source.relative_to(folder)) if part else ""
        where.setdefault(image, (f"{source}, row {number}", at, part))
        known = labels.setdefault(image, {"source": str(row.get("source") or "").strip()})
        question, answer = str(row.get("question") or "").strip(), str(row.get("answer") or "").strip()
        if question and answer:
            known[question] = answer if known.get(question, answer) == answer else ""
    return assemble(_rows(where, labels, captions), folder, [folder / CAPTIONS, *tables])


def _table(tables: list[Path]) -> Iterator[tuple[int, Path, dict[str, Any], str]]:
    for path in tables:
        if path.name == TABLE:
            columns, rows = read_rows(path)
            need_columns(path, columns, "img_id")
            yield from ((number, path, dict(row), "") for number, row in rows)
        else:
            for number, row in enumerate(read_columns(path, *COLUMNS)):
                yield number, path, row, str(number)


def _rows(
    where: dict[str, Entry], labels: dict[str, dict[str, str]], captions: dict[str, list[str]]
) -> Iterator[Row]:
    for image, (place, at, part) in where.items():
        facts = {name: value for name, value in labels[image].items() if value}
        for caption in captions.get(image) or [""]:
            yield Row(place, at, caption, image, facts.get("source", ""), facts, part)


def _captions(path: Path) -> dict[str, list[str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        return {
            image: [text.strip() for group in groups.values() for text in group]
            for image, groups in found.items()
        }
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; add the captions of MedVQA-GI 2025 to the folder") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{path}: not the captions of MedVQA-GI 2025 ({error}); it holds {{img_id: {{group: [caption]}}}}"
        ) from error
