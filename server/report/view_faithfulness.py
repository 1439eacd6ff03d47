"""Faithfulness value by value: what prompts say is there, and apart from it what they say is not there."""

from __future__ import annotations

from dataclasses import dataclass

from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.negations import ValueFaithfulness
from polyclinic.server.evaluation.probe import Faithfulness
from polyclinic.server.report.verdict import order, written_share

PRESENT, ABSENT = "what prompts say is there", "what prompts say is not there (negations)"
# Whether the value is seen more often where it is asked for, by intervals that do not touch.
EFFECTS = {"above": "clear", "overlapping": "not clear", "below": "reversed", "unknown": "not known"}


@dataclass(frozen=True)
class ValueLine:
    """One value of one concept; `uncorrected` says why `row.shown` is not there."""

    concept: str
    row: ValueFaithfulness
    effect: str
    uncorrected: str


@dataclass(frozen=True)
class ValueGroup:
    """Presences or absences, with their mean over the concepts that can be absent."""

    title: str
    lines: list[ValueLine]
    mean: Estimate | None


def value_groups(found: Faithfulness | None) -> list[ValueGroup]:
    """Split the rows of all values into presences and absences; a group without rows is left out."""
    if found is None:
        return []
    groups = []
    for title, absent, mean in ((PRESENT, False, found.presence), (ABSENT, True, found.absence)):
        lines = [
            _line(row.concept, value) for row in found.rows for value in row.values if value.absence is absent
        ]
        groups += [ValueGroup(title, lines, mean)] if lines else []
    return groups


def _line(concept: str, row: ValueFaithfulness) -> ValueLine:
    why = "no real images of it" if row.real is None else "the probe errs too much"
    return ValueLine(concept, row, EFFECTS[order(row.seen, row.otherwise)], "" if row.shown else why)


def negation_sentence(found: Faithfulness | None) -> str:
    """Say how often images show what is asked for, and lack what is denied; empty where nothing is denied."""
    if found is None or found.presence is None or found.absence is None:
        return ""
    return (
        f"What prompts say is there is seen in {written_share(found.presence)} of the images, and what they "
        f"say is not there is missing from {written_share(found.absence)}: means over concepts that can be "
        "absent."
    )


def value_intervals(groups: list[ValueGroup]) -> str:
    """What the intervals of these rows are, each kind once."""
    rows = [line.row for group in groups for line in group.lines]
    kinds: dict[str, list[Estimate | None]] = {
        "seen and otherwise": [row.seen for row in rows],
        "real": [row.real for row in rows],
        "corrected": [row.shown for row in rows],
    }
    named = {name: next((e.interval for e in found if e), "") for name, found in kinds.items()}
    return "; ".join(f"{name}: {interval}" for name, interval in named.items() if interval)
