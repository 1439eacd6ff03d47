"""The door `medvqa-gi-2024`: the ImageCLEFmed MedVQA-GI 2024 development set as it is distributed.

`images/<id>.jpg` and `prompt-gt.csv`: delimiter `;`, header `Prompt;Filename`, CRLF, 7 to 14 prompts an
image. No patient ids are published: the image is the privacy unit, and all its prompts belong to it. The
first five characters of an id name its source class of 500 images: four sites that differ by nature.
Prompts stay as they are, typos included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from polyclinic.common.data.table import Row, Table, assemble
from polyclinic.common.data.tabular import Cells, need_columns, read_rows

if TYPE_CHECKING:
    from polyclinic.common.settings import DataSettings

TABLE = "prompt-gt.csv"
CLASSES = {
    "cl8k2": "polyps",
    "cla82": "ulcerative colitis",
    "clb0k": "oesophagitis, gastroscopy, z-line",
    "clb0l": "instruments",
}
# What a prompt of an image says about it: these words, and whether it denies them.
CONCEPTS = {
    "polyp": re.compile(r"\bpolyps?\b", re.IGNORECASE),
    "instrument": re.compile(r"\binstruments?\b", re.IGNORECASE),
    "box": re.compile(r"\bbox\b", re.IGNORECASE),
    "text": re.compile(r"\btext\b", re.IGNORECASE),
}
_DENIED = re.compile(r"\b(no|not|without|absence)\b", re.IGNORECASE)


def files(folder: Path, data: DataSettings) -> list[Path]:
    """The table of prompts."""
    return [folder / TABLE]


def read(folder: Path, data: DataSettings, key: bytes | None) -> Table:
    """Read the development set. See `table.py` for the protocol.

    Raises:
        BadInput: `prompt-gt.csv` is missing or has other columns.
    """
    (path,) = files(folder, data)
    columns, read_once = read_rows(path, delimiter=";")
    need_columns(path, columns, "Prompt", "Filename")
    rows = list(read_once)
    prompts: dict[str, list[str]] = {}
    for _, row in rows:
        prompts.setdefault(row["Filename"], []).append(row["Prompt"])
    labels = {image: labels_of(image, said) for image, said in prompts.items()}
    return assemble(_rows(path, rows, labels), folder, [path])


def _rows(path: Path, rows: list[tuple[int, Cells]], labels: dict[str, dict[str, str]]) -> Iterator[Row]:
    for number, row in rows:
        image = row["Filename"]
        at = f"images/{image}" if image else ""
        yield Row(f"{path}, row {number}", at, row["Prompt"], image, image[:5], labels[image])


def labels_of(image: str, prompts: list[str]) -> dict[str, str]:
    """Say what an image shows, from its id and prompts.

    Args:
        image: File name.
        prompts: All its prompts.

    Returns:
        `source`, and `yes` or `no` for each concept that its prompts name and do not contradict.
    """
    found = {"source": CLASSES.get(image[:5], image[:5])}
    for concept, word in CONCEPTS.items():
        said = {"no" if _DENIED.search(prompt) else "yes" for prompt in prompts if word.search(prompt)}
        if len(said) == 1:
            found[concept] = said.pop()
    return found
