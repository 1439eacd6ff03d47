"""Damaged input of every kind: a clear finding each time, no crash, originals untouched, memory bounded."""

import gzip
import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydicom
import pytest

from polyclinic.client import cli
from polyclinic.client.check.codes import CODES
from polyclinic.client.check.preflight import preflight
from polyclinic.client.check.worker import MEMORY
from polyclinic.client.intake import make_snapshot, site_records
from polyclinic.common.data.images import UnusableImage, open_image
from polyclinic.common.data.sources import read_records
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings
from tests.client.damaged import DICOMS, IMAGES, gray
from tests.client.odd import ODD, ODD_DICOMS
from tests.common.made_sets import draw, write_dicom

GENERATOR = GeneratorSettings()
ALL, ALL_DICOMS = IMAGES | ODD, DICOMS | ODD_DICOMS


def contents(folder: Path) -> dict[str, str]:
    """Everything in a folder, by name: content, mode and time."""
    return {
        str(path.relative_to(folder)): f"{path.lstat().st_mode} {path.lstat().st_mtime_ns} "
        + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


def codes_of(facts: dict[str, Any], name: str, lines: list[dict[str, Any]]) -> set[str]:
    """Codes of a file, from the quarantine and the examples."""
    said = {
        row["code"] for row in facts["findings"] for e in row["examples"] if name in e["where"] + e["detail"]
    }
    return said | {line["code"] for line in lines if line["image"] == name}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Every damaged image in one folder with three good ones, checked in one run."""
    folder = tmp_path_factory.mktemp("spoiled") / "data"
    folder.mkdir()
    rows = ["image,caption,patient"]
    for number, (name, (suffix, make, _)) in enumerate(ALL.items()):
        path = folder / f"{name.replace(' ', '-').replace(',', '')}{suffix}"
        make(path)
        rows.append(f"{path.name},a picture,p{number}")
    for number in range(3):
        draw(40 + number).save(folder / f"good{number}.png")
        rows.append(f"good{number}.png,a picture,g{number}")
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    before = contents(folder)
    home = folder.parent / "home"
    facts = preflight(home, folder, DataSettings(image_size=32), GENERATOR, fix=True)
    assert contents(folder) == before
    return facts, home


@pytest.mark.parametrize("name", ALL)
def test_damaged_image(name: str, spoiled: tuple[dict[str, Any], Path]) -> None:
    facts, _ = spoiled
    suffix, _, code = ALL[name]
    image = f"{name.replace(' ', '-').replace(',', '')}{suffix}"
    aside = [json.loads(line) for line in Path(facts["quarantine_list"]).read_text().splitlines()]
    kept = [json.loads(line)["image"] for line in Path(facts["accepted_list"]).read_text().splitlines()]
    found = codes_of(facts, image, aside)
    assert found - {"upscaled"} == ({code} if code else set())
    assert (image in kept) == (not code or CODES[code].severity == "warning")


def test_good_images_stay_and_every_finding_has_a_remedy(spoiled: tuple[dict[str, Any], Path]) -> None:
    facts, home = spoiled
    kept = Path(facts["accepted_list"]).read_text()
    assert all(f"good{number}.png" in kept for number in range(3))
    assert all(row["remedy"] and row["examples"] for row in facts["findings"])
    assert "decoder-crashed" not in {row["code"] for row in facts["findings"]}
    modes = {path.stat().st_mode & 0o077 for path in (home / "data").rglob("*")}
    assert modes == {0}
    assert (home / "data").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ALL_DICOMS)
def test_damaged_dicom(name: str, tmp_path: Path, dicoms: dict[str, set[str]]) -> None:
    _, code = ALL_DICOMS[name]
    # The films all carry a name, and several show the same picture.
    expected = {code} - {""}
    assert {c for c in dicoms[name] if "duplicate" not in c} - {"dicom-identifiers"} == expected


@pytest.fixture(scope="module")
def dicoms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Codes of every damaged DICOM file, checked in one run."""
    folder = tmp_path_factory.mktemp("dicoms") / "data"
    folder.mkdir()
    at = {}
    for number, (name, (make, _)) in enumerate(ALL_DICOMS.items()):
        at[name] = f"file{number:02d}.dcm"
        make(folder / at[name])
    write_dicom(folder / "good.dcm", gray(), PatientID="x")
    before = contents(folder)
    data = DataSettings(source="dicom", caption="{Modality} {BodyPartExamined} {ViewPosition}", image_size=32)
    facts = preflight(folder.parent / "home", folder, data, GENERATOR, fix=True)
    assert contents(folder) == before
    aside = [json.loads(line) for line in Path(facts["quarantine_list"]).read_text().splitlines()]
    return {name: codes_of(facts, file, aside) for name, file in at.items()}


# ---------------------------------------------------------------- tables

HEAD = "image,caption,patient\n"
TABLES: dict[str, tuple[bytes, str]] = {
    "byte order mark": (b"\xef\xbb\xbf" + HEAD.encode() + b"a.png,x,p\n", ""),
    "embedded newline": (HEAD.encode() + b'a.png,"one\ntwo",p\n', ""),
    "CRLF and blank lines": (HEAD.replace("\n", "\r\n").encode() + b"a.png,x,p\r\n\r\n", ""),
    "UTF-16": ((HEAD + "a.png,x,p\n").encode("utf-16"), "not UTF-8 text"),
    "Windows-1252": (HEAD.encode() + "a.png,Röntgen,p\n".encode("cp1252"), "not UTF-8 text"),
    "missing column": (b"image,patient\na.png,p\n", "column `caption` is missing"),
    "semicolons": (b"image;caption;patient\na.png;x;p\n", "column `image` is missing"),
    "a column twice": (b"image,caption,patient,patient\na.png,x,p,q\n", "column `patient` is there twice"),
    "no rows": (HEAD.encode(), "has no rows"),
    "empty": (b"", "column `image` is missing"),
    "an endless cell": (HEAD.encode() + b"a.png," + b"x" * 200_000 + b",p\n", "not a CSV table"),
    "one id for two patients": (HEAD.encode() + b"a.png,x,p\na.png,x,q\n", "belongs to patients p and q"),
    "a NUL byte in a name": (HEAD.encode() + b"a\0b.png,x,p\n", "caption without its image"),
    "an endless name": (HEAD.encode() + b"a" * 5000 + b".png,x,p\n", "caption without its image"),
    "a way out": (HEAD.encode() + b"../outside.png,x,p\n", "lies outside"),
    "an absolute path": (HEAD.encode() + b"/etc/passwd,x,p\n", "lies outside"),
    "quoted CRLF": (HEAD.encode() + b'a.png,"one\r\ntwo",p\r\n', ""),
    "cells too many": (HEAD.encode() + b"a.png,x,p,more,and more\n", ""),
    "cells too few": (HEAD.encode() + b"a.png,x\n", "the patient of a.png is empty"),
    "one quote too many": (HEAD.encode() + b'a.png,"x,p\nb.png,y,q\n', "the patient of a.png is empty"),
    "line ends of old Macintoshes": (HEAD.replace("\n", "\r").encode() + b"a.png,x,p\r", ""),
    "a name in decomposed letters": (
        HEAD.encode() + "a\u0308.png,x,p\n".encode(),
        "caption without its image",
    ),
    "a name in other case": (HEAD.encode() + b"A.png,x,p\n", "caption without its image"),
    "a table in gzip": (gzip.compress(HEAD.encode() + b"a.png,x,p\n"), "not UTF-8 text"),
    "NUL bytes": (HEAD.encode() + b"a.png,x,p\n" + bytes(4096), "NUL"),
    "a binary file": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, "not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_damaged_table(name: str, tmp_path: Path) -> None:
    draw(2).save(tmp_path / "outside.png")
    folder = tmp_path / "data"
    folder.mkdir()
    draw(1).save(folder / "a.png")
    draw(3).save(folder / "\u00e4.png")
    data, words = TABLES[name]
    (folder / "images.csv").write_bytes(data)
    before = contents(folder)
    if words:
        with pytest.raises(BadInput, match=words):
            read_records(DataSettings(), folder)
    else:
        assert len(read_records(DataSettings(), folder)) == 1
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"image": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"image": "a.png", "caption": "x", "patient": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"image": "a.png", "caption": "x", "patient": null}', "the patient of a.png is empty"),
        (b'{"image": "a.png", "caption": "\\ud800", "patient": "p"}', ""),
        (b'["a.png", "x", "p"]', "not a JSON object"),
    ],
)
def test_damaged_json_lines(line: bytes, words: str, tmp_path: Path) -> None:
    draw(1).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_bytes(line + b"\n")
    data = DataSettings(table="rows.jsonl")
    if words:
        with pytest.raises(BadInput, match=words):
            read_records(data, tmp_path)
    else:
        facts = preflight(tmp_path / "home", tmp_path, data, GENERATOR, fix=True)
        assert {row["code"] for row in facts["findings"]} >= {"caption-encoding"}


