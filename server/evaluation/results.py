"""What the parts of an evaluation find beside fidelity and faithfulness, as it is stored and reported."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from polyclinic.server.evaluation.estimate import Estimate


class Result(BaseModel):
    """Base of every result: unknown fields are refused, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class PromptCosine(Result):
    """Mean cosine between images and their prompts under a named CLIP-type model.

    Attributes:
        model: Its id or folder, as the study names it.
        cosine: On synthetic images against their own prompts.
        shuffled: On synthetic images against all other prompts: what no faithfulness scores.
        lift: cosine - shuffled, paired image by image; above 0 where images listen to their prompts.
        warning: What such a score cannot see.
        weights: SHA-256 of the model's folder; empty where an earlier release measured.
        protocol: Version of this measurement; empty likewise.
    """

    model: str
    cosine: Estimate
    shuffled: Estimate
    lift: Estimate
    warning: str
    weights: str = ""
    protocol: str = ""


class ConceptUtility(Result):
    """Balanced accuracy on real held-out patients of probes trained on three diets, for one concept.

    Attributes:
        concept: Name of the label, or "overall".
        synthetic: Trained on synthetic images with the labels their prompts ask for.
        real: Trained on the reference's probe part.
        both: Trained on the two together.
        gain: both - real, paired over patients.
        chance: What a constant answer scores.
    """

    concept: str
    synthetic: Estimate
    real: Estimate
    both: Estimate
    gain: Estimate
    chance: float


class Utility(Result):
    """Train on synthetic, test on real: what the images are worth to somebody who trains on them.

    Attributes:
        extractor: Features the probes read.
        rows: One row a concept.
        overall: Mean over the rows.
        protocol: Version of this measurement.
        warnings: Sentences to print beside the numbers.
    """

    extractor: str
    rows: list[ConceptUtility]
    overall: ConceptUtility | None
    protocol: str
    warnings: list[str]


class NearCopies(Result):
    """Public patients to whom a drawn image comes nearer than to patients the generator never saw.

    One for each measure of distance.

    Attributes:
        found: Patients of the pretrain part under the threshold.
        n: Patients of the pretrain part.
        images: Drawn images that are the nearest of those. None where an earlier release measured: `found`
            of `n` are then drawn images, nearer to a public one than public patients lie to each other.
        share: found / n with its interval; `groups` counts patients.
        expected: Share of the evaluate part's patients under the same threshold, by construction below alpha.
        alpha: Chance at which the threshold flags a patient whom the generator has not seen.
        threshold: Distance below which a drawn image counts as a near copy.
        measure: What the distance is.
        note: What this does and does not say.
    """

    found: int
    n: int
    images: int | None = None
    share: Estimate
    expected: float
    alpha: float
    threshold: float
    measure: str
    note: str


class MedvqaScores(Result):
    """The official MedVQA-GI 2025 scores, computed exactly as its scorer defines them.

    Attributes:
        extractor: Model whose CLS token is taken.
        fbd: Frechet BiomedCLIP distance of all images.
        fidelity: Mean of 1000 / (1 + mean distance) over pairs of prompts.
        agreement: Mean cosine between the two phrasings' images.
        diversity: Mean pairwise distance of normalised features.
        pairs: Pairs of prompts.
        note: Where the setting departs from the competition's, or empty.
        weights: SHA-256 of the model's folder; empty where an earlier release measured.
        protocol: Version of this measurement; empty likewise.
    """

    extractor: str
    fbd: float
    fidelity: float
    agreement: float
    diversity: float
    pairs: int
    note: str
    weights: str = ""
    protocol: str = ""


class FederatedFidelity(Result):
    """DP-CMMD: the final images against the sites' own, from one noisy vector a site (PRIVACY.md, rule 15).

    Attributes:
        cmmd: Unbiased squared MMD; its interval is that of the noise.
        epsilon: Largest charge of a site for it, at `delta`; None without privacy.
        delta: Of that epsilon.
        sites: Sites that sent a vector.
        patients: Their noisy number.
        features: Random Fourier features, D.
        note: What a reader must know.
    """

    cmmd: Estimate
    epsilon: float | None
    delta: float | None
    sites: list[str]
    patients: float
    features: int
    note: str


class SiteGate(Result):
    """What a site said after its leakage gate: a person's word, never a reason (rule 16).

    Attributes:
        site: Name of the site.
        verdict: "released", "not released", or "not asked".
        near_copies: Noisy count of patients with a near copy, where its approval allows that release.
        epsilon: Charge of that count.
        delta: Of that epsilon.
    """

    site: str
    verdict: Literal["released", "not released", "not asked"]
    near_copies: Estimate | None = None
    epsilon: float | None = None
    delta: float | None = None
