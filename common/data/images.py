"""From a file (and a part of it) to RGB pixels, and to the hash of its content.

What lies in the file decides how it is read, not its suffix. Memory is bounded before a pixel is decoded:
the header's size is looked at first. Free of torch, so that the workers of `check` start quickly.
"""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from polyclinic.common.files import sha256_file
from polyclinic.common.refusals import BadInput

# 64 million pixels are 192 MB as RGB: four times the largest mammogram or plain film.
MAX_PIXELS = 64_000_000
# Pillow knows more formats; some start other programs, and none of them holds a medical image.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
TABLES = (".parquet", ".arrow")
# Pillow's own guard warns at this size and raises at twice of it; ours, of any shape, comes first.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class UnusableImage(BadInput):
    """An image that cannot be trained on.

    Args:
        name: File and part.
        code: A code of `client/check/codes.py`.
        what: What is wrong.
        fix: What a person does about it.
    """

    def __init__(self, name: str, code: str, what: str, fix: str) -> None:
        self.code, self.what, self.fix = code, what, fix
        super().__init__(f"{name}: {what}; {fix}")

    def __reduce__(self) -> tuple[type[UnusableImage], tuple[str, str, str, str]]:
        """Cross from a worker process whole."""
        name = str(self).removesuffix(f": {self.what}; {self.fix}")
        return UnusableImage, (name, self.code, self.what, self.fix)


def is_dicom(path: Path) -> bool:
    """Tell DICOM by its magic word, or by its suffix where the preamble was lost."""
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def open_image(path: Path, part: str = "") -> Image.Image:
    """Decode one image to RGB, upright.

    Args:
        path: Image, DICOM, parquet or arrow file.
        part: Frame or row, as in `Record.part`.

    Raises:
        UnusableImage: It cannot be read whole, is too large, moves, or holds more than 8 bits a pixel in a
            format that does not say what they mean.
    """
    name = f"{path} [{part}]" if part else str(path)
    try:
        if path.suffix in TABLES and part:
            from polyclinic.common.data.parquet import row_bytes

            return _decode(io.BytesIO(row_bytes(path, int(part))), name)
        if is_dicom(path):
            from polyclinic.common.data.dicom_pixels import read_frame

            return Image.fromarray(read_frame(path, int(part or 0)))
        return _decode(path, name)
    except OSError as error:
        raise _unreadable(name, error) from error


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    opened = False
    try:
        with Image.open(source, formats=FORMATS) as image:
            opened = True
            check_size(name, *image.size)
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                what = f"holds {getattr(image, 'n_frames', 2)} frames or pages"
                raise UnusableImage(name, "several-frames", what, "save each as a file of its own")
            if image.mode[0] in "IF":
                # Pillow would cut every value above 255 to white.
                what = f"more than 8 bits a pixel ({image.mode})"
                raise UnusableImage(name, "deep-pixels", what, "save it with 8 bits")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                # What is transparent shows what the person saw: nothing, not the bytes beneath.
                seen = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", seen.size, (0, 0, 0, 255)), seen).convert(
                    "RGB"
                )
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        pixels = next((int(word.strip("(")) for word in str(error).split() if word.strip("(").isdigit()), 0)
        what = f"{pixels / 1e6:.0f} million pixels, more than {MAX_PIXELS // 10**6} million"
        raise UnusableImage(name, "too-large", what, "make it smaller or cut out what matters") from error
    except UnidentifiedImageError as error:
        what = f"unreadable image (none of {', '.join(FORMATS)})"
        raise UnusableImage(name, "unreadable", what, _REPLACE) from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        ArithmeticError,
        EOFError,
        LookupError,
        TypeError,
        MemoryError,
        NotImplementedError,
    ) as error:
        raise _unreadable(name, error, "damaged" if opened else "unreadable") from error


_REPLACE = "replace the file or remove its row"


def _unreadable(name: str, error: Exception, code: str = "unreadable") -> UnusableImage:
    text = " ".join(str(error).split()) or type(error).__name__
    return UnusableImage(name, code, f"unreadable image ({text})", _REPLACE)


def check_size(name: str, width: int, height: int) -> None:
    """Refuse what would not fit into memory, before it is decoded.

    Raises:
        UnusableImage: `too-large`.
    """
    if width * height > MAX_PIXELS:
        what = f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} million"
        raise UnusableImage(name, "too-large", what, "make it smaller or cut out what matters")


def image_digest(path: Path, part: str = "") -> str:
    """Hash an image's content: its file, its row, or its file and frame.

    Returns:
        64 hexadecimal digits (and the frame of a DICOM file).

    Raises:
        UnusableImage: A row cannot be read.
    """
    if path.suffix in TABLES and part:
        from polyclinic.common.data.parquet import row_bytes

        return hashlib.sha256(row_bytes(path, int(part))).hexdigest()
    if not part:
        return sha256_file(path)
    stat = path.stat()
    return f"{_file_digest(path, stat.st_size, stat.st_mtime_ns)}:{part}"


@lru_cache(maxsize=8)
def _file_digest(path: Path, size: int, time_ns: int) -> str:
    return sha256_file(path)
