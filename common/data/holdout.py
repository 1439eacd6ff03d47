"""Hold-outs by a keyed hash of the patient id (PRIVACY.md, rule 7).

A patient's side never depends on any other patient, so adding or removing one patient moves
nobody else: the split is 1-stable.
"""

from __future__ import annotations

import hashlib


def position(patient: str, key: str) -> float:
    """Place a patient in [0, 1) by a keyed hash.

    Args:
        patient: Patient id.
        key: Name of the split; different keys give independent positions.
    """
    digest = hashlib.blake2b(patient.encode(), key=hashlib.sha256(key.encode()).digest(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64


def part_of(patient: str, key: str, parts: dict[str, float]) -> str:
    """Name the part of a split that a patient falls in.

    Args:
        patient: Patient id.
        key: Name of the split.
        parts: Part name to its share; shares add up to 1.
    """
    place, edge = position(patient, key), 0.0
    for name, share in parts.items():
        edge += share
        if place < edge:
            return name
    return list(parts)[-1]
