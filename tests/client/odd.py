"""More damage, of our own invention: files that lie about themselves, and things that are no files."""

import io
import os
import socket
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.client.damaged import Make, gray, png, raw, save
from tests.common.made_sets import draw, encoded, write_dicom


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> Make:
    """A PNG with one more chunk after its header."""
    whole = encoded(31, "PNG")
    return raw(whole[:33] + _chunk(kind, data) + whole[33:])


def looping_exif(path: Path) -> None:
    """EXIF whose first directory names itself as the next one and as its own sub-directories."""
    tags = [(0x0112, 3, 6), (0x8769, 4, 8), (0x8825, 4, 8)]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + body + struct.pack("<I", 8)
    draw(32, (96, 64)).save(path, "JPEG", exif=exif)


def pages(number: int, *, last: int = 0, shown: int = 33) -> Make:
    """A TIFF of so many directories over one strip; the last one names `last` as the next."""
    strip = np.asarray(draw(shown, (64, 64)).convert("L")).tobytes()
    tags = [(256, 64), (257, 64), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64), (279, 4096)]
    head, size = 8 + len(strip), 2 + 12 * len(tags) + 4
    out = [b"II*\0", struct.pack("<I", head), strip]
    for page in range(number):
        after = head + (page + 1) * size if page + 1 < number else last and head
        out.append(struct.pack("<H", len(tags)))
        out += [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
        out.append(struct.pack("<I", after))
    return raw(b"".join(out))


def lying_strip(path: Path) -> None:
    """A TIFF whose strip claims four gigabytes."""
    pages(1, shown=47)(path)
    whole = path.read_bytes()
    path.write_bytes(
        whole.replace(struct.pack("<HHII", 279, 4, 1, 4096), struct.pack("<HHII", 279, 4, 1, 0xFFFFFFF0))
    )


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", encoded(34, "PNG"))


def many_scans(path: Path) -> None:
    """A progressive JPEG with its last scan five hundred times: each is decoded over the whole picture."""
    stream = io.BytesIO()
    draw(35, (512, 512)).save(stream, "JPEG", progressive=True)
    whole = stream.getvalue()
    scan = whole.rindex(b"\xff\xda")
    path.write_bytes(whole[:scan] + whole[scan:-2] * 500 + whole[-2:])


def huge_jpeg(path: Path) -> None:
    """A JPEG whose header says 65,500 pixels a side."""
    whole = bytearray(encoded(36, "JPEG"))
    at = whole.index(b"\xff\xc0") + 5
    whole[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    path.write_bytes(whole)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path may have 107 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def device(path: Path) -> None:
    """The device of endless zeros; only root may make one, others get a named pipe."""
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        os.mkfifo(path)


ODD: dict[str, tuple[str, Make, str]] = {
    "EXIF that leads to itself": (".jpg", looping_exif, "photo-location"),
    "EXIF of nonsense": (
        ".jpg",
        lambda p: draw(37).save(p, "JPEG", exif=b"Exif\0\0" + bytes(range(200))),
        "",
    ),
    "a private chunk of 5 MB": (".png", with_chunk(b"prIv", bytes(5_000_000)), ""),
    "a colour profile that unpacks to 100 MB": (
        ".png",
        with_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(100_000_000))),
        "unreadable",
    ),
    "TIFF of 10,000 pages": (".tif", pages(10_000), "several-frames"),
    "TIFF whose pages go in a circle": (".tif", pages(3, last=1), "several-frames"),
    "TIFF of one page that is its own next": (".tif", pages(1, last=1), ""),
    "TIFF with a strip of 4 GB": (".tif", lying_strip, ""),
    "zip named PNG": (".png", zipped, "unreadable"),
    "SVG named PNG": (".png", raw(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "unreadable"),
    "Photoshop named JPEG": (".jpg", raw(b"8BPS\0\1" + bytes(200)), "unreadable"),
    "progressive JPEG of 500 scans": (".jpg", many_scans, ""),
    "JPEG that says 65,500 pixels a side": (".jpg", huge_jpeg, "too-large"),
    "JPEG with 2 MB after its end": (".jpg", raw(encoded(38, "JPEG") + bytes(2_000_000)), ""),
    "two JPEGs in a row": (".jpg", raw(encoded(39, "JPEG") + encoded(41, "JPEG")), ""),
    "PNG without pixels": (
        ".png",
        raw(
            b"\x89PNG\r\n\x1a\n"
            + _chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
            + _chunk(b"IEND", b"")
        ),
        "damaged",
    ),
    "PNG of no width": (".png", raw(png(0, 64, b"")), "unreadable"),
    "moving PNG": (".png", save(draw(1), "PNG", save_all=True, append_images=[draw(2)]), "several-frames"),
    "PPM of a billion pixels a side": (
        ".ppm",
        raw(b"P6 999999999 999999999 255\n"),
        "too-large",
    ),
    "16-bit PGM": (".pgm", raw(b"P5 64 64 65535\n" + np.arange(4096, dtype=">u2").tobytes()), "deep-pixels"),
    "BMP of 2 billion rows": (
        ".bmp",
        raw(
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 64, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0)
        ),
        "too-large",
    ),
    "socket": (".png", listening, "no-image-file"),
    "device": (".png", device, "no-image-file"),
    "lied WEBP": (".webp", raw(b"RIFF\xff\xff\xff\x7fWEBPVP8 \xff\xff\xff\x7f" + bytes(64)), "unreadable"),
    "JPEG of two quantisation tables short": (
        ".jpg",
        raw(encoded(43, "JPEG").replace(b"\xff\xdb", b"\xff\xfe")),
        "damaged",
    ),
    "flat but one pixel": (".png", lambda p: _speck().save(p), "blank"),
}


