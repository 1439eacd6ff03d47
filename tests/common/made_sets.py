"""Small data sets in exactly the form each is handed out in, made of drawings."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from polyclinic.common.settings import DataSettings

CLASSES = ("cl8k2", "cla82", "clb0k", "clb0l")


def draw(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A picture that no other number has: a disc and a bar on a grained ground."""
    random = np.random.default_rng(number)
    ground = random.integers(60, 190, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    x, y, side = (int(v) for v in random.integers(2, 24, 3))
    pen.ellipse((x, y, x + side + 4, y + side + 4), fill=tuple(int(v) for v in random.integers(0, 255, 3)))
    pen.rectangle((y, x, y + 4, x + side), fill=tuple(int(v) for v in random.integers(0, 255, 3)))
    return image


def encoded(number: int, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    draw(number).save(stream, kind)
    return stream.getvalue()


def medvqa(folder: Path, images: int = 12) -> DataSettings:
    """`;`, CRLF, header `Prompt;Filename`, rows of an image apart from each other."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(images):
        name = f"{CLASSES[number % 4]}{number:020d}.jpg"
        (folder / "images" / name).write_bytes(encoded(number))
        polyp = "containing a polyp" if number % 2 else "with no polyps"
        rows += [
            (f"Generate an image {polyp}.", name),
            ("Generate an image with an an instrument located in the lower-right.", name),
        ]
        rows += [("Generate an image not containing a green/black box artefact.", name)] * 5
    rows.sort(key=lambda row: row[0])
    text = "Prompt;Filename\r\n" + "".join(f"{prompt};{name}\r\n" for prompt, name in rows)
    (folder / "prompt-gt.csv").write_bytes(text.encode("ascii"))
    return DataSettings(source="medvqa-gi-2024", unit="image", image_size=32)


def _kvasir_rows(images: int) -> list[dict[str, object]]:
    return [
        {
            "img_id": f"img{number:02d}",
            "question": question,
            "answer": answer,
            "source": ("hyperkvasir", "instrument")[number % 2],
        }
        for number in range(images)
        for question, answer in (
            ("Is there a polyp?", ("yes", "no")[number % 2]),
            ("Where is it?", "Center; Center-left"),
        )
    ]


def _kvasir_captions(folder: Path, images: int) -> DataSettings:
    captions = {
        f"img{number:02d}": {
            "polyp": [f"A colonoscopy with {number} polyps.", "Another wording."],
            "box": ["No box."],
        }
        for number in range(images)
    }
    (folder / "kvasir-captions.json").write_text(json.dumps(captions))
    return DataSettings(source="kvasir-vqa", unit="image", image_size=32)


def kvasir_folder(folder: Path, images: int = 12) -> DataSettings:
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        (folder / "images" / f"img{number:02d}.jpg").write_bytes(encoded(number))
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["source", "question", "answer", "img_id"])
        writer.writeheader()
        writer.writerows(_kvasir_rows(images))
    return _kvasir_captions(folder, images)


def _with_images(rows: list[dict[str, object]], key: str) -> list[dict[str, object]]:
    order = sorted({str(row[key]) for row in rows})
    return [
        {"image": {"bytes": encoded(order.index(str(row[key]))), "path": f"{row[key]}.jpg"}, **row}
        for row in rows
    ]


def kvasir_parquet(folder: Path, images: int = 12) -> DataSettings:
    """As `huggingface-cli download SimulaMet-HOST/Kvasir-VQA --repo-type dataset` leaves it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    rows = _with_images(_kvasir_rows(images), "img_id")
    for shard in range(2):
        part = pa.Table.from_pylist(rows[shard * images : (shard + 1) * images])
        pq.write_table(part, folder / "data" / f"{shard:05d}.parquet", row_group_size=5)
    return _kvasir_captions(folder, images)


def kvasir_arrow(folder: Path, images: int = 12) -> DataSettings:
    """As `load_dataset(...).save_to_disk(...)` leaves it: arrow streams beside JSON files."""
    import pyarrow as pa
    import pyarrow.ipc

    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(_with_images(_kvasir_rows(images), "img_id"))
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        for batch in table.to_batches(max_chunksize=7):
            stream.write_batch(batch)
    (folder / "state.json").write_text("{}")
    return _kvasir_captions(folder, images)


def rocov2(folder: Path, images: int = 12) -> DataSettings:
    for split, count in (("train", images - 4), ("valid", 2), ("test", 2)):
        (folder / f"{split}_images").mkdir(parents=True)
        names = [f"ROCOv2_2023_{split}_{number:06d}" for number in range(1, count + 1)]
        for number, name in enumerate(names):
            (folder / f"{split}_images" / f"{name}.jpg").write_bytes(encoded(number + 100 * ord(split[1])))
        with (folder / f"{split}_captions.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [("ID", "Caption"), *((n, f"Chest CT, with a nodule, of {n[-3:]}.") for n in names)]
            )
        with (folder / f"{split}_concepts.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("ID", "CUIs"), *((n, "C0040405;C0817096") for n in names)])
    return DataSettings(source="rocov2", unit="image", image_size=32)


def rocov2_parquet(folder: Path, images: int = 12) -> DataSettings:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    for split, count in (("train", images - 4), ("validation", 2), ("test", 2)):
        rows: list[dict[str, object]] = [
            {
                "image_id": f"ROCOv2_2023_{split}_{number:06d}",
                "caption": f"An X-ray, {number}.",
                "cui": ["C1306645"],
            }
            for number in range(count)
        ]
        shown = [
            {"image": {"bytes": encoded(number + 100 * ord(split[1]), "PNG"), "path": None}, **row}
            for number, row in enumerate(rows)
        ]
        pq.write_table(
            pa.Table.from_pylist(shown), folder / "data" / f"{split}-00000-of-00001.parquet", row_group_size=3
        )
    return DataSettings(source="rocov2", unit="image", image_size=32)


def nih(folder: Path, images: int = 12) -> DataSettings:
    """The 2020 table, two archives unpacked, and rows of a third that was not downloaded."""
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    rows = []
    for number in range(images + 3):
        patient, name = number // 2 + 1, f"{number // 2 + 1:08d}_{number % 2:03d}.png"
        findings = ("No Finding", "Effusion|Pleural_Thickening", "Pneumonia")[number % 3]
        rows.append(
            f"{name},{findings},{number % 2},{patient},{(58, 81, 414)[number % 3]},{'MF'[number % 2]},"
            "PA,2500,2048,0.171,0.171"
        )
        if number < images:
            place = folder / f"images_{number % 2 + 1:03d}" / "images"
            place.mkdir(parents=True, exist_ok=True)
            draw(number).convert("L").save(place / name)
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([header, *rows]) + "\n")
    return DataSettings(source="nih-chest-xray14", image_size=32)


def csv_folder(folder: Path, images: int = 12) -> DataSettings:
    folder.mkdir(parents=True)
    rows = ["image,caption,patient,site,polyp"]
    for number in range(images):
        draw(number).save(folder / f"{number:02d}.png")
        rows.append(f"{number:02d}.png,a picture of {number},p{number // 2},north,yes")
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    return DataSettings(image_size=32)


def jsonl_folder(folder: Path, images: int = 12) -> DataSettings:
    """Hugging Face imagefolder: metadata.jsonl with file_name and text."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(images):
        draw(number).save(folder / f"{number:02d}.png")
        lines.append(
            json.dumps(
                {
                    "file_name": f"{number:02d}.png",
                    "text": f"a picture of {number}",
                    "patient": f"p{number // 2}",
                }
            )
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return DataSettings(table="metadata.jsonl", image_size=32)


def dicom(folder: Path, images: int = 12) -> DataSettings:
    """Studies of single films, one cine of two frames, a report and a DICOMDIR between them."""
    for number in range(images):
        where = folder / f"PAT{number // 2}" / "STUDY1"
        where.mkdir(parents=True, exist_ok=True)
        frames = np.stack(
            [np.asarray(draw(number + 50 * f).convert("L")) for f in range(2 if number == 0 else 1)]
        )
        write_dicom(
            where / f"IM{number:04d}",
            frames,
            PatientID=f"MRN-{number // 2}",
            SOPInstanceUID=f"1.2.3.{number}",
        )
    write_dicom(folder / "report.dcm", None, PatientID="MRN-1", SOPInstanceUID="1.2.4")
    (folder / "README.txt").write_text("exported")
    return DataSettings(
        source="dicom", caption="{Modality} of the {BodyPartExamined}, {ViewPosition} view", image_size=32
    )


def write_dicom(
    path: Path, frames: np.ndarray | None, *, syntax: str = "1.2.840.10008.1.2.1", **elements: object
) -> None:
    """Write a part-10 file; elements by keyword override what is set here, None takes one away."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID

    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = UID(syntax)
    found.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1" if frames is not None else "1.2.840.10008.5.1.4.1.1.88.11"
    found.PatientID, found.PatientName = "MRN-0", "Doe^Jane"
    found.Modality, found.BodyPartExamined, found.ViewPosition, found.PatientSex = "DX", "CHEST", "PA", "F"
    found.SOPInstanceUID = "1.2.3"
    if frames is not None:
        found.NumberOfFrames, found.Rows, found.Columns = frames.shape[:3]
        color = frames.ndim == 4
        found.SamplesPerPixel, found.PhotometricInterpretation = (3, "RGB") if color else (1, "MONOCHROME2")
        if color:
            found.PlanarConfiguration = 0
        found.BitsAllocated = found.BitsStored = 8 * frames.dtype.itemsize
        found.HighBit, found.PixelRepresentation = found.BitsStored - 1, int(frames.dtype.kind == "i")
        found.PixelData = frames.tobytes() + b"\0" * (frames.nbytes % 2)
    for name, value in elements.items():
        if value is None:
            delattr(found, name)
        elif isinstance(value, Dataset):
            setattr(found, name, [value])
        else:
            setattr(found, name, value)
    found.file_meta.MediaStorageSOPClassUID = found.get("SOPClassUID", "1.2.3")
    found.file_meta.MediaStorageSOPInstanceUID = found.get("SOPInstanceUID", "1.2.3")
    found.save_as(path, enforce_file_format=True)


MakeSet = Callable[..., DataSettings]
SETS: dict[str, MakeSet] = {
    "medvqa": medvqa,
    "kvasir folder": kvasir_folder,
    "kvasir parquet": kvasir_parquet,
    "kvasir arrow": kvasir_arrow,
    "rocov2": rocov2,
    "rocov2 parquet": rocov2_parquet,
    "nih": nih,
    "csv": csv_folder,
    "imagefolder": jsonl_folder,
    "dicom": dicom,
}


def rocov2_many(folder: Path, images: int = 240) -> DataSettings:
    """Captions and concepts of several modalities; all images are one small file under many names."""
    (folder / "train_images").mkdir(parents=True)
    cuis = ("C0040405", "C1306645", "C0024485", "C0041618", "C0817096")
    names = [f"ROCOv2_2023_train_{number:06d}" for number in range(images)]
    for name in names:
        (folder / "train_images" / f"{name}.jpg").write_bytes(encoded(1))
    for kind, head, cells in (
        ("captions", "Caption", [f"Image {number}." for number in range(images)]),
        ("concepts", "CUIs", [cuis[number % 5] for number in range(images)]),
    ):
        with (folder / f"train_{kind}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("ID", head), *zip(names, cells, strict=True)])
    return DataSettings(source="rocov2", unit="image", image_size=32)
