"""Damaged and odd inputs of every kind, each made as it comes about, with the code it must be found under."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from tests.common.made_sets import draw, encoded, write_dicom

Make = Callable[[Path], None]


def cut(kind: str, share: float) -> Make:
    def make(path: Path) -> None:
        whole = encoded(1, kind)
        path.write_bytes(whole[: int(len(whole) * share)])

    return make


def raw(data: bytes) -> Make:
    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def save(image: Image.Image, kind: str, **options: object) -> Make:
    return lambda path: image.save(path, kind, **options)


def flipped(path: Path) -> None:
    """A PNG with a broken checksum in its pixels."""
    whole = bytearray(encoded(3, "PNG"))
    at = whole.index(b"IDAT") + 40
    whole[at] ^= 0xFF
    path.write_bytes(whole)


def png(width: int, height: int, rows: bytes, color: int = 0) -> bytes:
    """A PNG by hand: what it says of itself need not be what it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def text_bomb(path: Path) -> None:
    """A compressed text chunk of 100 MB inside a small PNG."""
    whole = encoded(2, "PNG")
    data = b"Comment\0\0" + zlib.compress(b"x" * 100_000_000, 1)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    path.write_bytes(whole[:33] + chunk + whole[33:])


def moving(kind: str) -> Make:
    frames = [draw(n).convert("P" if kind == "GIF" else "RGB") for n in range(3)]
    return save(frames[0], kind, save_all=True, append_images=frames[1:])