def test_lists_hold_whatever_a_caption_or_a_file_s_name_may_hold(tmp_path: Path) -> None:
    folder, home = tmp_path / "data", tmp_path / "home"
    folder.mkdir()
    name = os.fsdecode(b"film\xff\n.dcm")
    write_dicom(folder / name, gray())
    said = "a film\u2028of\x85a chest"
    (folder / "images.csv").write_text(f"SOPInstanceUID,caption\n1.2.3,{said}\n", encoding="utf-8")
    data = DataSettings(source="dicom")
    assert cli.main(["check", str(folder), "--source", "dicom", "--fix", "--home", str(home)]) == 0
    assert make_snapshot(home, data, folder)["checked"]
    (record,) = site_records(home, data, folder)
    assert (record.image, record.captions) == (folder / name, (said,))


def test_a_file_that_grows_while_it_is_read_stops_the_snapshot(tmp_path: Path) -> None:
    folder, home = tmp_path / "data", tmp_path / "home"
    folder.mkdir()
    for number in range(12):
        draw(number).save(folder / f"{number}.png")
    (folder / "images.csv").write_text(HEAD + "".join(f"{n}.png,x,p{n}\n" for n in range(12)))
    grow = "import sys\nwhile True:\n    open(sys.argv[1], 'ab').write(bytes(64))"
    with subprocess.Popen([sys.executable, "-c", grow, str(folder / "5.png")]) as writer:
        try:
            facts = preflight(home, folder, DataSettings(image_size=32), GENERATOR, fix=True)
            with pytest.raises(BadInput, match=r"5\.png: changed since it was checked"):
                make_snapshot(home, DataSettings(image_size=32), folder)
        finally:
            writer.kill()
    assert facts["accepted"] == 12


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_this_user_may_not_read_is_a_finding(tmp_path: Path) -> None:
    draw(1).save(tmp_path / "a.png")
    draw(2).save(tmp_path / "b.png")
    (tmp_path / "a.png").chmod(0)
    (tmp_path / "images.csv").write_text(HEAD + "a.png,x,p\nb.png,x,q\n")
    facts = preflight(tmp_path / "home", tmp_path, DataSettings(image_size=32), GENERATOR, fix=True)
    assert {row["code"]: row["count"] for row in facts["findings"]}["unreadable"] == 1
    assert facts["accepted"] == 1


