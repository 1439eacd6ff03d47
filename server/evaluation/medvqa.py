"""The official scores of MedVQA-GI 2025, subtask 2, as its scorer computes them.

Read from `submission_task2.py` in the package medvqa 0.15.7. Prompts come in pairs A, B: two phrasings of
one objective, 10 images each. Features are the first token of the last hidden state of a vision model,
neither projected nor normalised. Every objective has real images of its own.

* FBD: Frechet distance between all drawn images and the real images of all objectives, one after the
  other, so that a real image counts once for each objective it belongs to.
* fidelity: mean over objectives of 1000 / (1 + (F(A, real) + F(B, real)) / 2).
* agreement: mean over objectives of the mean cosine over all pairs of an image of A and one of B.
* diversity: mean over prompts of the mean Euclidean distance between two images' normalised features.

The Frechet distances here come from eigenvalues; the scorer takes a matrix root of singular covariances,
which agrees to rounding. Its loop ends after half of the objectives; here all count.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.features.extractor import Extractor
from polyclinic.common.features.hub import check_folder, hub_extractor
from polyclinic.common.generators.public import resolve
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.fidelity import frechet_distance
from polyclinic.server.evaluation.results import MedvqaScores
from polyclinic.server.reference import Reference

OFFICIAL_MODEL = "ikim-uk-essen/BiomedCLIP_ViT_patch16_224"
OFFICIAL_DRAWS = 10
# Raise it whenever a number would change for the same images.
PROTOCOL = "polyclinic-medvqa-1"
# A covariance needs two images.
FEWEST = 2
FIELD = "evaluation.medvqa.model"


class Objective(NamedTuple):
    """One objective: features of the images of its two phrasings and of its real images, [n, d] each."""

    first: Tensor
    second: Tensor
    real: Tensor


class Scores(NamedTuple):
    """The four scores, unrounded."""

    fbd: float
    fidelity: float
    agreement: float
    diversity: float


def medvqa_scores(
    images: Tensor,
    prompts: Sequence[str],
    study: Study,
    reference: Reference,
    store: FeatureStore,
    device: str = "cpu",
) -> MedvqaScores | None:
    """Measure what `evaluation.medvqa` asks for; None where the study does not have it.

    Args:
        images: [N, 3, H, W] in [0, 1].
        prompts: Prompt of each.
        study: Names the model and the pairs.
        reference: Gives the real images.
        store: Keeps features.
        device: Where to compute.

    Raises:
        BadInput: The model is not there, or a pair has no real images of its own.
    """
    settings = study.evaluation.medvqa
    if settings is None:
        return None
    extractor = _extractor(resolve(settings.model, settings.revision, FIELD), settings.model, device)
    drawn, real = store.of_images(extractor, images), store.of_records(extractor, reference.evaluate)

    def of_prompt(text: str) -> Tensor:
        return drawn[[i for i, prompt in enumerate(prompts) if prompt == text]]

    rows = real_images(study, reference)
    scores = official_scores(
        [Objective(of_prompt(a), of_prompt(b), real[rows[a, b]]) for a, b in settings.pairs]
    )
    labelled = {prompt.text for prompt in study.evaluation.prompts if prompt.labels}
    return MedvqaScores(
        extractor=extractor.name,
        **scores._asdict(),
        pairs=len(settings.pairs),
        note=departures(
            settings.model,
            study.evaluation.draws,
            len(settings.pairs),
            unlabelled=sum(pair[0] not in labelled for pair in settings.pairs),
            prompts=len(study.evaluation.prompts),
        ),
        weights=extractor.weights,
        protocol=PROTOCOL,
    )


def check_medvqa(study: Study, reference: Reference) -> None:
    """Refuse a setting that cannot be measured, without loading the model.

    Raises:
        BadInput: The model is not there, or a pair has no real images of its own.
    """
    settings = study.evaluation.medvqa
    if settings is not None:
        with _naming_the_field():
            check_folder(resolve(settings.model, settings.revision, FIELD), settings.model)
        real_images(study, reference)


@functools.lru_cache(maxsize=1)
def _extractor(folder: Path, name: str, device: str) -> Extractor:
    with _naming_the_field():
        return hub_extractor(folder, name, "cls", device)


@contextlib.contextmanager
def _naming_the_field() -> Iterator[None]:
    """Let a refusal of the model name the field that it stands in here."""
    try:
        yield
    except BadInput as error:
        raise BadInput(str(error).replace("`evaluation.extractors`", f"`{FIELD}`")) from error


def real_images(study: Study, reference: Reference) -> dict[tuple[str, str], list[int]]:
    """Rows of the evaluate part that belong to each pair.

    Raises:
        BadInput: As `real_rows`.
    """
    if study.evaluation.medvqa is None:
        return {}
    wanted = {prompt.text: dict(prompt.labels) for prompt in study.evaluation.prompts}
    known = [record.labels for record in reference.evaluate]
    return {(a, b): real_rows(wanted[a], wanted[b], known, (a, b)) for a, b in study.evaluation.medvqa.pairs}


def official_scores(objectives: Sequence[Objective]) -> Scores:
    """Compute FBD, fidelity, agreement and diversity.

    Args:
        objectives: At least one; at least two images in each of its three sets.
    """
    distances, cosines, spreads = [], [], []
    for first, second, real in objectives:
        distances.append((frechet_distance(first, real) + frechet_distance(second, real)) / 2)
        a, b = (F.normalize(features.double(), dim=1) for features in (first, second))
        cosines.append(float((a @ b.T).mean()))
        # Differences, since a distance from a product would lose a mode collapse in rounding.
        spreads += [float(F.pdist(unit).mean()) for unit in (a, b)]
    drawn = torch.cat([features for o in objectives for features in (o.first, o.second)])
    return Scores(
        fbd=frechet_distance(drawn, torch.cat([objective.real for objective in objectives])),
        fidelity=sum(1000 / (1 + distance) for distance in distances) / len(distances),
        agreement=sum(cosines) / len(cosines),
        diversity=sum(spreads) / len(spreads),
    )


def real_rows(
    wanted: dict[str, str], other: dict[str, str], labels: Sequence[dict[str, str]], pair: Sequence[str]
) -> list[int]:
    """Real images of an objective: those whose labels are what its prompts ask for.

    Args:
        wanted: Labels of the first phrasing; none means that every image is of this objective.
        other: Labels of the second.
        labels: What is known of each real image.
        pair: The two phrasings, for the message.

    Raises:
        BadInput: The phrasings ask for different things, or fewer than two real images show it.
    """
    if wanted != other:
        raise BadInput(
            f'`evaluation.medvqa.pairs`: "{pair[0]}" asks for {wanted or "nothing"} and "{pair[1]}" for '
            f"{other or 'nothing'}; a pair is two phrasings of one objective, so give both the same labels"
        )
    rows = [i for i, known in enumerate(labels) if wanted.items() <= known.items()]
    if len(rows) < FEWEST:
        raise BadInput(
            f'`evaluation.medvqa.pairs`: "{pair[0]}" asks for {wanted}, which {len(rows)} images of the '
            f"reference's evaluate part show; at least {FEWEST} are needed: label the reference, or leave "
            "the pair out"
        )
    return rows


def departures(model: str, draws: int, objectives: int, unlabelled: int, prompts: int) -> str:
    """Say where a setting departs from the competition's.

    Args:
        model: Vision model named by the study.
        draws: Images a prompt.
        objectives: Pairs.
        unlabelled: Pairs without labels, whose real images are the whole evaluate part.
        prompts: Prompts of the study.
    """
    notes = ["prompts, pairs and real images are this study's, not the competition's"]
    if model != OFFICIAL_MODEL:
        notes.append(f"{model} instead of {OFFICIAL_MODEL}, so that FBD is not a BiomedCLIP distance")
    if draws != OFFICIAL_DRAWS:
        notes.append(f"{draws} images a prompt instead of {OFFICIAL_DRAWS}; distances depend on the number")
    if unlabelled:
        notes.append(f"{unlabelled} of {objectives} pairs have no labels and take all real images as theirs")
    if prompts > 2 * objectives:
        notes.append(f"{prompts - 2 * objectives} prompts are in no pair and do not count")
    notes.append("all pairs count, where the official loop stops after half of them")
    notes.append("not rounded to two decimals")
    return f"Departs from the official setting: {'; '.join(notes)}."
