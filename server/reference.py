"""The coordinator's public reference: split by patient into pretrain, probe and evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polyclinic.common.data.holdout import part_of
from polyclinic.common.data.pixels import snapshot_hash
from polyclinic.common.data.sources import read_records, reference_settings
from polyclinic.common.data.table import Record
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study


@dataclass(frozen=True)
class Reference:
    """Public images in three parts that share no patient.

    Attributes:
        pretrain: The base and the warm start may see these.
        probe: The probes that judge faithfulness are trained on these.
        evaluate: Fidelity is measured against these.
        hash: Content of the whole table; public.
    """

    pretrain: list[Record]
    probe: list[Record]
    evaluate: list[Record]
    hash: str


def read_reference(study: Study, folder: Path | None) -> Reference:
    """Read the coordinator's public images from a folder and split them.

    Raises:
        BadInput: No folder was named, or it cannot be read.
    """
    if folder is None:
        raise BadInput(
            "--reference is missing: name the folder of the public images that the study is judged by; "
            "`polyclinic-simulate reference STUDY --out DIR` writes one for a packaged or simulated study"
        )
    return split_reference(study, read_records(reference_settings(study.data, folder), folder))


def split_reference(study: Study, records: list[Record]) -> Reference:
    """Split a reference by a keyed hash of the patient id.

    Raises:
        BadInput: A part that the study needs is empty.
    """
    parts: dict[str, list[Record]] = {"pretrain": [], "probe": [], "evaluate": []}
    for record in records:
        parts[part_of(record.patient, f"{study.reference.key}/parts", study.reference.parts)].append(record)
    if not parts["evaluate"]:
        raise BadInput(
            "the reference's evaluate part is empty; raise reference.fraction or reference.evaluate"
        )
    return Reference(**parts, hash=snapshot_hash(records))