def _speck() -> Image.Image:
    image = Image.new("L", (128, 128), 0)
    image.putpixel((5, 5), 255)
    return image


def pixel_data(change: Callable[[bytes], bytes]) -> Make:
    """A film whose PixelData is changed behind the header's back."""

    def make(path: Path) -> None:
        write_dicom(path, gray(), PixelData=change(gray().tobytes()))

    return make


def floats(*values: float) -> Make:
    """Float Pixel Data (7FE0,0008) that begins with these values."""

    def make(path: Path) -> None:
        frame = np.linspace(0, 1, 64 * 64, dtype="<f4")
        frame[: len(values)] = values
        write_dicom(
            path,
            gray(),
            PixelData=None,
            FloatPixelData=frame.tobytes(),
            Rows=64,
            Columns=64,
            BitsAllocated=32,
            BitsStored=None,
            HighBit=None,
            PixelRepresentation=None,
        )

    return make


def nested(path: Path) -> None:
    """A sequence in a sequence, two hundred deep."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeMeaning = "x"
    for _ in range(200):
        outer = Dataset()
        outer.ConceptCodeSequence = [item]
        item = outer
    write_dicom(path, gray(), ConceptCodeSequence=item)


def endless_value(path: Path) -> None:
    """PixelData whose length field says four gigabytes."""
    write_dicom(path, gray())
    whole = path.read_bytes()
    at = whole.rindex(b"\xe0\x7f\x10\x00") + 8
    path.write_bytes(whole[:at] + b"\xfe\xff\xff\xff" + whole[at + 4 :])


ODD_DICOMS: dict[str, tuple[Make, str]] = {
    "half of its pixels": (pixel_data(lambda d: d[: len(d) // 4 * 2]), "damaged"),
    "twice its pixels": (pixel_data(lambda d: d * 2), ""),
    "pixels of four gigabytes": (endless_value, ""),
    "no pixels at all": (pixel_data(lambda d: b""), "damaged"),
    "float pixels": (floats(), ""),
    "float pixels with NaN": (floats(float("nan"), float("inf")), ""),
    "a slope of nothing": (lambda p: write_dicom(p, gray(), RescaleSlope="0", RescaleIntercept="0"), "blank"),
    "a slope that is no number": (
        lambda p: write_dicom(p, gray(), RescaleSlope="1e400", RescaleIntercept="0"),
        "damaged",
    ),
    "a window turned round": (
        lambda p: write_dicom(p, gray(), WindowCenter=40, WindowWidth=-80),
        "damaged",
    ),
    "more bits than there are": (
        lambda p: write_dicom(p, gray(), BitsStored=16, HighBit=15),
        "damaged",
    ),
    "24 bits a sample": (lambda p: write_dicom(p, gray(), BitsAllocated=24), "damaged"),
    "four samples a pixel": (lambda p: write_dicom(p, gray(), SamplesPerPixel=4), "damaged"),
    "a billion frames": (lambda p: write_dicom(p, gray(), NumberOfFrames="1000000000"), "too-large"),
    "fewer than no frames": (lambda p: write_dicom(p, gray(), NumberOfFrames="-1"), "unreadable"),
    "no number of frames": (lambda p: write_dicom(p, gray(), NumberOfFrames="0"), ""),
    "an unknown colour": (lambda p: write_dicom(p, gray(), PhotometricInterpretation="MAUVE"), "damaged"),
    "an unknown alphabet": (lambda p: write_dicom(p, gray(), SpecificCharacterSet="ISO_IR 999"), ""),
    "a million frames and one": (lambda p: write_dicom(p, gray(), NumberOfFrames="1000001"), "too-large"),
    "900,000 frames": (lambda p: write_dicom(p, gray(), NumberOfFrames="900000"), "damaged"),
    "a backslash in the patient's id": (lambda p: write_dicom(p, gray(), PatientID="a\\b"), ""),
    "sequences 200 deep": (nested, ""),
    "a text file named .dcm": (raw(b"ID,Caption\n1,x\n"), "unreadable"),
    "a PNG named .dcm": (raw(encoded(45, "PNG")), "unreadable"),
    "a magic word alone": (raw(bytes(128) + b"DICM"), "unreadable"),
}
