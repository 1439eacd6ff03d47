"""What an evaluation needs must be there before anything is trained or any budget is spent."""

from __future__ import annotations

from polyclinic.common.features.load import check_extractors
from polyclinic.common.generators.public import resolve
from polyclinic.common.progress import say
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study
from polyclinic.server.evaluation.cosine import FIELD, check_clip
from polyclinic.server.evaluation.estimate import FEWEST_GROUPS, FEWEST_IMAGES
from polyclinic.server.evaluation.medvqa import check_medvqa
from polyclinic.server.reference import Reference


def check_evaluation(study: Study, reference: Reference) -> None:
    """Refuse a study whose evaluation would fail after its first round.

    Raises:
        BadInput: A label that prompts ask for is not in the reference, a named model or extractor is not
            there, or prompts or patients are too few for any interval.
    """
    _check_labels(study, reference)
    _check_groups(study, reference)
    settings = study.evaluation
    check_extractors(settings.extractors)
    if settings.clip_model:
        check_clip(resolve(settings.clip_model, settings.clip_revision, FIELD), settings.clip_model)
    check_medvqa(study, reference)


def _check_groups(study: Study, reference: Reference) -> None:
    """Where fidelity will be measured, there must be images, prompts and patients enough.

    A study that draws fewer than 50 images asks for no fidelity, which is said and let pass: a trial run.
    """
    drawn, real = study.evaluation.images, len(reference.evaluate)
    if drawn < FEWEST_IMAGES:
        say(
            f"fidelity will not be measured: the study draws {drawn} images in one evaluation, and it takes "
            f"{FEWEST_IMAGES}; raise evaluation.draws or add prompts"
        )
        return
    if real < FEWEST_IMAGES:
        raise BadInput(
            f"study {study.name}: the reference's evaluate part has {real} images, and fidelity takes "
            f"{FEWEST_IMAGES} or more; add public images, raise `reference.evaluate` (now "
            f"{study.reference.parts['evaluate']:g} of its patients)"
            f"{' or `reference.fraction`' if study.simulation else ''}, or go without fidelity by drawing "
            f"fewer than {FEWEST_IMAGES} images (`evaluation.draws`)"
        )
    prompts = len({prompt.text for prompt in study.evaluation.prompts})
    patients = len({record.patient for record in reference.evaluate})
    for count, what, fix in (
        (prompts, "different prompts in evaluation.prompts", "write more of them"),
        (patients, "patients in the reference's evaluate part", "add some, or raise reference.evaluate"),
    ):
        if count < FEWEST_GROUPS:
            raise BadInput(f"{count} {what}: no interval without at least {FEWEST_GROUPS}; {fix}")


def _check_labels(study: Study, reference: Reference) -> None:
    """Every value that prompts ask for must be learnt by a probe, and some concept be measurable."""
    concepts = study.reference.concepts
    if not concepts or not reference.probe:
        return
    measurable = False
    for concept in concepts:
        wanted = {p.labels[concept] for p in study.evaluation.prompts if concept in p.labels}
        shown = {r.labels[concept] for r in reference.probe if r.labels.get(concept)}
        if wanted and not shown:
            raise BadInput(
                f"`reference.concepts` names {concept}, but no image of the reference's probe part has a "
                f"value for it; add a column {concept} to the reference's table, or remove the concept"
            )
        if len(wanted) < 2:
            continue
        measurable = True
        if wanted - shown:
            raise BadInput(
                f"prompts ask for {concept} = {min(wanted - shown)}, which no image of the reference's probe "
                f"part shows (it shows {', '.join(sorted(shown))}); correct the prompt's label or label "
                "the reference"
            )
    if not measurable:
        raise BadInput(
            f"`reference.concepts` names {', '.join(concepts)}, but no concept is asked for with two values; "
            "write prompts with labels for presence and for absence, or remove the concepts"
        )
