"""What a study's leakage gate will be able to find at a site, before a reference is read."""

from __future__ import annotations

from math import ceil

from polyclinic.common.features.copies import fewest_alarming
from polyclinic.common.study import NearScale, Study
from polyclinic.server.evaluation.public_scale import CHANCE, LARGEST_ALPHA, patients_needed
from polyclinic.server.report.metrics import Part
from polyclinic.server.report.wording import count


class GatePlan(Part):
    """What the gate can find at a site that has its declared patients, of one image each.

    Attributes:
        trained: Patients trained on.
        held_out: Patients kept out.
        fewest_copied: Near copies that raise its alarm, with the smallest reference that the gate accepts;
            None: not even all of them do.
        fewest_copied_at_best: The same, with twice 199 public patients or more.
        reference_patients: About how many the reference's evaluate part needs.
    """

    trained: int
    held_out: int
    fewest_copied: int | None
    fewest_copied_at_best: int | None
    reference_patients: int


def gate_plan(study: Study, declared: int) -> GatePlan | None:
    """Work out what the gate can find among so many patients; None where the study has none."""
    if not study.releases.leakage_gate:
        return None
    held_out = round(declared * study.releases.held_out)
    trained = declared - held_out
    worst, best = (
        fewest_alarming(
            [1] * trained,
            held_out,
            NearScale(features=1, pixels=1, chance=chance, patients=ceil(1 / chance) - 1, more=1),
        )
        for chance in (LARGEST_ALPHA / 2, CHANCE)
    )
    return GatePlan(
        trained=trained,
        held_out=held_out,
        fewest_copied=worst,
        fewest_copied_at_best=best,
        reference_patients=patients_needed(study.evaluation.images),
    )


def gate_words(gate: GatePlan | None, unit: str) -> list[str]:
    """Say it for the terminal."""
    if gate is None:
        return []
    best, worst = gate.fewest_copied_at_best, gate.fewest_copied
    if best is None:
        found = "can raise no alarm by counting, however many are copied"
    else:
        found = (
            f"raises its alarm at near copies of {best} of {count(gate.trained, unit)} trained on with a "
            f"large reference, of {worst or 'more than all of them'} with the smallest it accepts (about "
            f"{gate.reference_patients} patients in the evaluate part)"
        )
    return [f"the leakage gate {found}; {gate.held_out} are held out"]
