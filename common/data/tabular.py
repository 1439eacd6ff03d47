"""Rows of CSV and JSON Lines files, as text: what every table door reads through."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polyclinic.common.refusals import BadInput

Cells = dict[str, str]


def read_rows(path: Path, delimiter: str = ",") -> tuple[list[str], Iterator[tuple[int, Cells]]]:
    """Read a CSV (or, by its suffix, tab-separated or JSON Lines) table, the rows of a CSV one by one.

    Args:
        path: UTF-8, with or without a byte order mark; any line ends; cells may hold line ends.
        delimiter: Of a CSV.

    Returns:
        Its columns, and each row with the line it ends on. Cells are without outer spaces: a patient id
        with a stray space must not become a second patient. Missing cells are empty.

    Raises:
        BadInput: It is not there, not UTF-8 or not such a table; of a row, where it is come to.
    """
    with _said_of(path):
        if path.suffix in (".jsonl", ".ndjson"):
            return _json_lines(path)
    rows = _csv(path, "\t" if path.suffix == ".tsv" else delimiter)
    return list(next(rows)[1]), rows


def _csv(path: Path, delimiter: str) -> Iterator[tuple[int, Cells]]:
    """Yield the header as a row of its own, then the rows."""
    with _said_of(path), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="", delimiter=delimiter)
        columns = [(name or "").strip() for name in reader.fieldnames or []]
        twice = sorted({name for name in columns if name and columns.count(name) > 1})
        if twice:
            raise BadInput(f"{path}: column `{twice[0]}` is there twice; rename or remove one")
        yield 0, dict.fromkeys(columns, "")
        reader.fieldnames = columns
        for row in reader:
            yield reader.line_num, {key: cell.strip() for key, cell in row.items() if isinstance(cell, str)}


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a table into a sentence about it."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; add it, or name another in the study's data table") from error
    except IsADirectoryError as error:
        raise BadInput(f"{path}: a folder, not a table; name the file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason}); save the table as UTF-8") from error
    except csv.Error as error:
        raise BadInput(
            f"{path}: not a CSV table ({error}); write it again as comma-separated text"
        ) from error


def _json_lines(path: Path) -> tuple[list[str], Iterator[tuple[int, Cells]]]:
    columns: dict[str, None] = {}
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {number}: not JSON ({error}); one object a line") from error
            if not isinstance(values, dict):
                raise BadInput(f"{path}, line {number}: not a JSON object; write {{...}} on each line")
            columns |= dict.fromkeys(values)
            rows.append((number, {key: _text(value) for key, value in values.items()}))
    return list(columns), iter(rows)


def _text(value: object) -> str:
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)


def need_columns(path: Path, columns: list[str], *needed: str) -> None:
    """Refuse a table without a column.

    Raises:
        BadInput: Names the first that is missing.
    """
    for column in needed:
        if column not in columns:
            there = ", ".join(name for name in columns[:12] if name) or "nothing"
            raise BadInput(f"{path}: column `{column}` is missing; add it to the header (it has: {there})")
