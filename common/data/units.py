"""Which unit each source can protect, and what its captions may be made of."""

from __future__ import annotations

# Sources that publish no patient ids, and those that have them.
WITHOUT_PATIENTS = ("medvqa-gi-2024", "kvasir-vqa", "rocov2")
WITH_PATIENTS = ("dicom", "nih-chest-xray14")


def check_source(source: str, unit: str, caption: str) -> None:
    """Refuse settings that a source cannot have.

    Args:
        source: Name of the door.
        unit: `patient` or `image`.
        caption: Template of DICOM captions, or "".

    Raises:
        ValueError: Names the field and the fix.
    """
    if source in WITHOUT_PATIENTS and unit != "image":
        raise ValueError(f'{source} has no patient ids: write unit = "image", and say so')
    if source in WITH_PATIENTS and unit != "patient":
        raise ValueError(f'{source} has patient ids: write unit = "patient"')
    if caption:
        from polyclinic.common.data.dicom import fields_of

        if source != "dicom":
            raise ValueError('caption belongs to source = "dicom": remove it')
        fields_of(caption)