@pytest.mark.parametrize("damage", ["cut", "half", "noise", "no image column", "empty image"])
def test_damaged_parquet(damage: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.common.made_sets import rocov2_parquet

    data = rocov2_parquet(tmp_path / "d")
    path = tmp_path / "d" / "data" / "train-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    if damage in ("cut", "half"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage == "half" else whole[:-100])
    elif damage == "noise":
        path.write_bytes(b"PAR1" + bytes(1000) + b"PAR1")
    else:
        shown = {"image": {"bytes": b"", "path": "x"}} if damage == "empty image" else {"picture": 1}
        pq.write_table(
            pa.Table.from_pylist([{k: v for k, v in r.items() if k != "image"} | shown for r in rows]), path
        )
    with pytest.raises(BadInput, match=r"not a whole parquet file|the row holds no image"):
        _open_all(data, tmp_path / "d")


def _open_all(data: DataSettings, folder: Path) -> None:
    for record in read_records(data, folder):
        open_image(record.image, record.part)


# ---------------------------------------------------------------- pydicom's own files


def test_every_file_that_pydicom_brings_reads_or_is_refused_with_its_reason(tmp_path: Path) -> None:
    folder = Path(pydicom.__file__).parent / "data"
    read, refused = 0, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")):
        error = _refusal(path)
        if error is None:
            read += 1
        else:
            assert (error.what, error.fix, error.code in CODES) > ("", "", False)
            refused[path.name] = error.code
    assert read >= 95
    reasons = {
        "rtplan.dcm": "not-an-image",
        "reportsi.dcm": "not-an-image",
        "DICOMDIR": "not-an-image",
        "MR_truncated.dcm": "damaged",
        "badVR.dcm": "unreadable",
        "JPEG2000-embedded-sequence-delimiter.dcm": "damaged",
        "README.txt": "unreadable",
    }
    assert {name: refused[name] for name in reasons} == reasons
    # 12-bit lossy JPEG is the one transfer syntax of them that only a GPL decoder reads.
    assert {n for n, code in refused.items() if code == "damaged"} <= {
        "MR_truncated.dcm", "JPEG-lossy.dcm", "JPGExtended.dcm", "SC_rgb_jpeg.dcm",
        "JPEG2000-embedded-sequence-delimiter.dcm",
    }  # fmt: skip


def _refusal(path: Path) -> UnusableImage | None:
    try:
        image = open_image(path)
    except UnusableImage as error:
        return error
    assert image.mode == "RGB"
    return None


def test_a_worker_has_its_limit(tmp_path: Path) -> None:
    """What a decoder may take is bounded by the kernel, whatever a file makes it ask for."""
    code = (
        "import sys, resource\nfrom polyclinic.client.check import worker\nsys.stdin = []\nworker.main()\n"
        "print(resource.getrlimit(resource.RLIMIT_AS)[0])\n"
        "try:\n    bytearray(4 << 30)\nexcept MemoryError:\n    print('bounded')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [str(MEMORY), "bounded"]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != MEMORY
