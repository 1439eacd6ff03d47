"""What names a person: in captions, in DICOM headers, in a photograph's metadata.

Rules, not a model: they find typed patterns and miss, for example, a name without a title. A finding says
the kind or the attribute; a matched span is masked wherever it is shown.
"""

from __future__ import annotations

import re
from typing import Any

from PIL import ExifTags, Image

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_NAME = r"[A-ZÀ-Þ][a-zà-ÿ'’-]+"
RULES: dict[str, re.Pattern[str]] = {
    "date": re.compile(
        r"\b(?:(?:19|20)\d\d[-./](?:0?[1-9]|1[0-2])[-./](?:[0-2]?\d|3[01])"
        r"|(?:[0-2]?\d|3[01])[-./](?:0?[1-9]|1[0-2])[-./](?:19|20)?\d\d(?![\d.]))\b"
        rf"|(?i:\b(?:[0-2]?\d|3[01])(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH},?\s+(?:19|20)\d\d\b)"
        rf"|(?i:\b{_MONTH}\s+(?:[0-2]?\d|3[01])(?:st|nd|rd|th)?,?\s+(?:19|20)\d\d\b)"
    ),
    "e-mail": re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b"),
    "telephone": re.compile(r"(?i:\b(?:tel|phone|mobile|fax)\b)[.: ]*\+?[\d ()/-]{6,}|\+\d[\d ()/-]{7,}\d"),
    "number": re.compile(
        r"\b(?:MRN|PID|SSN|NHS|ID|Acc(?:ession)?|Case|Record)\b"
        r"[ .:#]*(?:no\.?|number|nr\.?)?[ .:#]*[A-Z-]*\d[\w-]{2,}"
        r"|\b\d{7,}\b|\b\d{3}-\d{2}-\d{4}\b"
    ),
    "name": re.compile(
        rf"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Herr|Frau|Mme|Sig|Sr|Sra)\b\.?\s+(?:{_NAME}\s?){{1,3}}"
        r"|(?i:\b(?:patient(?:'s)?\s+name|name|referred by|physician|radiologist|surgeon))"
        rf"\s*[:=]\s*{_NAME}(?:\s+{_NAME})*"
        r"|\b[A-Z][A-Za-z'-]+\^[A-Z][A-Za-z'-]*"
    ),
    "age over 89": re.compile(r"\b(?:9\d|1[01]\d)[- ]?(?:years?|yrs?|y/o|yo)\b(?:[- ]old)?", re.IGNORECASE),
}

# From what the Basic Application Level Confidentiality Profile takes out (PS3.15, table E.1-1).
ATTRIBUTES = [
    "PatientName",
    "PatientBirthDate",
    "PatientBirthTime",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientMotherBirthName",
    "MilitaryRank",
    "EthnicGroup",
    "Occupation",
    "PatientComments",
    "AdditionalPatientHistory",
    "InsurancePlanIdentification",
    "CountryOfResidence",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "SeriesDate",
    "AcquisitionDate",
    "ContentDate",
    "AcquisitionDateTime",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "NameOfPhysiciansReadingStudy",
    "PhysiciansOfRecord",
    "OperatorsName",
    "RequestingPhysician",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "StationName",
    "DeviceSerialNumber",
    "RequestedProcedureDescription",
    "ImageComments",
]

PHOTO_TAGS = {
    "Artist", "Copyright", "ImageDescription", "DateTime", "DateTimeOriginal", "DateTimeDigitized",
    "CameraOwnerName", "BodySerialNumber", "LensSerialNumber", "XPAuthor", "XPComment", "XPTitle",
    "XPSubject", "XPKeywords", "HostComputer", "UserComment",
}  # fmt: skip
# What writers put into the file of themselves.
_HARMLESS_TEXT = {"software", "dpi", "jfif", "gamma", "srgb", "aspect", "transparency", "background"}


def in_text(text: str) -> list[tuple[str, int, int]]:
    """Find identifiers in a caption.

    Returns:
        (kind, start, end) of each, in the order they stand.
    """
    found = [
        (kind, match.start(), match.end()) for kind, rule in RULES.items() for match in rule.finditer(text)
    ]
    return sorted(found, key=lambda span: span[1])


def masked(text: str, spans: list[tuple[str, int, int]]) -> str:
    """Show a caption with every span blacked out and its kind named."""
    shown = list(text)
    for _, start, end in spans:
        shown[start:end] = "█" * (end - start)
    return f"{''.join(shown)} ({', '.join(sorted({kind for kind, _, _ in spans}))})"


def in_dicom(header: Any) -> list[str]:
    """Name the filled-in attributes of a header that may name a person, a place or a day."""
    found = [name for name in ATTRIBUTES if name in header and str(header.get(name) or "").strip()]
    private = sum(1 for tag in header.keys() if tag.is_private)  # noqa: SIM118 (iterating yields elements)
    return [*found, f"{private} private elements"] if private else found


def in_photo(image: Image.Image) -> tuple[bool, list[str]]:
    """Look at a photograph's metadata.

    Returns:
        Whether it has a position, and the names of entries that may name a person, a device or a day.
    """
    exif = image.getexif()
    entries = {ExifTags.TAGS.get(tag, "") for tag in exif}
    entries |= {ExifTags.TAGS.get(tag, "") for tag in exif.get_ifd(ExifTags.IFD.Exif)}
    texts = getattr(image, "text", {}) or {}
    free = {f"text {key!r}" for key in texts if isinstance(key, str) and key.lower() not in _HARMLESS_TEXT}
    free |= {name for name in ("comment", "xmp", "photoshop") if image.info.get(name)}
    return bool(exif.get_ifd(ExifTags.IFD.GPSInfo)), sorted((entries & PHOTO_TAGS) | free)
