"""A folder with a CSV: what is read, and every mistake named by file, row and fix."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from polyclinic.common.data.images import open_image
from polyclinic.common.data.sources import read_records
from polyclinic.common.data.table import Record, patients_of
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings

HEADER = "image,caption,patient,site,polyp\n"


def _folder(
    tmp_path: Path, table: str | bytes, images: tuple[str, ...] = ("a.png", "b.png", "c.png")
) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in images:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), (200, 80, 80)).save(folder / name)
    (folder / "images.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    return folder


def read_folder(
    folder: Path, table: str = "images.csv", unit: Literal["patient", "image"] = "patient"
) -> list[Record]:
    return read_records(DataSettings(table=table, unit=unit), folder)


def test_rows_become_records_with_all_captions_of_an_image(tmp_path: Path) -> None:
    table = HEADER + "b.png,second first,p2,north,no\na.png,one,p1,south,yes\nb.png, again ,p2,north,no\n"
    folder = _folder(tmp_path, table)
    b, a = read_folder(folder)
    assert (b.patient, b.captions, b.site, b.labels) == (
        "p2",
        ("second first", "again"),
        "north",
        {"polyp": "no"},
    )
    assert (a.patient, a.captions, a.site, a.labels) == ("p1", ("one",), "south", {"polyp": "yes"})
    assert a.image == (folder / "a.png").resolve()


def test_site_and_labels_are_optional_and_captions_may_hold_commas_and_lines(tmp_path: Path) -> None:
    records = read_folder(_folder(tmp_path, 'patient,image,caption\r\np,a.png,"one, two\r\nthree"\r\n'))
    assert records[0].captions == ("one, two\r\nthree",)
    assert (records[0].site, records[0].labels) == (None, {})


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    table = (HEADER + "a.png,Ödem,p1,,\n").encode("utf-8-sig")
    assert read_folder(_folder(tmp_path, table))[0].captions == ("Ödem",)


def test_a_stray_space_makes_no_second_patient(tmp_path: Path) -> None:
    records = read_folder(_folder(tmp_path, HEADER + "a.png,x,p1,north,\nb.png,x, p1 ,north,\n"))
    assert list(patients_of(records)) == ["p1"]


def test_where_the_image_is_the_unit_no_patient_column_is_needed_nor_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "image,caption\na.png,x\nb.png,y\na.png,z\n")
    assert [(r.patient, r.captions) for r in read_folder(folder, unit="image")] == [
        ("a.png", ("x", "z")),
        ("b.png", ("y",)),
    ]


# Table, the row that is named (None: none), and the words of the message.
MISTAKES: dict[str, tuple[str | bytes, int | None, str]] = {
    "caption without its image": (
        HEADER + "a.png,x,p1,,\nnone.png,x,p2,,\n",
        3,
        "a caption without its image: none.png is not in .*; add the file or remove the row",
    ),
    "empty caption": (
        HEADER + "a.png,x,p1,,\nb.png,  ,p2,,\n",
        3,
        "the caption of b.png is empty; write one or remove the row",
    ),
    "short row": (HEADER + "a.png\n", 2, "the caption of a.png is empty; write one or remove the row"),
    "empty image": (HEADER + ",x,p1,,\n", 2, "the image is empty; name its file or remove the row"),
    "image is a folder": (HEADER + ".,x,p1,,\n", 2, "a caption without its image: . is not in"),
    "empty patient": (HEADER + "a.png,x,,,\n", 2, "the patient of a.png is empty; fill it in"),
    "no patient column": (
        "image,caption\na.png,x\n",
        None,
        'column `patient` is missing; add it to the header; or set data.unit = "image" in the study',
    ),
    "no caption column": (
        "image,patient\na.png,p\n",
        None,
        "column `caption` is missing; add it to the header",
    ),
    "no image column": ("file,caption,patient\na.png,x,p\n", None, "column `image` is missing; add it to"),
    "empty file": ("", None, "column `image` is missing; add it to the header"),
    "no rows": (HEADER, None, "has no rows; add at least one image"),
    "patient on two sites": (
        HEADER + "a.png,x,p1,north,\nb.png,x,p1,south,\n",
        None,
        "patient p1 is on two sites, north and south; give each patient one site",
    ),
    "one image on two sites": (
        HEADER + "a.png,x,p1,north,\na.png,y,p1,south,\n",
        3,
        "image a.png is on two sites, north and south; give each patient one site",
    ),
    "outside the folder": (
        HEADER + "../secret.png,x,p1,,\n",
        2,
        "../secret.png lies outside .*; copy it into the folder",
    ),
    "two patients for one image": (
        HEADER + "a.png,x,p1,,\na.png,y,p2,,\n",
        3,
        "image a.png belongs to patients p1 and p2; an image has one patient",
    ),
    "two patients for one image, written otherwise": (
        HEADER + "a.png,x,p1,,\n./a.png,y,p2,,\n",
        3,
        "image ./a.png belongs to patients p1 and p2; an image has one patient",
    ),
    "row after a blank line": (HEADER + "\n\nnone.png,x,p,,\n", 4, "a caption without its image"),
    "not UTF-8": (
        HEADER.encode() + b"a.png,\xd6dem,p1,,\n",
        None,
        "not UTF-8 text .*; save the table as UTF-8",
    ),
    "one endless cell": (
        HEADER + "a.png," + "x" * 200_000 + ",p1,,\n",
        None,
        "not a CSV table .*; write it again",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_file_row_and_fix(mistake: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    table, row, words = MISTAKES[mistake]
    folder = _folder(tmp_path, table)
    where = str(folder / "images.csv") + (f", row {row}" if row else "")
    with pytest.raises(BadInput, match=words) as caught:
        read_folder(folder)
    assert str(caught.value).startswith(f"{where}: ")
    assert caught.value.exit_code == 2


def test_a_link_out_of_the_folder_is_outside(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    folder = _folder(tmp_path, HEADER + "link.png,x,p1,,\n")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadInput, match=r"row 2: link\.png lies outside"):
        read_folder(folder)


def test_a_missing_table_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"other\.csv: no such file; the data folder needs a CSV with columns"):
        read_folder(_folder(tmp_path, HEADER), "other.csv")


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_an_unreadable_image_is_named_with_the_fix(kind: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan.{kind}"
    noise = np.frombuffer(os.urandom(64 * 64 * 3), np.uint8).reshape(64, 64, 3)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"no image at all", "empty": b""}[damage]
    )
    with pytest.raises(BadInput, match=r"unreadable image .*; replace the file or remove its row") as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_common_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("scan.tif" if mode == "CMYK" else "scan.png")
    Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 254


def test_deep_pixels_are_refused_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
    with pytest.raises(BadInput, match=r"scan\.png: more than 8 bits a pixel \(I;16\); save it with 8 bits"):
        open_image(path)
