"""Every door reads its source exactly as it is handed out; pixels of a frame or a row are its own."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyclinic.common.data.images import image_digest, open_image
from polyclinic.common.data.pixels import snapshot_hash
from polyclinic.common.data.sources import read_records, read_table
from polyclinic.common.data.table import patients_of
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings
from tests.common import made_sets
from tests.common.made_sets import SETS, encoded


@pytest.mark.parametrize("name", SETS)
def test_every_image_is_there_once_and_opens(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    data = SETS[name](folder)
    records = read_records(data, folder)
    assert len(records) == (13 if name == "dicom" else 12)
    assert len({(r.image, r.part) for r in records}) == len(records)
    assert len({image_digest(r.image, r.part) for r in records}) == len(records)
    assert {open_image(r.image, r.part).size for r in records} == {(48, 40)}
    assert all(r.captions for r in records)
    assert len(patients_of(records)) == (12 if data.unit == "image" else 6)


def test_medvqa_keeps_all_prompts_of_an_image_with_it(tmp_path: Path) -> None:
    data = made_sets.medvqa(tmp_path / "d")
    records = read_records(data, tmp_path / "d")
    assert {r.site for r in records} == {"cl8k2", "cla82", "clb0k", "clb0l"}
    assert {len(r.captions) for r in records} == {7}
    by_id = {r.patient: r for r in records}
    first = by_id["cl8k200000000000000000000.jpg"]
    assert first.labels == {"source": "polyps", "polyp": "no", "instrument": "yes", "box": "no"}
    assert "Generate an image with an an instrument located in the lower-right." in first.captions


def test_kvasir_gives_the_same_images_in_all_three_forms(tmp_path: Path) -> None:
    found = []
    for name in ("kvasir folder", "kvasir parquet", "kvasir arrow"):
        folder = tmp_path / name
        records = read_records(SETS[name](folder), folder)
        found.append(
            sorted(
                (r.patient, image_digest(r.image, r.part), r.captions, r.site, str(r.labels)) for r in records
            )
        )
    assert found[0] == found[1] == found[2]
    assert found[0][0][2] == ("A colonoscopy with 0 polyps.", "Another wording.", "No box.")
    assert "Is there a polyp?" in found[0][0][4]


def test_a_row_s_pixels_are_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    data = made_sets.rocov2_parquet(folder)
    train = [r for r in read_records(data, folder) if r.labels["split"] == "train"]
    for number, record in enumerate(train):
        expected = Image.open(io.BytesIO(encoded(number + 100 * ord("r"), "PNG")))
        assert np.array_equal(np.asarray(open_image(record.image, record.part)), np.asarray(expected))
    assert train[0].labels == {"split": "train", "modality": "X-ray"}


def test_a_changed_row_changes_no_other_row_s_hash(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = made_sets.rocov2_parquet(tmp_path / "d")
    path = tmp_path / "d" / "data" / "train-00000-of-00001.parquet"
    before = [image_digest(path, str(row)) for row in range(8)]
    rows = pq.read_table(path).to_pylist()
    rows[3]["image"]["bytes"] = encoded(999)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    after = [image_digest(path, str(row)) for row in range(8)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [row != 3 for row in range(8)]
    assert len(read_records(data, tmp_path / "d")) == 12


def test_nih_composes_captions_and_leaves_aside_what_was_not_downloaded(tmp_path: Path) -> None:
    data = made_sets.nih(tmp_path / "d")
    table = read_table(data, tmp_path / "d")
    assert [r.captions[0] for r in table.records[:3]] == [
        "PA chest X-ray of a 58-year-old man with no finding.",
        "PA chest X-ray of an 81-year-old woman showing effusion, pleural thickening.",
        "PA chest X-ray of a man showing pneumonia.",
    ]
    assert [(p.code, p.skipped) for p in table.problems] == [("no-image-file", True)]
    assert "3 of 15 rows" in table.problems[0].what


def test_dicom_frames_are_one_patient_s_and_ids_are_hashed_with_the_site_s_key(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    data = made_sets.dicom(folder)
    table = read_table(data, folder, b"k" * 32)
    groups = patients_of(table.records)
    assert sorted(len(group) for group in groups.values()) == [2] * 5 + [3]
    assert not any("MRN" in patient for patient in groups)
    assert groups.keys() != patients_of(read_table(data, folder, b"x" * 32).records).keys()
    assert {r.captions for r in table.records} == {("DX of the CHEST, PA view",)}
    cine = [r for r in table.records if r.part]
    assert [r.part for r in cine] == ["0", "1"]
    for record, number in zip(cine, (0, 50), strict=True):
        gray = np.asarray(made_sets.draw(number).convert("L"), dtype=float)
        spread = ((gray - gray.min()) / (gray.max() - gray.min()) * 255).round()
        assert np.array_equal(np.asarray(open_image(record.image, record.part))[:, :, 0], spread)
    assert {p.code for p in table.problems} == {"not-an-image"}
    assert all(p.skipped for p in table.problems)


def test_dicom_captions_from_a_table_joined_on_the_instance(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    made_sets.dicom(folder, 4)
    rows = [f"1.2.3.{n},caption {n}" for n in range(3)] + ["1.2.3.0,another", "9.9,of no image"]
    (folder / "captions.csv").write_text("SOPInstanceUID,caption\n" + "\n".join(rows) + "\n")
    table = read_table(DataSettings(source="dicom", table="captions.csv"), folder)
    assert {r.captions for r in table.records} == {("caption 0", "another"), ("caption 1",), ("caption 2",)}
    assert [p.code for p in table.problems if not p.skipped] == ["empty-caption"]
    with pytest.raises(BadInput, match=r"IM0003: the caption of .* is empty"):
        read_records(DataSettings(source="dicom", table="captions.csv"), folder)


@pytest.mark.parametrize(
    "template", ["{PatientName}", "{StudyDate} film", "{Modality", "{}", "{AccessionNumber}"]
)
def test_a_template_may_not_name_a_person_or_a_day(template: str) -> None:
    with pytest.raises(ValueError, match=r"may not be in a caption|braces hold"):
        DataSettings(source="dicom", caption=template)


@pytest.mark.parametrize("source", ["medvqa-gi-2024", "kvasir-vqa", "rocov2"])
def test_where_there_are_no_patients_the_study_must_say_so(source: str) -> None:
    with pytest.raises(ValueError, match='no patient ids: write unit = "image"'):
        DataSettings.model_validate({"source": source})


def test_the_snapshot_is_of_content_in_every_form(tmp_path: Path) -> None:
    for name in ("medvqa", "kvasir parquet", "dicom"):
        data = SETS[name](tmp_path / name / "a")
        shutil.copytree(tmp_path / name / "a", tmp_path / name / "b")
        one, other = (read_records(data, tmp_path / name / where) for where in "ab")
        assert snapshot_hash(one) == snapshot_hash(other[::-1])


def test_jsonl_mistakes_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    data = made_sets.jsonl_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a", "patient": 7}\n[1]\n')
    with pytest.raises(BadInput, match=r"metadata\.jsonl, line 2: not a JSON object"):
        read_records(data, folder)
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "00.png", "text": "a", "patient": 7}) + "\n{\n"
    )
    with pytest.raises(BadInput, match=r"metadata\.jsonl, line 2: not JSON"):
        read_records(data, folder)
    with pytest.raises(BadInput, match=r"metadata\.jsonl is there: name it in the study"):
        read_records(DataSettings(), folder)
