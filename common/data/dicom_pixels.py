"""DICOM pixels to 8-bit RGB, as a reader at a workstation first sees them.

pydicom reads; GDCM decodes JPEG (8 and 12 bits, lossless) and JPEG-LS, OpenJPEG (pylibjpeg-openjpeg)
JPEG 2000 and its high-throughput form, pydicom itself RLE. pylibjpeg-libjpeg is not used: it is GPL.
Order (PS3.3 C.7.6.3, C.11.1, C.11.2; PS3.4 N.2): palette or colour space to RGB; or modality LUT or
rescale, then the file's first VOI LUT or window, then MONOCHROME1 is inverted. Without a window, an
image's own smallest and largest value become black and white, padding left out: visible in that image.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.common.data.images import UnusableImage, check_size
from polyclinic.common.refusals import BadInput

MISSING = "{path}: reading DICOM needs pydicom; install it with `pip install polyclinic[dicom]`"
DEFLATED = "1.2.840.10008.1.2.1.99"
MAX_INFLATED = 512 << 20
MAX_FRAMES = 1_000_000  # twice the tiles of a large whole-slide image
LEAST_FRAME = 32  # bytes of a compressed frame: its item's head and some of its decoder's
PLANES = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_TAKE_OUT = "take it out of the folder"
_REPLACE = "replace the file or take it out of the folder"


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out pydicom's remarks on files that are a little off; what cannot be read still raises."""
    logger = logging.getLogger("pydicom")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def read_header(path: Path) -> Any:
    """Read a file's elements up to its pixels; long ones stay on disk.

    Returns:
        A pydicom dataset.

    Raises:
        BadInput: pydicom is not installed.
        UnusableImage: `unreadable`, `not-an-image` or `too-large`; says what the file is.
    """
    try:
        import pydicom
    except ImportError as error:
        raise BadInput(MISSING.format(path=path)) from error
    with _quiet():
        try:
            _bound_inflation(path)
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True, defer_size="1 MB")
            if not header.file_meta and not {"SOPClassUID", "Rows", "Modality"} & set(header.dir()):
                raise UnusableImage(str(path), "unreadable", "not a DICOM file", _REPLACE)
            return header
        except UnusableImage:
            raise
        except Exception as error:  # a parser of damaged bytes: it raises whatever they lead it to
            raise _unreadable(str(path), error) from error


def _bound_inflation(path: Path) -> None:
    """Refuse a deflated file that would fill the memory: pydicom inflates it at once."""
    import pydicom
    from pydicom.filereader import read_file_meta_info, read_preamble

    with path.open("rb") as file:
        if read_preamble(file, force=True) is None:
            return
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DEFLATED:
        return
    with path.open("rb") as file:
        read_preamble(file, force=True)
        pydicom.filereader._read_file_meta_info(file)
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while piece := file.read(1 << 16):
            while piece:
                size += len(inflate.decompress(piece, 1 << 22))
                piece = inflate.unconsumed_tail
                if size > MAX_INFLATED:
                    what = f"deflated data of more than {MAX_INFLATED >> 20} MiB"
                    raise UnusableImage(str(path), "too-large", what, _REPLACE)


def frames_of(header: Any, path: Path) -> int:
    """Count the frames of an image.

    Raises:
        UnusableImage: `not-an-image` for a report, a plan, a video...; or `unreadable`.
    """
    name = str(path)
    kind = _kind(header)
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is not None and syntax.name.startswith(("MPEG", "HEVC")):
        raise UnusableImage(name, "not-an-image", f"a video ({syntax.name})", "save its frames as images")
    if "Rows" not in header or "Columns" not in header:
        raise UnusableImage(name, "not-an-image", f"holds no pixels ({kind})", _TAKE_OUT)
    try:
        with _quiet():
            rows, columns = int(header.Rows), int(header.Columns)
            frames = int(header.get("NumberOfFrames") or 1)
    except (TypeError, ValueError) as error:
        raise _unreadable(name, error) from error
    if min(rows, columns, frames) < 1:
        what = f"{rows} rows, {columns} columns, {frames} frames"
        raise UnusableImage(name, "unreadable", f"unreadable image ({what})", _REPLACE)
    check_size(name, columns, rows)
    if frames > MAX_FRAMES:
        what = f"{frames} frames, more than {MAX_FRAMES}"
        raise UnusableImage(name, "too-large", what, "make several files of it")
    # Each becomes a row of the table: a header that lies would fill the memory with them.
    if syntax != DEFLATED and frames > 1 and frames * _least(header, syntax) > path.stat().st_size:
        what = f"{frames} frames are promised, more than the file has room for"
        raise UnusableImage(name, "damaged", what, _REPLACE)
    return frames


