"""Read the raters' CSV files back, as the form wrote them or as a spreadsheet saved them again."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyclinic.common.reader_study.key import LEVELS, POINTS, Key
from polyclinic.common.refusals import BadInput

HEAD = ("study", "key", "rater", "position", "id", "answer")


@dataclass(frozen=True)
class Answers:
    """What one rater said.

    Attributes:
        rater: Name in the key.
        given: Id of a showing to the answers: 1 to 6, then 1 to 5 for each question.
    """

    rater: str
    given: dict[str, tuple[int, ...]]


def read_answers(path: Path, key: Key, commitment: str, *, incomplete: bool = False) -> Answers:
    """Read one rater's file and check every row against the key.

    Args:
        path: The CSV; commas, semicolons or tabs, with or without a byte order mark.
        key: The study's key.
        commitment: SHA-256 of the key's file, which every row must name.
        incomplete: Accept a file in which images are missing.

    Raises:
        BadInput: Another study's or key's file, an edited, unknown or repeated row, missing images;
            names file, row and fix.
    """
    columns = (*HEAD, *(question.name for question in key.questions), "check")
    given: dict[str, tuple[int, ...]] = {}
    rater = ""
    for number, cells in _rows(path, columns):
        where = f"{path}, row {number}"
        if len(cells) != len(columns):
            raise BadInput(f"{where}: has {len(cells)} cells, not {len(columns)}; {AGAIN}")
        row = dict(zip(columns, cells, strict=True))
        if row["study"] != key.study:
            raise BadInput(
                f"{where}: answers to study {row['study']}, but the key is of study {key.study}; "
                "name the key and the answers of one study"
            )
        if row["key"] != commitment:
            raise BadInput(
                f"{where}: the form was made with the key {row['key'][:12]}..., but this key is "
                f"{commitment[:12]}...: it was changed after the forms were made, or is another; "
                "restore the sealed folder as `make` wrote it"
            )
        if row["rater"] not in key.raters:
            raise BadInput(f"{where}: the key knows no rater {row['rater']}; {AGAIN}")
        if rater and row["rater"] != rater:
            raise BadInput(f"{where}: answers of {row['rater']} among those of {rater}; one file a rater")
        rater = row["rater"]
        if str(zlib.crc32("|".join(cells[:-1]).encode())) != row["check"]:
            raise BadInput(f"{where}: was changed after the form wrote it; {AGAIN}")
        shown = {showing.id: place for place, showing in enumerate(key.raters[rater], 1)}
        if str(shown.get(row["id"])) != row["position"]:
            raise BadInput(f"{where}: {rater} was not shown {row['id']} at {row['position']}; {AGAIN}")
        if row["id"] in given:
            raise BadInput(f"{where}: a second answer to {row['id']}; {AGAIN}")
        given[row["id"]] = _levels(cells[len(HEAD) - 1 : -1], where)
    if not rater:
        raise BadInput(f"{path}: holds no answers; the rater has to begin")
    missing = len(key.raters[rater]) - len(given)
    if missing and not incomplete:
        raise BadInput(
            f"{path}: {missing} of the {len(key.raters[rater])} images have no answer; let {rater} finish "
            "the form (it goes on from this file), or give --incomplete to score what is there"
        )
    return Answers(rater, given)


AGAIN = "ask the rater to save the answers again, and do not edit the file"


def _levels(cells: Sequence[str], where: str) -> tuple[int, ...]:
    levels = []
    for cell, most in zip(cells, (len(LEVELS), *[POINTS] * (len(cells) - 1)), strict=True):
        if not (cell.isdecimal() and 1 <= int(cell) <= most):
            raise BadInput(f"{where}: {cell!r} is no answer from 1 to {most}; {AGAIN}")
        levels.append(int(cell))
    return tuple(levels)


def _rows(path: Path, columns: Sequence[str]) -> list[tuple[int, list[str]]]:
    """Find the rows below the header, with the line each ends on."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); name the raters' CSV files") from error
    if data.startswith(b"PK"):
        raise BadInput(f"{path}: is a workbook, not a CSV; give the file that the form saved")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not a text file ({error.reason}); {AGAIN}") from error
    lines = text.splitlines()
    head = lines[0] if lines else ""
    delimiter = max(",;\t", key=head.count)
    table = csv.reader(lines, delimiter=delimiter)
    found = [cell.strip() for cell in next(table, [])]
    if found != list(columns):
        raise BadInput(
            f"{path}: not answers to this study's form: the columns should be {', '.join(columns)}; {AGAIN}"
        )
    return [(table.line_num, [c.strip() for c in cells]) for cells in table if any(c.strip() for c in cells)]
