"""The preflight: what it finds, what it accepts, that it goes on after a kill, and that it stays private."""

import html
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageEnhance

from polyclinic.client import cli
from polyclinic.client.check.captions import Limit, examine
from polyclinic.client.check.identifiers import in_text
from polyclinic.client.check.preflight import preflight
from polyclinic.client.check.report import OLDER, page, words
from polyclinic.client.check.workers import started
from polyclinic.client.intake import make_snapshot, site_records
from polyclinic.common.data.images import open_image
from polyclinic.common.data.sources import read_records
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings
from tests.common.made_sets import SETS, csv_folder, dicom, draw

GENERATOR = GeneratorSettings(max_tokens=16)
SAFE = "a chest X-ray with effusion, 3 x 4 cm, T2-weighted, L4/L5, 12-year-old girl, grade 2/3, 1.5 T"


def found(facts: dict[str, Any]) -> dict[str, int]:
    return {row["code"]: row["count"] for row in facts["findings"]}


def table(folder: Path, *rows: str, head: str = "image,caption,patient") -> DataSettings:
    folder.mkdir(exist_ok=True)
    (folder / "images.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return DataSettings(image_size=32)


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("text", "kind", "hidden"),
    [
        ("CT of 12.03.1961, normal", "date", "12.03.1961"),
        ("seen on 2023-11-04 again", "date", "2023-11-04"),
        ("since 4 November 2023", "date", "4 November 2023"),
        ("Dr. Schmidt saw a polyp", "name", "Schmidt"),
        ("Patient name: Jane Doe, female", "name", "Jane Doe"),
        ("film of DOE^JANE", "name", "DOE^JANE"),
        ("MRN 00481516", "number", "00481516"),
        ("accession no. A-99182736", "number", "99182736"),
        ("write to j.doe@clinic.org", "e-mail", "j.doe@clinic.org"),
        ("tel. 040 123 456 78", "telephone", "123 456"),
        ("a 93-year-old woman", "age over 89", "93"),
    ],
)
def test_an_identifier_is_found_and_masked(text: str, kind: str, hidden: str) -> None:
    (code, shown), *_ = examine(text)
    assert code == "caption-identifier"
    assert kind in shown
    assert hidden not in shown
    assert "█" in shown


def test_plain_captions_are_left_alone() -> None:
    assert in_text(SAFE) == []
    assert examine("Ödem, 5 µm, π, 肺炎") == []


def test_damaged_characters_are_found() -> None:
    for text in ("R�ntgen", "Röntgen".encode().decode("cp1252"), "a\x07b", "fâ€™s"):
        assert [code for code, _ in examine(text)] == ["caption-encoding"]


def test_length_is_counted_by_the_encoder_s_own_tokenizer(tmp_path: Path) -> None:
    limit = Limit(GENERATOR)
    # WordPiece: [CLS] a polyp [SEP]; "polyp" is two pieces of this vocabulary.
    assert [*limit.lengths(["a", ""])] == [3, 2]
    draw(1).save(tmp_path / "a.png")
    draw(2).save(tmp_path / "b.png")
    data = table(tmp_path, f"a.png,{'word ' * 14}end,p", f"b.png,{'word ' * 14},q")
    facts = preflight(tmp_path / "home", tmp_path, data, GENERATOR)
    (row,) = [row for row in facts["findings"] if row["code"] == "caption-too-long"]
    assert (row["count"], row["examples"][0]["detail"]) == (1, "17 tokens of 16")


# ---------------------------------------------------------------- duplicates