def _least(header: Any, syntax: Any) -> int:
    """Bytes that a frame takes at least; half of a native one's, which may leave out every second colour."""
    if syntax is not None and syntax.is_encapsulated:
        return LEAST_FRAME
    bits = int(header.get("BitsAllocated") or 1) * int(header.get("SamplesPerPixel") or 1)
    return int(header.Rows) * int(header.Columns) * bits // 16


def _kind(header: Any) -> str:
    meta = getattr(header, "file_meta", None)
    uid = header.get("SOPClassUID") or getattr(meta, "MediaStorageSOPClassUID", "")
    return getattr(uid, "name", "") or str(header.get("Modality") or "no SOP class")


def read_frame(path: Path, frame: int = 0) -> np.ndarray:
    """Decode one frame.

    Args:
        path: DICOM file.
        frame: From 0.

    Returns:
        `[height, width, 3]`, uint8 RGB.

    Raises:
        UnusableImage: With its reason.
    """
    header = read_header(path)
    frames, name = frames_of(header, path), f"{path} [{frame}]" if frame else str(path)
    if frame >= frames:
        raise UnusableImage(name, "unreadable", f"has {frames} frames", "check the folder again")
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    try:
        with _quiet():
            pixels = _stored(path, header, frame)
            if pixels.ndim == 3 or _palette(header):
                return _color(pixels, header)
            return _gray(pixels, header, frame)
    except UnusableImage:
        raise
    except MemoryError as error:
        raise UnusableImage(name, "too-large", "does not fit into memory", "make it smaller") from error
    except Exception as error:  # decoders of damaged bytes
        raise _unreadable(name, error, "damaged", f"{syntax.name}: " if syntax else "") from error


def _stored(path: Path, header: Any, frame: int) -> np.ndarray:
    """Read one frame's stored values, colours as RGB; native files are read no further than needed."""
    from pydicom import dcmread
    from pydicom.pixels.utils import pixel_array

    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None or syntax == DEFLATED:
        whole = dcmread(path, force=True)
        if syntax is None:
            from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

            implicit, little = whole.original_encoding
            explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            whole.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        return pixel_array(whole, index=frame)
    if not any(_planes(path)):
        raise UnusableImage(str(path), "not-an-image", f"holds no pixels ({_kind(header)})", _TAKE_OUT)
    return pixel_array(path, index=frame)


def _planes(path: Path) -> Iterator[bool]:
    """Say for each kind of pixel element whether a file has it, without reading it."""
    from pydicom import dcmread

    found = dcmread(path, force=True, defer_size=1024, specific_tags=list(PLANES))
    return (name in found for name in PLANES)


def _palette(header: Any) -> bool:
    return bool(header.get("PhotometricInterpretation") == "PALETTE COLOR")


def _color(pixels: np.ndarray, header: Any) -> np.ndarray:
    from pydicom.pixels.processing import apply_color_lut, convert_color_space

    if _palette(header):
        pixels = apply_color_lut(pixels, header)
        return _eight(pixels, pixels.dtype.itemsize * 8)
    if pixels.shape[-1] == 4:
        raise ValueError("four samples a pixel")
    space = str(header.get("PhotometricInterpretation", "RGB"))
    if space in ("YBR_RCT", "YBR_ICT"):
        space = "RGB"  # undone by the JPEG 2000 decoder
    if space.startswith("YBR_PARTIAL"):
        pixels = convert_color_space(pixels, space, "RGB")
    return _eight(pixels, int(header.get("BitsStored") or 8))


