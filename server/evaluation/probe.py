"""Does a synthetic image show what its prompt asked for? A linear probe answers.

The probe is trained on the reference's probe part, whose labels are known, and then reads the
synthetic images. Its accuracy on real patients it never saw is the ceiling. A CLIP-type score stands
beside it at most (cosine.py): it handles "no polyp" badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.answers import (
    INTERVAL,
    OVERALL,
    Answer,
    Labelled,
    ask,
    check_sets,
    estimate,
)
from polyclinic.server.evaluation.bootstrap import Bootstrap, draw_weights, share_draws
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.linear_probe import Probe, train_probe
from polyclinic.server.evaluation.negations import ValueFaithfulness, is_absence, value_row, value_shares

# Raise it whenever a number would change for the same images.
PROTOCOL = "polyclinic-faithfulness-1"


class ConceptFaithfulness(BaseModel):
    """How often images show one concept as their prompt asked; or the mean over concepts.

    Attributes:
        concept: Name of the label, or "overall".
        counts: Synthetic images for each value that a prompt asked for (empty for "overall").
        accuracy: Balanced accuracy of the probe on synthetic images against their prompts;
            `groups` counts prompts.
        real: Balanced accuracy of the same probe on real patients it never saw, over the same
            values: the ceiling. None where the holdout lacks one of the values.
        chance: What a constant answer scores, 1 / number of values.
        values: One row for each value that prompts ask for (empty for "overall").
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str
    counts: dict[str, int]
    accuracy: Estimate
    real: Estimate | None
    chance: float
    values: list[ValueFaithfulness] = []


class Tally(BaseModel):
    """What the probe saw in one prompt's images, for one concept that the prompt speaks of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str
    prompt: str
    wanted: str
    images: int
    hits: int


class Faithfulness(BaseModel):
    """Faithfulness to the prompt, one row a concept.

    Attributes:
        rows: One row a concept that could be measured, in the order asked for.
        overall: Mean over the rows; its interval resamples prompts for all concepts jointly.
        presence: Mean over concepts that can be absent: how often an image shows what its prompt says is
            there. None where no concept can be absent.
        absence: Mean over the same concepts: how often it lacks what its prompt says is not there.
        protocol: Version of this measurement.
        warnings: Sentences to print beside the numbers, among them concepts left out and why.
        tallies: Counts by concept and prompt, from which rounds are compared pair by pair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: list[ConceptFaithfulness]
    overall: ConceptFaithfulness
    presence: Estimate | None = None
    absence: Estimate | None = None
    protocol: str
    warnings: list[str]
    tallies: list[Tally] = []


def measure_faithfulness(
    synthetic: Labelled, probe: Labelled, holdout: Labelled, concepts: Sequence[str]
) -> Faithfulness:
    """Train one probe a concept on real images and ask it what the synthetic images show.

    A prompt or record that says nothing about a concept is left out of that concept. Intervals
    speak of the drawn images and prompts; the probe itself is taken as given.

    Args:
        synthetic: Drawn images; labels are what their prompts ask for, groups are prompts.
        probe: The reference's probe part; groups are patients.
        holdout: Real images of patients the probe never sees.
        concepts: Concepts to measure, in the order of the rows.

    Raises:
        BadInput: Sets that do not fit together, features that are not finite, patients on both
            sides of the ceiling, a wanted value the probe part never shows, or nothing to measure.
    """
    check_sets(synthetic=synthetic, probe=probe, holdout=holdout)
    resampled = _Resampled(
        draw_weights(synthetic.groups, "prompts"), draw_weights(holdout.groups, "held-out patients")
    )
    found, warnings = [], []
    for concept in concepts:
        values = sorted(synthetic.values(concept))
        if len(values) < 2:
            warnings.append(f"{concept}: left out; prompts ask for {len(values)} of its values, not for two.")
            continue
        found.append(_ask_concept(concept, values, synthetic, probe, holdout, resampled))
        if found[-1].ceiling is None:
            warnings.append(f"{concept}: no ceiling; the held-out real images do not show all its values.")
    if not found:
        raise BadInput("no concept can be measured: " + (" ".join(warnings) or "name at least one"))
    prompts, patients = resampled
    ceilings = [one.ceiling for one in found if one.ceiling is not None]
    presence, absence = ([a for one in found for a in one.sides[absent]] for absent in (False, True))
    overall = ConceptFaithfulness(
        concept=OVERALL,
        counts={},
        accuracy=estimate([one.accuracy for one in found], prompts),
        # A ceiling over fewer concepts than the accuracy would not be its ceiling.
        real=estimate(ceilings, patients) if len(ceilings) == len(found) else None,
        chance=sum(one.row.chance for one in found) / len(found),
    )
    return Faithfulness(
        rows=[one.row for one in found],
        overall=overall,
        presence=estimate(presence, prompts) if presence else None,
        absence=estimate(absence, prompts) if absence else None,
        protocol=PROTOCOL,
        warnings=warnings,
        tallies=[tally for one in found for tally in one.tallies],
    )


class _Resampled(NamedTuple):
    """Weights by which all concepts are resampled together."""

    prompts: Bootstrap
    patients: Bootstrap


