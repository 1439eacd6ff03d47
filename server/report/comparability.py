"""Are arms judged alike? What is unequal between them, each in a sentence that names the arms."""

from __future__ import annotations

import json
from collections.abc import Iterable

from polyclinic.server.evaluation.estimate import Fidelity
from polyclinic.server.report.metrics import Metrics, first_and_last
from polyclinic.server.report.wording import GAP, listed

UNFAIR = "Not a fair comparison: the arms"
UNKNOWN = "one not stated"
# Settings of the reference that decide which images and labels judge an arm.
SPLIT = ("key", "pretrain", "probe", "evaluate", "concepts")


def comparability(names: list[str], arms: list[Metrics]) -> list[str]:
    """Say in which ways arms were not judged alike; nothing where they were.

    Args:
        names: Of the arms.
        arms: Their metrics; arms that were not judged count by their study alone.
    """
    pairs = list(zip(names, arms, strict=True))
    found = [(name, f) for name, arm in pairs if (f := final_fidelity(arm)) is not None]
    said = []
    if any(arm.prompts != arms[0].prompts for arm in arms):
        said.append(f"{UNFAIR} were judged by different prompts.")
    sizes = [(n, f"{a.study.image_size}{GAP}px") for n, a in pairs]
    # What an extractor does to an image belongs to its weights; the size is told once.
    prepared = [] if unequal(sizes) else [(n, f.preprocessing.partition(";")[0]) for n, f in found]
    differing = (
        ("draw images of different sizes", sizes),
        ("were judged against different references", [(n, _short(a.study.reference_hash)) for n, a in pairs]),
        ("split their references or ask them for concepts differently", [(n, _split(a)) for n, a in pairs]),
        ("were judged by different extractors or protocols", [(n, _judge(f)) for n, f in found]),
        ("were judged on images prepared differently", prepared),
    )
    said += [f"{UNFAIR} {what}: {each}." for what, values in differing if (each := unequal(values))]
    numbers = unequal((name, f"{f.kid.n:,} images a side") for name, f in found)
    if numbers:
        said.append(
            f"Compare with care: the arms were judged on unequal numbers: {numbers}. KID does not depend on "
            "that but for its interval; Frechet distance and the metrics beside it do."
        )
    return said


def final_fidelity(arm: Metrics) -> Fidelity | None:
    """What the headline extractor found in the last judged round."""
    ends = first_and_last(arm)
    return ends[1].fidelity if ends else None


def unequal(values: Iterable[tuple[str, str]]) -> str:
    """Say which names have which value; empty where all have the same."""
    names: dict[str, list[str]] = {}
    for name, value in values:
        of = names.setdefault(value, [])
        of += [name] if name not in of else []
    return "; ".join(f"{value} for {listed(of)}" for value, of in names.items()) if len(names) > 1 else ""


def _short(digest: str) -> str:
    return digest[:12] or UNKNOWN


def _judge(found: Fidelity) -> str:
    return f"{found.extractor} {_short(found.weights)}, {found.protocol}"


def _split(arm: Metrics) -> str:
    settings = arm.study_json.get("study", {}).get("reference") or {}
    return json.dumps({key: settings[key] for key in SPLIT if key in settings}) if settings else UNKNOWN