def _eight(pixels: np.ndarray, bits: int) -> np.ndarray:
    if pixels.dtype == np.uint8 and bits >= 8:
        return np.ascontiguousarray(pixels)
    scaled = pixels.astype(np.float32) * (255.0 / (2**bits - 1))
    return scaled.round().clip(0, 255).astype(np.uint8)


def _gray(pixels: np.ndarray, header: Any, frame: int) -> np.ndarray:
    """Modality LUT or rescale, the first VOI LUT or window, polarity; `[H, W]` to `[H, W, 3]`."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    told = _for_frame(header, frame)
    values = apply_modality_lut(pixels, told)
    if not np.isfinite(values).any():
        raise ValueError("no pixel has a finite value after the rescale")
    if told.get("VOILUTSequence"):
        table = apply_voi(np.rint(values).astype(np.int64), told)
        gray = table.astype(np.float64) / (2 ** int(told.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    elif "WindowCenter" in told and "WindowWidth" in told:
        center, width = _first(told.WindowCenter), _first(told.WindowWidth)
        gray = window(values.astype(np.float64), center, width, str(told.get("VOILUTFunction") or "LINEAR"))
    else:
        gray = _spread(values.astype(np.float64), pixels, told.get("PixelPaddingValue"))
    if told.get("PhotometricInterpretation") == "MONOCHROME1":
        gray = 1 - gray
    eight = np.nan_to_num(gray * 255).round().clip(0, 255).astype(np.uint8)
    return np.repeat(eight[:, :, None], 3, axis=2)


def window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Apply a window (PS3.3 C.11.2.1.2 and C.11.2.1.3): values to [0, 1].

    Raises:
        ValueError: A width that the standard forbids, or an unknown function.
    """
    if width < 1 if function == "LINEAR" else width <= 0:
        raise ValueError(f"window width {width:g}")
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))))
    if function == "LINEAR":
        if width == 1:
            return np.asarray((values > center - 0.5).astype(np.float64))
        return np.asarray(((values - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1))
    if function == "LINEAR_EXACT":
        return np.asarray(((values - center) / width + 0.5).clip(0, 1))
    raise ValueError(f"VOI LUT function {function}")


def _spread(values: np.ndarray, pixels: np.ndarray, padding: Any) -> np.ndarray:
    """Stretch an image's own values to [0, 1], padding left out; a flat image becomes black."""
    shown = np.isfinite(values)
    if isinstance(padding, int) and (pixels != padding).any():
        shown &= pixels != padding
    low, high = (float(values[shown].min()), float(values[shown].max())) if shown.any() else (0.0, 0.0)
    return np.asarray((values - low) / (high - low or 1.0)).clip(0, 1)


def _for_frame(header: Any, frame: int) -> Any:
    """Put a frame's own rescale and window (enhanced objects keep them in functional groups) on top."""
    from pydicom import Dataset

    told = Dataset()
    # LUTs and padding of an ambiguous type (US or SS) are read by this.
    told.PixelRepresentation = header.get("PixelRepresentation") or 0
    for tag in header.keys():  # noqa: SIM118 (iterating yields elements)
        if tag.group == 0x0028:
            told[tag] = header[tag]
    groups = [*(header.get("SharedFunctionalGroupsSequence") or [])[:1]]
    groups += (header.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in groups:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in (group.get(name) or [])[:1]:
                told.update(item)
    if "RescaleSlope" in told and "RescaleIntercept" not in told:
        told.RescaleIntercept = 0
    for name in ("WindowCenter", "WindowWidth"):
        if name in told and told.get(name) in (None, ""):
            del told[name]
    return told


def _first(value: Any) -> float:
    return float(value if isinstance(value, int | float | str) else value[0])


def _unreadable(name: str, error: Exception, code: str = "unreadable", more: str = "") -> UnusableImage:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return UnusableImage(name, code, f"unreadable image ({more}{text})", _REPLACE)
