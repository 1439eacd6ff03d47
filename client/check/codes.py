"""Every finding of `polyclinic-client check`: how grave it is, what it says, what a person does about it.

Four severities. `stop`: a person must decide before a snapshot can be made. `error`: `--fix` puts the image
(or caption) on the quarantine list, because of what is visible in it alone (PRIVACY.md, rule 7). `warning`:
stays in unless `--quarantine CODE` says otherwise. `note`: nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass

SEVERITIES = ("stop", "error", "warning", "note")


@dataclass(frozen=True)
class Code:
    """One row of the table.

    Attributes:
        severity: One of `SEVERITIES`.
        title: What was found, in a few words.
        remedy: What a person does about it.
        across: It compares patients, so that it may never lead to a quarantine (rule 7).
    """

    severity: str
    title: str
    remedy: str
    across: bool = False


CODES: dict[str, Code] = {
    # The table.
    "two-patients": Code(
        "stop", "one image under two patients", "find out whose it is; correct the table", True
    ),
    "two-sites": Code("stop", "one patient or image on two sites", "give each patient one site", True),
    "charged-elsewhere": Code(
        "stop",
        "patients whom another ledger of this hospital charges, or may charge",
        "use the home of that ledger, or take them out of one of the two",
        True,
    ),
    "no-image-file": Code("error", "a caption without its image", "add the file or remove the row"),
    "outside": Code("error", "image outside the data folder", "copy it into the folder"),
    "empty-image": Code("error", "row without an image", "name its file or remove the row"),
    "empty-caption": Code("error", "image without a caption", "write one or remove the row"),
    "empty-patient": Code("error", "image without a patient", "fill it in"),
    "left-aside": Code(
        "note", "left aside: not an image, or not downloaded", "nothing, unless it should be used"
    ),
    # Files.
    "unreadable": Code("error", "not a readable image", "replace the file"),
    "damaged": Code("error", "truncated or damaged image", "export or copy the file again"),
    "not-an-image": Code("error", "a file without an image", "take it out of the folder"),
    "too-large": Code("error", "image too large to decode safely", "make it smaller or cut out what matters"),
    "several-frames": Code("error", "animation or several pages", "save each frame as a file of its own"),
    "deep-pixels": Code(
        "error", "more than 8 bits a pixel without a window", "save it with 8 bits, windowed"
    ),
    "decoder-crashed": Code("error", "the decoder died of this file", "export the file again"),
    "decoder-hung": Code("error", "the decoder did not finish this file", "export the file again"),
    "too-small": Code("error", "fewer than 16 pixels a side", "replace the file"),
    "blank": Code("error", "one flat colour", "replace the file"),
    "wrong-extension": Code("warning", "the suffix names another format", "rename the file"),
    "upscaled": Code(
        "warning", "smaller than the study's image size", "it would be enlarged; use larger ones"
    ),
    "extreme-shape": Code("warning", "more than four times as long as wide", "look what a crop leaves of it"),
    # Duplicates.
    "duplicate-within-patient": Code("warning", "the same picture twice in one patient", "keep one of them"),
    "duplicate-across-patients": Code(
        "warning",
        "the same picture in two patients: a patient twice, or a leak between hold-out and training",
        "a person finds out whose it is and corrects the table; never resolved automatically",
        True,
    ),
    "near-duplicate-within-patient": Code(
        "note", "nearly the same picture in one patient", "nothing, often frames"
    ),
    "near-duplicate-across-patients": Code(
        "warning",
        "nearly the same picture in two patients: re-encoded, resized or brightened copies",
        "a person compares them and corrects the table; never resolved automatically",
        True,
    ),
    "near-duplicates-cut": Code(
        "note",
        "so many images resemble this one that it was compared with its nearest alone",
        "nothing; nearly the same pictures may be missing above, equal ones are not",
    ),
    # Captions.
    "caption-too-long": Code(
        "warning", "longer than the text encoder reads", "shorten it: the end is cut off"
    ),
    "caption-encoding": Code("warning", "damaged characters", "save the table again, as UTF-8"),
    "caption-repeated": Code(
        "note", "the same caption twice at one image", "nothing: it is drawn more often"
    ),
    # Identifiers.
    "caption-identifier": Code("error", "a name, date or number of a person in a caption", "take it out"),
    "dicom-identifiers": Code(
        "warning",
        "DICOM headers that name a person, a place or a day",
        "nothing for training, which sees pixels alone; de-identify before the files go anywhere else",
    ),
    "photo-location": Code(
        "warning", "GPS position in the file", "strip it before the files go anywhere else"
    ),
    "photo-metadata": Code(
        "warning",
        "author, device, date or free text in the file",
        "strip it before the files go anywhere else",
    ),
    "burned-in-text": Code(
        "warning",
        "text burned into the pixels (heuristic; docs/data.md has its precision and recall)",
        "look at them; quarantine with --quarantine burned-in-text, or crop it away",
    ),
}
