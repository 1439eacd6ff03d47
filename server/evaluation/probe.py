"""Does a synthetic image show what its prompt asked for? A linear probe answers.

The probe is trained on the reference's probe part, whose labels are known, and then reads the
synthetic images. Its accuracy on real patients it never saw is the ceiling. CLIP-type scores are
not used: they handle "no polyp" badly (facts/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.answers import (
    INTERVAL,
    OVERALL,
    Labels,
    ask,
    check_disjoint,
    check_rows,
    estimate,
)
from polyclinic.server.evaluation.bootstrap import Bootstrap, draw_weights, draws_from_counts
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.linear_probe import train_probe

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
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str
    counts: dict[str, int]
    accuracy: Estimate
    real: Estimate | None
    chance: float


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
        protocol: Version of this measurement.
        warnings: Sentences to print beside the numbers, among them concepts left out and why.
        tallies: Counts by concept and prompt, from which rounds are compared pair by pair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: list[ConceptFaithfulness]
    overall: ConceptFaithfulness
    protocol: str
    warnings: list[str]
    tallies: list[Tally] = []


def measure_faithfulness(
    synthetic_features: Tensor,
    wanted: Sequence[Labels],
    prompt_groups: Sequence[str],
    probe_features: Tensor,
    probe_labels: Sequence[Labels],
    probe_patients: Sequence[str],
    holdout_features: Tensor,
    holdout_labels: Sequence[Labels],
    concepts: Sequence[str],
    holdout_patients: Sequence[str] | None = None,
) -> Faithfulness:
    """Train one probe a concept on real images and ask it what the synthetic images show.

    A prompt or record that says nothing about a concept is left out of that concept. Intervals
    speak of the drawn images and prompts; the probe itself is taken as given.

    Args:
        synthetic_features: Features of the synthetic images, [n, d].
        wanted: For each synthetic image, concept to the value its prompt asks for.
        prompt_groups: Prompt of each synthetic image.
        probe_features: Features of the reference's probe part, [m, d].
        probe_labels: For each of its images, concept to value.
        probe_patients: Patient of each of its images.
        holdout_features: Features of real images of patients the probe never sees, [k, d].
        holdout_labels: For each of them, concept to value.
        concepts: Concepts to measure, in the order of the rows.
        holdout_patients: Patient of each held-out image. Where left out, the ceiling has no interval.

    Raises:
        BadInput: Sets that do not fit together, features that are not finite, patients on both
            sides of the ceiling, a wanted value the probe part never shows, or nothing to measure.
    """
    check_rows("synthetic", synthetic_features, [wanted, prompt_groups], synthetic_features.shape[-1])
    check_rows("probe", probe_features, [probe_labels, probe_patients], synthetic_features.shape[-1])
    check_rows("holdout", holdout_features, [holdout_labels], synthetic_features.shape[-1])
    if holdout_patients is not None:
        check_rows("holdout", holdout_features, [holdout_patients], synthetic_features.shape[-1])
        check_disjoint(probe_patients, holdout_patients)
    prompts = draw_weights(prompt_groups, "prompts")
    patients = None if holdout_patients is None else draw_weights(holdout_patients, "held-out patients")

    rows, answers, ceilings, warnings = [], [], [], []
    tallies: list[Tally] = []
    for concept in concepts:
        asked = [i for i, labels in enumerate(wanted) if concept in labels]
        known = [i for i, labels in enumerate(probe_labels) if concept in labels]
        values = sorted({wanted[i][concept] for i in asked})
        if len(values) < 2:
            warnings.append(f"{concept}: left out; prompts ask for {len(values)} of its values, not for two.")
            continue
        unknown = set(values) - {probe_labels[i][concept] for i in known}
        if unknown:
            raise BadInput(
                f"prompts ask for {concept} = {min(unknown)}, which no image of the probe part shows; "
                "correct the prompt's label or label the reference"
            )
        probe = train_probe(
            probe_features[known],
            [probe_labels[i][concept] for i in known],
            [probe_patients[i] for i in known],
        )
        answers.append(ask(probe, synthetic_features, wanted, concept, asked, prompts))
        tallies += _tally(probe.predict(synthetic_features[asked]), wanted, concept, asked, prompt_groups)
        seen = [i for i, labels in enumerate(holdout_labels) if labels.get(concept) in values]
        ceiling = None
        if {holdout_labels[i][concept] for i in seen} == set(values):
            ceiling = ask(probe, holdout_features, holdout_labels, concept, seen, patients)
            ceilings.append(ceiling)
        else:
            warnings.append(f"{concept}: no ceiling; the held-out real images do not show all its values.")
        counts = {value: sum(wanted[i][concept] == value for i in asked) for value in values}
        rows.append(
            ConceptFaithfulness(
                concept=concept,
                counts=counts,
                accuracy=estimate(answers[-1:], prompts),
                real=None if ceiling is None else estimate([ceiling], patients),
                chance=1 / len(values),
            )
        )
    if not rows:
        raise BadInput("no concept can be measured: " + (" ".join(warnings) or "name at least one"))
    overall = ConceptFaithfulness(
        concept=OVERALL,
        counts={},
        accuracy=estimate(answers, prompts),
        # A ceiling over fewer concepts than the accuracy would not be its ceiling.
        real=estimate(ceilings, patients) if len(ceilings) == len(rows) else None,
        chance=sum(row.chance for row in rows) / len(rows),
    )
    return Faithfulness(rows=rows, overall=overall, protocol=PROTOCOL, warnings=warnings, tallies=tallies)


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
            classes.append([counts[0], counts[1]])
        concepts.append(draws_from_counts(classes, bootstrap.weights))
    return torch.stack(concepts).mean(dim=0)


def _tally(
    predicted: Sequence[str], wanted: Sequence[Labels], concept: str, asked: list[int], groups: Sequence[str]
) -> list[Tally]:
    found: dict[tuple[str, str], list[int]] = {}
    for answer, row in zip(predicted, asked, strict=True):
        counts = found.setdefault((groups[row], wanted[row][concept]), [0, 0])
        counts[0] += 1
        counts[1] += answer == wanted[row][concept]
    return [
        Tally(concept=concept, prompt=prompt, wanted=value, images=images, hits=hits)
        for (prompt, value), (images, hits) in found.items()
    ]
