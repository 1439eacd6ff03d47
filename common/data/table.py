"""The one table every data source becomes: (patient, image, captions, labels)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One image with what is known about it. The image stays on disk until it is encoded.

    Attributes:
        patient: Privacy unit this image belongs to (an image id where no patient ids exist).
        image: Path of the image file.
        captions: Captions of this image, in the source's order; several captions are views of
            the same image, not more data.
        site: Name of the hospital that holds it, where the source says so.
        labels: Label name to value; used for splits and by the coordinator's evaluation, never
            by training.
    """

    patient: str
    image: Path
    captions: tuple[str, ...]
    site: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


def patients_of(records: list[Record]) -> dict[str, list[Record]]:
    """Group records by patient, both in sorted order, so that the result is a function of the data only."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.patient, str(r.image))):
        groups.setdefault(record.patient, []).append(record)
    return groups
