"""The door `rocov2`: ROCOv2 (Radiology Objects in COntext, version 2), in both forms it is handed out.

* folders: `train_images/ROCOv2_2023_train_000001.jpg` and `train_captions.csv` (ID,Caption; an ID has no
  extension), likewise `valid` and `test`; whichever of the three are there are read. The concepts
  (`train_concepts.csv`: ID,CUIs with `;` between) give labels where they are there;
* the parquet mirror `eltorio/ROCOv2-radiology`: columns image, image_id, caption, cui.

No patient ids are published: the image is the unit. Labels: `split`, and `modality` where a UMLS concept
of the image names one. There are no natural sites: a study divides by `modality`, or evenly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic.common.data.parquet import columns_of, read_columns, table_files
from polyclinic.common.data.table import Row, Table, assemble
from polyclinic.common.data.tabular import need_columns, read_rows
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.settings import DataSettings

SPLITS = ("train", "valid", "test")
# UMLS concepts of imaging modalities.
MODALITIES = {
    "C0040405": "CT",
    "C1306645": "X-ray",
    "C0024485": "MRI",
    "C0041618": "ultrasound",
    "C0002978": "angiography",
    "C0032743": "PET",
}


def files(folder: Path, data: DataSettings) -> list[Path]:
    """The captions and concepts of every split that is there, or the parquet files."""
    names = [f"{split}_{kind}.csv" for kind in ("captions", "concepts") for split in SPLITS]
    tables = [folder / name for name in names if (folder / name).is_file()]
    return tables if any(path.name.endswith("_captions.csv") for path in tables) else table_files(folder)


def read(folder: Path, data: DataSettings, key: bytes | None) -> Table:
    """Read either form. See `table.py` for the protocol.

    Raises:
        BadInput: Neither form is there, or a table has other columns.
    """
    tables = files(folder, data)
    captions = [path for path in tables if path.name.endswith("_captions.csv")]
    concepts = [path for path in tables if path.name.endswith("_concepts.csv")]
    if captions:
        return assemble(_csv_rows(captions, _concepts(concepts)), folder, tables)
    if not tables:
        raise BadInput(
            f"{folder}: neither train_captions.csv nor parquet files; download ROCOv2 into this folder"
        )
    return assemble(_parquet_rows(tables, folder), folder, tables)


def _concepts(paths: list[Path]) -> dict[str, str]:
    """Modality of each image whose concepts are known."""
    found = {}
    for path in paths:
        columns, rows = read_rows(path)
        need_columns(path, columns, "ID", "CUIs")
        found.update({row["ID"]: _modality(row["CUIs"].split(";")) for _, row in rows})
    return found


def _csv_rows(tables: list[Path], modalities: dict[str, str]) -> Iterator[Row]:
    for path in tables:
        split = path.name.removesuffix("_captions.csv")
        columns, rows = read_rows(path)
        need_columns(path, columns, "ID", "Caption")
        for number, row in rows:
            image = row["ID"]
            at = f"{split}_images/{image}.jpg" if image else ""
            labels = _labels(split, modalities.get(image, ""))
            yield Row(f"{path}, row {number}", at, row["Caption"], image, "", labels)


def _parquet_rows(parts: list[Path], folder: Path) -> Iterator[Row]:
    for path in parts:
        names = ["image_id", "caption"] + [name for name in ("cui",) if name in columns_of(path)]
        split = path.name.split("-")[0]
        for number, row in enumerate(read_columns(path, *names)):
            image = str(row["image_id"] or "").strip()
            labels = _labels(split, _modality(_list(row.get("cui"))))
            caption = str(row["caption"] or "").strip()
            at = str(path.relative_to(folder))
            yield Row(f"{path}, row {number}", at, caption, image, "", labels, str(number))


def _list(value: Any) -> list[str]:
    return (
        value.replace(",", ";").split(";") if isinstance(value, str) else [str(item) for item in value or []]
    )


def _modality(concepts: list[str]) -> str:
    """Where an image's concepts are known and none is a modality, it is `other`: a split needs a value."""
    named = next((MODALITIES[cui.strip()] for cui in concepts if cui.strip() in MODALITIES), "")
    return named or ("other" if any(cui.strip() for cui in concepts) else "")


def _labels(split: str, modality: str) -> dict[str, str]:
    named = {"modality": modality} if modality else {}
    return {"split": "valid" if split == "validation" else split} | named
