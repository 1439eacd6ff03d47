"""The coordinator's public reference: split by patient into pretrain, probe and evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from polyclinic.common.data.cache import snapshot_hash
from polyclinic.common.data.holdout import part_of
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
