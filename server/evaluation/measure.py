"""Everything that is measured on one set of drawn images against the public reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from polyclinic.common.data.preprocess import describe
from polyclinic.common.data.table import Record
from polyclinic.common.device import pick_device
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.features.load import load_extractor
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study
from polyclinic.server.evaluation.answers import Labelled
from polyclinic.server.evaluation.cosine import prompt_cosine
from polyclinic.server.evaluation.diversity import (
    WINDOW,
    luminance,
    mean_similarity,
    pairs_between,
    pairs_within,
)
from polyclinic.server.evaluation.estimate import (
    FEWEST_GROUPS,
    FEWEST_IMAGES,
    PROTOCOL,
    Fidelity,
    measure_fidelity,
    too_few_images,
    with_floor,
)
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.jackknife import Jackknifed
from polyclinic.server.evaluation.medvqa import medvqa_scores
from polyclinic.server.evaluation.near_copies import near_copies
from polyclinic.server.evaluation.probe import Faithfulness, measure_faithfulness
from polyclinic.server.evaluation.results import MedvqaScores, NearCopies, PromptCosine, Utility
from polyclinic.server.evaluation.split import equal_n
from polyclinic.server.evaluation.utility import measure_utility
from polyclinic.server.reference import Reference

SHEET_COLUMNS = 6
PROMPT_INTERVAL = "95 %, delete-one-prompt jackknife at this number of draws"
NO_PATIENTS = (
    "The reference has no patient ids: every image counts as a patient, so intervals are too narrow where "
    "patients have several images, and the floor too low."
)
BETWEEN_PATIENTS = (
    "between draws of one prompt; the floor is between images of different patients of the reference, "
    "and a ratio well above 1 means that draws of a prompt repeat each other"
)


class Judgement(BaseModel):
    """What was measured after a round.

    Attributes:
        round: 0 is the start.
        columns: Draws of each prompt on the sample sheet.
        fidelity: Distance to the reference; None below 50 images, where it would mean nothing.
        no_fidelity: Why there is none, as a sentence.
        faithfulness: Agreement with the prompts; None where the study names no concepts.
        second: Fidelity on the study's other extractors.
        cosine: CLIP-type agreement, where the study names a model.
        utility: What the images are worth to train on.
        near_copies: Public patients of whom a near copy was drawn, by features and by pixels.
        medvqa: The official MedVQA-GI 2025 scores, where the study asks for them.
    """

    model_config = ConfigDict(extra="forbid")

    round: int
    columns: int
    fidelity: Fidelity | None
    faithfulness: Faithfulness | None
    second: list[Fidelity] = []
    cosine: PromptCosine | None = None
    utility: Utility | None = None
    near_copies: list[NearCopies] = []
    medvqa: MedvqaScores | None = None
    no_fidelity: str = ""


@dataclass(frozen=True)
class Drawn:
    """Synthetic images with what they were asked to show.

    Attributes:
        images: [N, 3, H, W] in [0, 1], a prompt's draws side by side.
        prompts: Prompt of each image.
        wanted: For each image, concept to the value its prompt asks for.
    """

    images: Tensor
    prompts: list[str]
    wanted: list[dict[str, str]]


def drawn_for(study: Study, images: Tensor) -> Drawn:
    """Say what each image of an evaluation was asked to show."""
    each = [prompt for prompt in study.evaluation.prompts for _ in range(study.evaluation.draws)]
    return Drawn(images, [prompt.text for prompt in each], [dict(prompt.labels) for prompt in each])


def measure(number: int, drawn: Drawn, reference: Reference, study: Study, store: FeatureStore) -> Judgement:
    """Measure what was drawn after a round.

    Args:
        number: The round.
        drawn: The images.
        reference: Public images, split by patient.
        study: Says what is measured, and with what.
        store: Gives features of both.

    Raises:
        BadInput: Images of another size than the reference's, an extractor that is not there, or features
            that are not finite.
    """
    size, shape = study.data.image_size, tuple(drawn.images.shape[-2:])
    if shape != (size, size):
        raise BadInput(
            f"the drawn images have {shape[0]} x {shape[1]} px and the reference {size} x {size}: extractors "
            "see resolution; set data.image_size to what the generator draws"
        )
    device = pick_device(study.training.device)
    extractors = [load_extractor(settings, device) for settings in study.evaluation.extractors]
    fidelity: list[Fidelity] = []
    too_few = too_few_images(len(drawn.images), len(reference.evaluate))
    if not too_few:
        fidelity = [_fidelity(extractor, drawn, reference, study, store) for extractor in extractors]
        fidelity[0] = _with_similarity(fidelity[0], drawn, reference, study, store)
        if study.data.unit == "image":
            fidelity = [f.model_copy(update={"warnings": [*f.warnings, NO_PATIENTS]}) for f in fidelity]
    headline, faithfulness, utility = extractors[0], None, None
    concepts = study.reference.concepts
    if concepts and reference.probe:
        synthetic = Labelled(store.of_images(headline, drawn.images), drawn.wanted, drawn.prompts)
        probe, holdout = (
            _labelled(headline, part, study, store) for part in (reference.probe, reference.evaluate)
        )
        faithfulness = measure_faithfulness(synthetic, probe, holdout, concepts)
        utility = measure_utility(synthetic, probe, holdout, concepts, headline.name)
    columns = min(SHEET_COLUMNS, study.evaluation.draws)
    return Judgement(
        round=number,
        columns=columns,
        fidelity=fidelity[0] if fidelity else None,
        no_fidelity=too_few,
        second=fidelity[1:],
        faithfulness=faithfulness,
        utility=utility,
        near_copies=near_copies(drawn.images, headline, reference, store),
        cosine=prompt_cosine(drawn.images, drawn.prompts, study.evaluation, device),
        medvqa=medvqa_scores(drawn.images, drawn.prompts, study, reference, store, device),
    )


def _fidelity(
    extractor: Extractor, drawn: Drawn, reference: Reference, study: Study, store: FeatureStore
) -> Fidelity:
    return measure_fidelity(
        store.of_images(extractor, drawn.images),
        drawn.prompts,
        store.of_records(extractor, reference.evaluate),
        [record.patient for record in reference.evaluate],
        study.reference.key,
        extractor=extractor.name,
        preprocessing=f"{describe(study.data.image_size, study.data.fit)}; {extractor.preprocessing}",
        weights=extractor.weights,
        standardise=extractor.standardise,
    )


def _with_similarity(
    fidelity: Fidelity, drawn: Drawn, reference: Reference, study: Study, store: FeatureStore
) -> Fidelity:
    """Add MS-SSIM between draws of a prompt, beside that between patients of the reference."""
    patients = [record.patient for record in reference.evaluate]
    chosen = equal_n(drawn.prompts, patients, study.reference.key, minimum=FEWEST_IMAGES)
    prompts = [drawn.prompts[i] for i in chosen.synthetic]
    pairs = pairs_within(prompts)
    groups = [prompts[a] for a, _ in pairs]
    if len(set(groups)) < FEWEST_GROUPS or study.data.image_size < WINDOW:
        why = f"No MS-SSIM: it needs {FEWEST_GROUPS} prompts of two draws each, and images of {WINDOW} px."
        return fidelity.model_copy(update={"warnings": [*fidelity.warnings, why]})
    found = mean_similarity(luminance(drawn.images[chosen.synthetic]), pairs, groups)
    records = [reference.evaluate[i] for i in chosen.reference]

    def of_reference() -> Tensor:
        names = [record.patient for record in records]
        between = pairs_between(names)
        return torch.tensor(
            mean_similarity(luminance(store.pixels(records)), between, [names[a] for a, _ in between]),
            dtype=torch.float64,
        )

    recipe = ["ms-ssim", PROTOCOL, store.names(records), [record.patient for record in records]]
    real = Jackknifed(*store.once(recipe, of_reference).tolist())
    resampled = {"prompts": len(set(groups))}
    estimate = with_floor(found, real, PROMPT_INTERVAL, len(records), resampled, BETWEEN_PATIENTS)
    return fidelity.model_copy(update={"others": {**fidelity.others, "ms_ssim": estimate}})


def _labelled(extractor: Extractor, records: list[Record], study: Study, store: FeatureStore) -> Labelled:
    """A part of the reference, as a probe learns from it or is tested on it."""
    return Labelled(
        store.of_records(extractor, records),
        [known(record, study.reference.concepts) for record in records],
        [record.patient for record in records],
    )


def known(record: Record, concepts: tuple[str, ...]) -> dict[str, str]:
    """What a reference image's table says about the concepts."""
    return {concept: record.labels[concept] for concept in concepts if record.labels.get(concept)}
