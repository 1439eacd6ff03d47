"""What are the images worth to somebody who trains on them? Train on synthetic, test on real.

For each concept three linear probes on frozen features: trained on synthetic images with the labels
their prompts ask for, on the reference's probe part, and on the two together. All are tested on the
evaluate part, whose patients none of them has seen ("train on synthetic, test on real", Esteban, Hyland
& Rätsch 2017, arXiv 1706.02633). A classifier of one's own would be trained longer; a linear probe needs
seconds and answers the same question stably.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from polyclinic.server.evaluation.answers import (
    OVERALL,
    Answer,
    Labelled,
    ask,
    ask_both,
    check_sets,
    estimate,
)
from polyclinic.server.evaluation.bootstrap import Bootstrap, draw_weights
from polyclinic.server.evaluation.linear_probe import Probe, train_probe
from polyclinic.server.evaluation.results import ConceptUtility, Utility

# Raise it whenever a number would change for the same images.
PROTOCOL = "polyclinic-utility-1"
UNIT = "held-out patients, probes as given"


class _Answers(NamedTuple):
    """Answers of the three diets for one concept, and of `both` less `real`."""

    synthetic: Answer
    real: Answer
    both: Answer
    gain: Answer


def measure_utility(
    synthetic: Labelled, probe: Labelled, holdout: Labelled, concepts: Sequence[str], extractor: str
) -> Utility:
    """Train on synthetic, real, and both; test on real patients that no probe has seen.

    A concept counts with the values that prompts, probe part and holdout all show. Intervals resample the
    held-out patients, for all concepts and diets together, so that `gain` is paired; the trained probes
    are taken as given.

    Args:
        synthetic: Drawn images; labels are what their prompts ask for, groups are prompts.
        probe: The reference's probe part; groups are patients.
        holdout: The reference's evaluate part; groups are patients.
        concepts: Concepts to measure, in the order of the rows.
        extractor: Name of the extractor that made the features.

    Returns:
        One row a concept that could be measured, and a warning for each that could not.

    Raises:
        BadInput: Sets that do not fit together, features that are not finite, or patients in both parts.
    """
    check_sets(synthetic=synthetic, probe=probe, holdout=holdout)
    patients = draw_weights(holdout.groups, UNIT)
    found: dict[str, tuple[int, _Answers]] = {}
    warnings = []
    for concept in concepts:
        values, warning = _values(concept, synthetic, probe, holdout)
        warnings += [warning] if warning else []
        if values:
            answers = _train_and_ask(concept, values, synthetic, probe, holdout, patients)
            found[concept] = len(values), answers
    rows = [_row(concept, [answers], patients, 1 / count) for concept, (count, answers) in found.items()]
    overall = None
    if rows:
        chance = sum(row.chance for row in rows) / len(rows)
        overall = _row(OVERALL, [answers for _, answers in found.values()], patients, chance)
    return Utility(extractor=extractor, rows=rows, overall=overall, protocol=PROTOCOL, warnings=warnings)


def _values(
    concept: str, synthetic: Labelled, probe: Labelled, holdout: Labelled
) -> tuple[list[str], str | None]:
    """Values of a concept that can be learnt and tested; a sentence where some or all are left out."""
    wanted = synthetic.values(concept)
    if len(wanted) < 2:
        return [], f"{concept}: no utility; prompts ask for {len(wanted)} of its values, not for two."
    shown = {"probe part": probe.values(concept), "held-out patients": holdout.values(concept)}
    missing = [
        f"the {side} {'show' if side.endswith('s') else 'shows'} no {concept} = {', '.join(lacks)}"
        for side, values in shown.items()
        if (lacks := sorted(wanted - values))
    ]
    shared = sorted(wanted.intersection(*shown.values()))
    if len(shared) < 2:
        return [], f"{concept}: no utility; {' and '.join(missing)}."
    return shared, f"{concept}: only {', '.join(shared)}; {' and '.join(missing)}." if missing else None


def _train_and_ask(
    concept: str,
    values: Sequence[str],
    synthetic: Labelled,
    probe: Labelled,
    holdout: Labelled,
    patients: Bootstrap,
) -> _Answers:
    rows = holdout.showing(concept, values)
    drawn, real, both = (
        _train(concept, values, *diet).predict(holdout.features[rows])
        for diet in ([synthetic], [probe], [synthetic, probe])
    )
    return _Answers(
        ask(drawn, holdout, concept, rows, patients),
        ask(real, holdout, concept, rows, patients),
        ask(both, holdout, concept, rows, patients),
        ask_both(both, real, holdout, concept, rows, patients),
    )


def _train(concept: str, values: Sequence[str], *diet: Labelled) -> Probe:
    """Train a probe on all images of these sets that show one of the values."""
    features, labels, groups = [], [], []
    for number, known in enumerate(diet):
        rows = known.showing(concept, values)
        features.append(known.features[rows])
        labels += [known.labels[row][concept] for row in rows]
        # A prompt and a patient of the same name are not the same group.
        groups += [f"{number}/{known.groups[row]}" if number else known.groups[row] for row in rows]
    return train_probe(torch.cat(features), labels, groups)


def _row(concept: str, answers: Sequence[_Answers], patients: Bootstrap, chance: float) -> ConceptUtility:
    columns = zip(_Answers._fields, zip(*answers, strict=True), strict=True)
    estimates = {diet: estimate(column, patients) for diet, column in columns}
    return ConceptUtility(concept=concept, chance=chance, **estimates)