class _Found(NamedTuple):
    """What was found for one concept, ready to be averaged; `sides`: absence (True) and presence."""

    row: ConceptFaithfulness
    accuracy: Answer
    ceiling: Answer | None
    sides: dict[bool, list[Answer]]
    tallies: list[Tally]


def _ask_concept(
    concept: str,
    values: list[str],
    synthetic: Labelled,
    probe: Labelled,
    holdout: Labelled,
    resampled: _Resampled,
) -> _Found:
    """Train the concept's probe, and ask it about drawn images and about real ones."""
    prompts, patients = resampled
    trained = _train(concept, values, probe)
    asked, seen = synthetic.showing(concept, values), holdout.showing(concept, values)
    predicted = trained.predict(synthetic.features[asked])
    accuracy, ceiling = ask(predicted, synthetic, concept, asked, prompts), None
    wanted, known = ([s.labels[i][concept] for i in r] for s, r in ((synthetic, asked), (holdout, seen)))
    real: list[str] | None = None
    if set(known) == set(values):
        real = trained.predict(holdout.features[seen])
        ceiling = ask(real, holdout, concept, seen, patients)
    by_value = []
    sides: dict[bool, list[Answer]] = {True: [], False: []}
    for value in values:
        shares = value_shares(value, predicted, wanted, asked, prompts)
        there = None if real is None else value_shares(value, real, known, seen, patients)
        by_value.append(value_row(value, shares, prompts, there, patients))
        if any(is_absence(v) for v in values):
            sides[is_absence(value)].append(shares[0])
    row = ConceptFaithfulness(
        concept=concept,
        counts={value: wanted.count(value) for value in values},
        accuracy=estimate([accuracy], prompts),
        real=None if ceiling is None else estimate([ceiling], patients),
        chance=1 / len(values),
        values=by_value,
    )
    return _Found(row, accuracy, ceiling, sides, _tally(predicted, synthetic, concept, asked))


def _train(concept: str, values: Sequence[str], probe: Labelled) -> Probe:
    """Train a probe on everything the probe part knows of a concept."""
    unknown = set(values) - probe.values(concept)
    if unknown:
        raise BadInput(
            f"prompts ask for {concept} = {min(unknown)}, which no image of the probe part shows; "
            "correct the prompt's label or label the reference"
        )
    known = [i for i, labels in enumerate(probe.labels) if concept in labels]
    labels, patients = [probe.labels[i][concept] for i in known], [probe.groups[i] for i in known]
    return train_probe(probe.features[known], labels, patients)


def faithfulness_change(start: Faithfulness, final: Faithfulness) -> Estimate | None:
    """Difference of two rounds' overall balanced accuracy, paired by prompt.

    Rounds are drawn for the same prompts with the same seeds, so a prompt that is hard for one is hard
    for the other, and the difference is known better than either accuracy.

    Returns:
        Final minus start, `groups` counting prompts; None where the two were not asked the same.
    """
    asked = [[(t.concept, t.prompt, t.wanted, t.images) for t in f.tallies] for f in (start, final)]
    if not asked[0] or asked[0] != asked[1]:
        return None
    prompts = [tally.prompt for tally in final.tallies]
    bootstrap = draw_weights(prompts, "prompts")
    draws = [_overall_draws(f.tallies, bootstrap) for f in (start, final)]
    low, high = (draws[1] - draws[0]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = final.overall.accuracy.value - start.overall.accuracy.value
    return Estimate(
        value=value,
        low=min(low, value),
        high=max(high, value),
        interval=INTERVAL.format(unit="prompts, pair by pair"),
        n=final.overall.accuracy.n,
        groups=len(set(prompts)),
        floor=None,
        ratio=None,
    )


def _overall_draws(tallies: Sequence[Tally], bootstrap: Bootstrap) -> Tensor:
    """Bootstrap draws of the mean over concepts, [RESAMPLES]."""
    concepts = []
    for concept in dict.fromkeys(tally.concept for tally in tallies):
        classes = []
        of_concept = [(i, t) for i, t in enumerate(tallies) if t.concept == concept]
        for value in sorted({tally.wanted for _, tally in of_concept}):
            counts = torch.zeros(2, bootstrap.weights.shape[1], dtype=torch.float64)
            for i, tally in of_concept:
                if tally.wanted == value:
                    counts[:, bootstrap.ids[i]] += torch.tensor([tally.images, tally.hits])
            classes.append(counts)
        concepts.append(share_draws(classes, bootstrap.weights).mean(dim=0))
    return torch.stack(concepts).mean(dim=0)


def _tally(predicted: Sequence[str], synthetic: Labelled, concept: str, asked: list[int]) -> list[Tally]:
    found: dict[tuple[str, str], list[int]] = {}
    for answer, row in zip(predicted, asked, strict=True):
        wanted = synthetic.labels[row][concept]
        counts = found.setdefault((synthetic.groups[row], wanted), [0, 0])
        counts[0] += 1
        counts[1] += answer == wanted
    return [
        Tally(concept=concept, prompt=prompt, wanted=value, images=images, hits=hits)
        for (prompt, value), (images, hits) in found.items()
    ]