def with_text(path: Path) -> None:
    image = draw(5, (320, 240)).convert("L").point(lambda v: v // 2)
    ImageDraw.Draw(image).text((8, 8), "DOE^JANE 12.03.1961", fill=255, font=ImageFont.load_default(18))
    image.save(path, "PNG")


def with_position(path: Path) -> None:
    exif = Image.Exif()
    exif[0x8825] = {1: "N", 2: (59.0, 54.0, 0.0)}
    draw(6).save(path, "JPEG", exif=exif)


def with_author(path: Path) -> None:
    exif = Image.Exif()
    exif[0x013B], exif[0x0132] = "Dr. Who", "2023:11:04 10:00:00"
    draw(7).save(path, "JPEG", exif=exif)


def with_text_chunk(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Jane Doe")
    draw(8).save(path, "PNG", pnginfo=info)


def outside(path: Path) -> None:
    secret = path.parents[1] / "secret.png"
    draw(9).save(secret)
    path.symlink_to(secret)


# Suffix, how it is made, the code it is found under ("" for none: it simply reads).
IMAGES: dict[str, tuple[str, Make, str]] = {
    "truncated JPEG": (".jpg", cut("JPEG", 0.8), "damaged"),
    "JPEG of its header only": (".jpg", cut("JPEG", 0.05), "unreadable"),
    "truncated PNG": (".png", cut("PNG", 0.6), "damaged"),
    "truncated TIFF": (".tif", cut("TIFF", 0.5), "damaged"),
    "truncated GIF": (".gif", cut("GIF", 0.4), "damaged"),
    "truncated WEBP": (".webp", cut("WEBP", 0.5), "unreadable"),
    "PNG with a broken checksum": (".png", flipped, "damaged"),
    "empty file": (".png", raw(b""), "unreadable"),
    "text named PNG": (".png", raw(b"not an image at all"), "unreadable"),
    "HTML error page named JPEG": (".jpg", raw(b"<html>404 not found</html>"), "unreadable"),
    "zero bytes": (".jpg", raw(b"\0" * 4096), "unreadable"),
    "noise": (".jpg", raw(np.random.default_rng(0).bytes(8192)), "unreadable"),
    "PostScript": (".eps", raw(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "unreadable"),
    "16-bit PNG": (
        ".png",
        lambda p: Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(p),
        "deep-pixels",
    ),
    "float TIFF": (".tif", lambda p: Image.fromarray(np.ones((32, 32), np.float32)).save(p), "deep-pixels"),
    "CMYK JPEG": (".jpg", lambda p: draw(11).convert("CMYK").save(p), ""),
    "palette PNG with transparency": (
        ".png",
        lambda p: draw(12).convert("P").save(p, transparency=0),
        "",
    ),
    "bilevel TIFF": (".tif", lambda p: draw(13).convert("1").save(p), ""),
    "turned by EXIF": (".jpg", lambda p: draw(14).save(p, exif=_turned()), ""),
    "animated GIF": (".gif", moving("GIF"), "several-frames"),
    "animated WEBP": (".webp", moving("WEBP"), "several-frames"),
    "TIFF of several pages": (".tif", moving("TIFF"), "several-frames"),
    "1-pixel image": (".png", save(Image.new("RGB", (1, 1)), "PNG"), "too-small"),
    "flat colour": (".png", save(Image.new("RGB", (64, 64), (9, 9, 9)), "PNG"), "blank"),
    "a strip": (".png", save(draw(15).resize((400, 40)), "PNG"), "extreme-shape"),
    "30,000 pixels a side": (".png", raw(png(30_000, 30_000, b"")), "too-large"),
    "30,000 pixels wide": (".png", save(draw(16).resize((30_000, 40)), "PNG"), "extreme-shape"),
    "decompression bomb": (".png", raw(png(16_000, 16_000, b"\0" * (16_001 * 16_000))), "too-large"),
    "text-chunk bomb": (".png", text_bomb, "unreadable"),
    "one row where 500 are promised": (".png", raw(png(500, 500, b"\0" * 501)), "blank"),
    "wrong extension": (".png", raw(encoded(17, "JPEG")), "wrong-extension"),
    "symlink out of the folder": (".png", outside, "outside"),
    "symlink in a circle": (".png", lambda p: p.symlink_to(p), "no-image-file"),
    "folder named as an image": (".png", lambda p: p.mkdir(), "no-image-file"),
    "a named pipe": (".png", lambda p: os.mkfifo(p), "no-image-file"),
    "burned-in text": (".png", with_text, "burned-in-text"),
    "GPS position": (".jpg", with_position, "photo-location"),
    "author and date": (".jpg", with_author, "photo-metadata"),
    "patient in a text chunk": (".png", with_text_chunk, "photo-metadata"),
}  # fmt: skip


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def gray(bits: int = 8) -> np.ndarray:
    """One frame of a film."""
    eight = np.asarray(draw(21).convert("L"))[None]
    return eight if bits == 8 else (eight.astype(np.uint16) << 4)


def cut_dicom(path: Path) -> None:
    write_dicom(path, gray())
    path.write_bytes(path.read_bytes()[:-900])


def big_endian(path: Path) -> None:
    shown = gray(12).astype(">u2")
    write_dicom(path, shown, syntax="1.2.840.10008.1.2.2", BitsStored=12, HighBit=11)


def palette(path: Path) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).tobytes()
    tables: dict[str, object] = {
        f"{color}PaletteColorLookupTableData": ramp for color in ("Red", "Green", "Blue")
    }
    shapes: dict[str, object] = {
        f"{color}PaletteColorLookupTableDescriptor": [256, 0, 16] for color in ("Red", "Green", "Blue")
    }
    write_dicom(
        path,
        gray(),
        PhotometricInterpretation="PALETTE COLOR",
        syntax="1.2.840.10008.1.2.1",
        **tables,
        **shapes,
    )


def pdf(path: Path) -> None:
    write_dicom(path, None, SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1", EncapsulatedDocument=b"%PDF-1.4 ")


def bad_fragments(path: Path) -> None:
    """Two frames are promised; the second one's JPEG is noise."""
    from pydicom import dcmread
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit

    write_dicom(path, gray())
    found = dcmread(path)
    found.NumberOfFrames = 2
    stream = io.BytesIO()
    draw(21).convert("L").save(stream, "JPEG")
    found.PixelData = encapsulate([stream.getvalue(), b"\xff\xd8noise" * 40])
    found["PixelData"].is_undefined_length = True
    found.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    found.save_as(path)


def deflated_bomb(path: Path) -> None:
    write_dicom(path, gray(), syntax="1.2.840.10008.1.2.1.99")
    head = path.read_bytes()
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = bytes(1 << 24)
    body = b"".join(packer.compress(zeros) for _ in range(40)) + packer.flush()
    length = 144 + int.from_bytes(head[140:144], "little")
    path.write_bytes(head[:length] + body)


DICOMS: dict[str, tuple[Make, str]] = {
    "cut off": (cut_dicom, "damaged"),
    "big-endian": (big_endian, ""),
    "palette colour": (palette, ""),
    "MONOCHROME1": (lambda p: write_dicom(p, gray(), PhotometricInterpretation="MONOCHROME1"), ""),
    "colour": (lambda p: write_dicom(p, np.asarray(draw(22))[None]), ""),
    "without pixels": (lambda p: write_dicom(p, None), "left-aside"),
    "encapsulated PDF": (pdf, "left-aside"),
    "corrupt multi-frame": (bad_fragments, "damaged"),
    "no patient": (lambda p: write_dicom(p, gray(), PatientID=""), "empty-patient"),
    "nothing to caption": (
        lambda p: write_dicom(p, gray(), Modality="", BodyPartExamined="", ViewPosition=""),
        "empty-caption",
    ),
    "a window of no width": (lambda p: write_dicom(p, gray(), WindowCenter=10, WindowWidth=0), "damaged"),
    "sizes that make no sense": (lambda p: write_dicom(p, gray(), Rows=0), "unreadable"),
    "60,000 x 60,000": (lambda p: write_dicom(p, gray(), Rows=60_000, Columns=60_000), "too-large"),
    "deflated bomb": (deflated_bomb, "too-large"),
    "noise named .dcm": (raw(np.random.default_rng(1).bytes(4096)), "unreadable"),
    "says it is burned in": (lambda p: write_dicom(p, gray(), BurnedInAnnotation="YES"), "burned-in-text"),
}