def test_copies_are_found_within_and_across_patients_and_never_resolved_across(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    big = draw(1, (200, 160))
    big.save(folder / "a.png")
    big.save(folder / "same.bmp")
    big.save(folder / "again.jpg", quality=40)
    ImageEnhance.Brightness(big.resize((120, 96))).enhance(1.2).save(folder / "bright.png")
    draw(2, (200, 160)).save(folder / "other.png")
    rows = [
        f"{n},x,{p}"
        for n, p in zip(("a.png", "same.bmp", "again.jpg", "bright.png", "other.png"), "ppqrs", strict=True)
    ]
    facts = preflight(tmp_path / "home", folder, table(folder, *rows), GENERATOR, fix=True)
    assert found(facts) == {"duplicate-within-patient": 1, "near-duplicate-across-patients": 1}
    near = next(row for row in facts["findings"] if row["code"].startswith("near"))
    assert "again.jpg" in near["examples"][0]["detail"]
    assert "bright.png" in near["examples"][0]["detail"]
    assert (facts["accepted"], facts["quarantined"]) == (5, 0)
    with pytest.raises(BadInput, match="not a finding that one image alone shows"):
        preflight(
            tmp_path / "home",
            folder,
            DataSettings(),
            GENERATOR,
            harder=frozenset({"duplicate-across-patients"}),
        )


# ---------------------------------------------------------------- what is accepted


def test_fix_leaves_out_what_one_image_or_caption_shows_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for number in range(4):
        draw(number).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no image")
    rows = ["0.png,fine,p", "0.png,Dr. Who says so,p", "1.png,MRN 1234567,q", "2.png,fine,q", "3.png,fine,r"]
    data = table(folder, *rows)
    home = tmp_path / "home"
    facts = preflight(home, folder, data, GENERATOR, fix=True)
    made = make_snapshot(home, data, folder)
    assert made["checked"]
    kept = {record.image.name: record.captions for record in site_records(home, data, folder)}
    assert kept == {"0.png": ("fine",), "2.png": ("fine",)}
    aside = [json.loads(line) for line in Path(facts["quarantine_list"]).read_text().splitlines()]
    assert {line["image"]: line["code"] for line in aside} == {
        "1.png": "caption-identifier",
        "3.png": "unreadable",
    }
    assert "1234567" not in Path(facts["quarantine_list"]).read_text()


def test_a_patient_more_changes_nothing_for_the_others(tmp_path: Path) -> None:
    """Rule 7: what is accepted of one patient does not depend on who else is there."""
    folder = tmp_path / "d"
    folder.mkdir()
    draw(1, (64, 64)).save(folder / "a.png")
    draw(2, (64, 64)).save(folder / "b.png")
    draw(1, (64, 64)).save(folder / "c.jpg", quality=60)
    accepted = []
    for rows in (["a.png,x,p", "b.png,y,q"], ["a.png,x,p", "b.png,y,q", "c.jpg,x,r"]):
        facts = preflight(tmp_path / "home", folder, table(folder, *rows), GENERATOR, fix=True)
        lines = [json.loads(line) for line in Path(facts["accepted_list"]).read_text().splitlines()]
        accepted.append([line for line in lines if line["patient"] != "r"])
    assert accepted[0] == accepted[1]


def test_a_person_decides_first_where_two_patients_have_one_image(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    draw(1).save(folder / "a.png")
    facts = preflight(tmp_path / "home", folder, table(folder, "a.png,x,p", "a.png,x,q"), GENERATOR, fix=True)
    assert facts["fixed"] is False
    assert facts["waits_for"] == ["two-patients"]


def test_a_changed_file_is_not_the_one_that_was_checked(tmp_path: Path) -> None:
    folder, home = tmp_path / "d", tmp_path / "home"
    data = csv_folder(folder)
    preflight(home, folder, data, GENERATOR, fix=True)
    draw(99).save(folder / "03.png")
    with pytest.raises(BadInput, match=r"03\.png: changed since it was checked; run `check --fix` again"):
        make_snapshot(home, data, folder)
    (folder / "03.png").unlink()
    with pytest.raises(BadInput, match=r"03\.png: gone since it was checked"):
        make_snapshot(home, data, folder)


def test_a_second_fix_says_that_the_snapshot_is_of_another_list(tmp_path: Path) -> None:
    folder, home = tmp_path / "d", tmp_path / "home"
    data = csv_folder(folder)
    assert not preflight(home, folder, data, GENERATOR, fix=True)["older_snapshot"]
    make_snapshot(home, data, folder)
    assert not preflight(home, folder, data, GENERATOR, fix=True)["older_snapshot"]
    draw(99).save(folder / "03.png")
    facts = preflight(home, folder, data, GENERATOR, fix=True)
    assert facts["older_snapshot"]
    assert OLDER in words(facts)
    assert html.escape(OLDER) in page(facts)
    make_snapshot(home, data, folder)
    assert not preflight(home, folder, data, GENERATOR, fix=True)["older_snapshot"]


# ---------------------------------------------------------------- kills and workers


def test_after_kill_9_finished_looks_are_not_redone(tmp_path: Path) -> None:
    folder, home = tmp_path / "d", tmp_path / "home"
    folder.mkdir()
    for number in range(200):
        draw(number, (256, 256)).save(folder / f"{number}.png")
    data = table(folder, *(f"{number}.png,x,p{number}" for number in range(200)))
    child = subprocess.Popen(
        [sys.executable, "-m", "polyclinic.client.cli", "check", str(folder), "--home", str(home)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    store = home / "data" / "looks.sqlite-wal"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (store.exists() and store.stat().st_size > 60_000):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    facts = preflight(home, folder, data, GENERATOR)
    assert 0 < facts["remembered"] < 200
    assert facts["remembered"] + facts["looked_at"] == 200
    again = preflight(home, folder, data, GENERATOR)
    assert (again["remembered"], again["looked_at"]) == (200, 0)
    assert [row["code"] for row in again["findings"]] == [row["code"] for row in facts["findings"]]


def test_a_worker_that_dies_costs_its_image_alone_and_another_takes_over(tmp_path: Path) -> None:
    draw(1).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "waits.png")
    with started() as workers:
        assert workers.look(tmp_path / "a.png", "")["size"] == [48, 40]
        (worker,) = workers._all
        worker.send_signal(signal.SIGKILL)
        worker.wait(10)
        assert workers.look(tmp_path / "a.png", "") == {"found": [("decoder-crashed", "exit code -9")]}
        assert workers.look(tmp_path / "a.png", "")["size"] == [48, 40]
        (worker,) = workers._all
    assert worker.poll() is not None


# ---------------------------------------------------------------- the commands


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_the_commands_say_what_is_there_and_keep_it_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, home = tmp_path / "d", tmp_path / "home"
    csv_folder(folder)
    os.umask(0o022)
    assert run("check", folder, "--home", home) == 0
    words = capsys.readouterr().out
    assert "12 images of 6 patients, 12 captions" in words
    assert run("check", folder, "--home", home, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["labels"]["polyp"] == {"share": 1.0, "values": 1, "most": {"yes": 12}}
    page = Path(facts["report"]).read_text()
    assert "http" not in page.replace("http-equiv", "")
    (folder / "00.png").write_bytes(b"")
    assert run("check", folder, "--home", home) == 2
    assert "1 findings keep it from being used as it is; mend them, or give --fix" in capsys.readouterr().err
    assert run("check", folder, "--home", home, "--fix") == 0
    capsys.readouterr()
    assert run("snapshot", folder, "--home", home, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["images"], made["checked"]) == (11, True)
    assert {path.stat().st_mode & 0o077 for path in (home / "data").rglob("*")} == {0}


def test_headers_that_name_a_person_are_named_by_attribute_never_by_value(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    data = dicom(folder)
    facts = preflight(tmp_path / "home", folder, data, GENERATOR)
    (row,) = [row for row in facts["findings"] if row["code"] == "dicom-identifiers"]
    assert row["count"] == 13
    assert row["examples"][0]["detail"] == "PatientName"
    assert "Doe" not in json.dumps(facts)
    assert "MRN" not in "".join(p.read_text() for p in (tmp_path / "home" / "data").glob("*.jsonl"))


@pytest.mark.parametrize("name", SETS)
def test_every_form_passes_check_and_snapshot(name: str, tmp_path: Path) -> None:
    folder, home = tmp_path / "d", tmp_path / "home"
    data = SETS[name](folder)
    facts = preflight(home, folder, data, GENERATOR, fix=True)
    assert not {row["severity"] for row in facts["findings"]} & {"stop", "error"}
    made = make_snapshot(home, data, folder)
    assert made["images"] == facts["images"] == facts["accepted"]
    assert made["patients"] == facts["patients"]
    strict = read_records(
        data, folder, (home / "data" / "patients.key").read_bytes() if name == "dicom" else None
    )
    assert sorted(site_records(home, data, folder), key=str) == sorted(strict, key=str)


def test_a_jpeg_of_a_phone_is_upright(tmp_path: Path) -> None:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    draw(3).save(stream, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())
    assert open_image(tmp_path / "a.jpg").size == (40, 48)
