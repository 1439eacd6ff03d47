"""Settings known to be poor, each with what is wrong and what to write instead.

The limits come from measurements on small private runs: a clip bound that is too large is fatal,
then count the learning rate, the views a patient shows and the noise on the mean gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import ceil

from polyclinic.common.study import Study
from polyclinic.server.evaluation.estimate import ADVISED_IMAGES, FEWEST_IMAGES
from polyclinic.server.report.metrics import Part
from polyclinic.server.report.wording import count, listed, number

LARGE_CLIP = 10.0
LARGE_EPSILON = 10.0
FEW_PATIENTS_A_STEP = 5.0
LARGE_NOISE_TO_BATCH = 0.2
FEW_PROMPTS_A_VALUE = 16
LARGE_LEARNING_RATE = 1e-2
MANY_ROUNDS = 20
SPECIAL_TOKENS = 2  # begin and end
LETTERS_A_TOKEN = 6  # clinical words are cut into several tokens


class Advice(Part):
    """A warning.

    Attributes:
        code: Stable short name.
        text: One sentence: what is poor, why, and what to write.
    """

    code: str
    text: str


def advise(study: Study, noise_to_batch: dict[str, float | None]) -> list[Advice]:
    """List what is known to be poor in a study.

    Args:
        study: The study.
        noise_to_batch: Site to sigma / (q x declared); None where privacy is off or the size unknown.
    """
    found = (*_privacy(study, noise_to_batch), *_training(study), *_evaluation(study))
    return [Advice(code=code, text=text) for code, text in found]


def rough_tokens(text: str) -> int:
    """Guess how many tokens an encoder makes of a text: its vocabulary may not be on this machine."""
    pieces = re.findall(r"\w+|[^\w\s]", text)
    return SPECIAL_TOKENS + sum(ceil(len(piece) / LETTERS_A_TOKEN) for piece in pieces)


def _privacy(study: Study, noise_to_batch: dict[str, float | None]) -> Iterator[tuple[str, str]]:
    privacy, unit = study.privacy, study.data.unit
    sites = study.simulation.sites if study.simulation else {}
    few = [
        n
        for n, s in sorted(sites.items())
        if privacy.sampling_rate * s.declared_patients < FEW_PATIENTS_A_STEP
    ]
    if few:
        yield (
            "few-patients",
            f"fewer than {number(FEW_PATIENTS_A_STEP)} {unit}s a step are expected at {listed(few)}; "
            "raise privacy.sampling_rate",
        )
    if not privacy.enabled:
        yield "not-private", "privacy.enabled = false: everything this study makes is stamped NOT PRIVATE"
        return
    if unit == "image":
        yield (
            "image-unit",
            'data.unit = "image" protects one image, not a patient who has several; '
            "use it only where no patient ids exist",
        )
    if privacy.clip >= LARGE_CLIP:
        yield (
            "clip-large",
            f"privacy.clip = {number(privacy.clip)}: noise grows with it and drowns the gradient; "
            "write 1 or less",
        )
    if privacy.engine in ("hooks", "ghost"):
        yield (
            "engine-refuses",
            f'privacy.engine = "{privacy.engine}" is Opacus\'s and refuses the convolutions of this generator'
            f'{" and more than one view" if privacy.engine == "ghost" else ""}; write "bookkeeping"',
        )
    elif privacy.engine != "bookkeeping":
        yield (
            "engine-slow",
            f'privacy.engine = "{privacy.engine}" gives the same sum more slowly; write "bookkeeping"',
        )
    if privacy.views == 1:
        yield (
            "one-view",
            f"privacy.views = 1: averaging 4 to 8 views a {unit} costs no privacy and steadies the gradient",
        )
    if privacy.epsilon > LARGE_EPSILON:
        yield (
            "epsilon-large",
            f"privacy.epsilon = {number(privacy.epsilon)} promises a {unit} little; "
            f"write {number(LARGE_EPSILON)} or less",
        )
    near = [n for n, s in sorted(sites.items()) if privacy.delta > 0.5 / (10 * s.declared_patients)]
    if near:
        yield (
            "delta-near-limit",
            f"privacy.delta = {number(privacy.delta)} is near the limit 1/(10 x declared {unit}s) at "
            f"{listed(near)}; a site that declares more would refuse",
        )
    loud = [n for n, ratio in sorted(noise_to_batch.items()) if (ratio or 0) > LARGE_NOISE_TO_BATCH]
    if loud:
        yield (
            "noise-large",
            f"noise on the mean gradient is over {number(LARGE_NOISE_TO_BATCH)} of the clip bound in every "
            f"coordinate at {listed(loud)}; raise privacy.sampling_rate or epsilon, or take fewer steps",
        )


def _training(study: Study) -> Iterator[tuple[str, str]]:
    training, federation = study.training, study.federation
    # quorum = 0 means all sites; a quorum is never below min_sites.
    if federation.min_sites == 1:
        yield (
            "single-site",
            "federation.min_sites = 1: a single hospital's update would be released; write 2 or more",
        )
    peak = study.learning_rate(0)
    if peak > LARGE_LEARNING_RATE:
        yield (
            "learning-rate-large",
            f"a learning rate of {number(peak)} is too large for AdamW; write 1e-3 or less",
        )
    if training.schedule == "constant" and training.rounds >= MANY_ROUNDS:
        yield (
            "constant-rate",
            f'training.schedule = "constant" over {count(training.rounds, "round")} ends in noise; '
            'write "cosine"',
        )


def _evaluation(study: Study) -> Iterator[tuple[str, str]]:
    evaluation = study.evaluation
    if evaluation.images < FEWEST_IMAGES:
        yield (
            "no-metric",
            f"{count(evaluation.images, 'evaluation image')}: below {FEWEST_IMAGES} no metric is computed; "
            "raise evaluation.draws or add prompts",
        )
    elif evaluation.images < ADVISED_IMAGES:
        yield (
            "few-images",
            f"{count(evaluation.images, 'evaluation image')}: below {ADVISED_IMAGES} intervals are wide; "
            "raise evaluation.draws or add prompts",
        )
    thin = [
        f"{concept} = {value} ({prompts})"
        for (concept, value), prompts in sorted(_prompts_a_value(study).items())
        if prompts < FEW_PROMPTS_A_VALUE
    ]
    if thin:
        yield (
            "few-prompts",
            f"fewer than {FEW_PROMPTS_A_VALUE} distinct prompts ask for {listed(thin)}: faithfulness counts "
            "prompts, not images; add prompts",
        )
    asked = {concept for prompt in evaluation.prompts for concept in prompt.labels}
    silent = [concept for concept in study.reference.concepts if concept not in asked]
    if silent:
        yield "concept-unasked", f"no prompt asks for {listed(silent)}, so it is not measured; add prompts"
    most = study.generator.max_tokens
    long = [p.text for p in evaluation.prompts if rough_tokens(p.text) > most]
    if long:
        yield (
            "long-prompt",
            f"{count(len(long), 'prompt')} may be longer than generator.max_tokens = {most} and be cut, "
            f'e.g. "{long[0][:60]}"; raise it or write less',
        )


def _prompts_a_value(study: Study) -> dict[tuple[str, str], int]:
    """Count distinct prompts by what they ask for."""
    texts: dict[tuple[str, str], set[str]] = {}
    for prompt in study.evaluation.prompts:
        for wanted in prompt.labels.items():
            texts.setdefault(wanted, set()).add(prompt.text)
    return {wanted: len(found) for wanted, found in texts.items()}
