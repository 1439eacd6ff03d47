"""What `metrics.json` holds: every number that the report, the model card and `compare` print.

The file is the only source of those pages, so that they can never disagree. Unknown fields are
refused on reading. Infinities (the epsilon of a run without privacy) travel as the string
"Infinity", since JSON has no word for them.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polyclinic.server.evaluation.audit import SiteAudit
from polyclinic.server.evaluation.estimate import Fidelity
from polyclinic.server.evaluation.probe import Faithfulness
from polyclinic.server.evaluation.results import (
    FederatedFidelity,
    MedvqaScores,
    NearCopies,
    PromptCosine,
    SiteGate,
    Utility,
)

SCHEMA_VERSION: Literal[1] = 1

Source = Literal["measured", "sampled", "counted", "estimated"]
Phase = Literal["pretraining", "preparation", "training", "aggregation", "evaluation"]
Quantity = Literal[
    "wall time", "CPU time", "GPU time", "FLOPs", "energy", "peak memory", "bytes down", "bytes up", "disk"
]
Unit = Literal["s", "FLOP", "J", "B"]

UNIT_OF: dict[Quantity, Unit] = {
    "wall time": "s",
    "CPU time": "s",
    "GPU time": "s",
    "FLOPs": "FLOP",
    "energy": "J",
    "peak memory": "B",
    "bytes down": "B",
    "bytes up": "B",
    "disk": "B",
}
# Wall times overlap between sites and memory peaks do not coincide: neither may be added up.
ADDITIVE: tuple[Quantity, ...] = ("CPU time", "GPU time", "FLOPs", "energy", "bytes down", "bytes up", "disk")


class Part(BaseModel):
    """Base of every model here: unknown fields are refused, infinities survive JSON."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class StudyFacts(Part):
    """The study a run carried out.

    Attributes:
        name: Short name of the study, or of an arm of a comparison.
        title: Title a person reads.
        resolved_hash: SHA-256 of the resolved study.
        base_hash: SHA-256 of the frozen public base.
        generator: Generator family and size.
        trainable_parameters: Number of parameters in the trainable state.
        image_size: Side of the square images the generator draws, in pixels.
    """

    name: str
    title: str
    resolved_hash: str
    base_hash: str
    generator: str
    trainable_parameters: int = Field(ge=0)
    image_size: int = Field(gt=0)


class SiteFacts(Part):
    """One hospital's part in the run, from public facts only.

    Attributes:
        name: Name of the site.
        declared_patients: Size the site's person declared; never counted from the data.
        epsilon: Privacy loss spent by the end; None or infinite without privacy.
        delta: Delta that belongs to epsilon.
        epsilon_cap: What the site allowed for this study.
        sigma: Noise multiplier of the site's mechanism.
        rounds_answered: Rounds with a reply.
        rounds_absent: Rounds without a reply in time.
        refusals: One sentence for each refusal.
    """

    name: str
    declared_patients: int = Field(ge=0)
    epsilon: float | None = None
    delta: float | None = None
    epsilon_cap: float | None = None
    sigma: float | None = None
    rounds_answered: int = Field(default=0, ge=0)
    rounds_absent: int = Field(default=0, ge=0)
    refusals: list[str] = []


class SampleSheet(Part):
    """One PNG with a grid of drawn images; row i shows prompt i.

    Attributes:
        path: Path of the PNG relative to the run directory.
        rows: Number of prompts.
        columns: Number of draws of each prompt.
        image_size: Side of one image, in pixels; the sheet has no gaps between images.
    """

    path: str
    rows: int = Field(gt=0)
    columns: int = Field(gt=0)
    image_size: int = Field(gt=0)


class RoundFacts(Part):
    """What happened in one round; round 0 is the start, before any training.

    Attributes:
        round: Number of the round.
        released: Whether enough sites answered for a new state.
        epsilon: Site to privacy loss spent by the end of the round.
        replied: Sites whose reply entered the round.
        refused: Site to its refusal, as a sentence.
        absent: Sites that did not answer in time.
        bytes_down: Bytes sent to all sites together.
        bytes_up: Bytes received from all sites together.
        seconds: Wall time of the round, evaluation apart.
        evaluated: Whether images were drawn and judged after it.
        fidelity: Distance to the reference, where evaluated.
        faithfulness: Agreement with the prompts, where evaluated.
        samples: The drawn images, where evaluated.
        second: Fidelity on the study's other extractors.
        cosine: CLIP-type agreement with the prompts.
        utility: What the images are worth to train on.
        near_copies: Images close to one of the public reference, by features and by pixels.
        medvqa: The official MedVQA-GI 2025 scores.
    """

    round: int = Field(ge=0)
    released: bool = True
    epsilon: dict[str, float] = {}
    replied: list[str] = []
    refused: dict[str, str] = {}
    absent: list[str] = []
    bytes_down: int = Field(default=0, ge=0)
    bytes_up: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    evaluated: bool = False
    fidelity: Fidelity | None = None
    faithfulness: Faithfulness | None = None
    samples: SampleSheet | None = None
    second: list[Fidelity] = []
    cosine: PromptCosine | None = None
    utility: Utility | None = None
    near_copies: list[NearCopies] = []
    medvqa: MedvqaScores | None = None


class CostRow(Part):
    """One figure of cost. Rows are disjoint: the report adds them up, so no row may be a total.

    Attributes:
        phase: What the cost was for.
        where: Site, "server", or "all sites".
        quantity: What was counted.
        value: The figure, in `unit`.
        unit: s, FLOP, J or B.
        source: How the figure was obtained.
    """

    phase: Phase
    where: str
    quantity: Quantity
    value: float = Field(ge=0, allow_inf_nan=False)
    unit: Unit
    source: Source


class Metrics(Part):
    """Everything the report shows.

    Attributes:
        schema_version: Version of this schema.
        study: The study.
        simulated: Whether the sites were simulated on one machine.
        private: Whether every round ran under differential privacy.
        created: ISO 8601 date, or date and time, of writing.
        code_version: Version of the installed package.
        sites: One entry for each site.
        rounds: One entry for each round, from 0 on, in order.
        audit: What the audit tap shows, one entry for each site that sent one.
        federated_fidelity: DP-CMMD against the sites' own images, where the study asks for it.
        gates: What the sites said after their leakage gate, where the study asks for it.
        cost: What was spent.
        forecast: What `plan` had forecast.
        prompts: Evaluation prompts, in the order of the rows of every sample sheet.
        guarantee: Sentences that state the privacy guarantee.
        not_covered: Sentences that state what it does not cover.
        study_json: The resolved study.
        verdict: The verdict in words; `write_report` fills it.
        seconds_total: Wall time from start to end.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    study: StudyFacts
    simulated: bool
    private: bool
    created: str
    code_version: str
    sites: list[SiteFacts]
    rounds: list[RoundFacts]
    audit: list[SiteAudit] = []
    federated_fidelity: FederatedFidelity | None = None
    gates: list[SiteGate] = []
    cost: list[CostRow] = []
    forecast: list[CostRow] = []
    prompts: list[str] = []
    guarantee: list[str] = []
    not_covered: list[str] = []
    study_json: dict[str, Any] = {}
    verdict: list[str] = []
    seconds_total: float = Field(default=0.0, ge=0)


def evaluated_rounds(metrics: Metrics) -> list[RoundFacts]:
    """Rounds whose images were judged for fidelity, in order."""
    return [r for r in metrics.rounds if r.fidelity is not None]


def first_and_last(metrics: Metrics) -> tuple[RoundFacts, RoundFacts] | None:
    """First and last judged round, or None where nothing was judged; both may be the same round."""
    judged = evaluated_rounds(metrics)
    return (judged[0], judged[-1]) if judged else None


def worst_epsilon(metrics: Metrics) -> float | None:
    """Largest epsilon over the sites: infinite without privacy, None where no site states one."""
    if not metrics.private:
        return math.inf
    spent = [s.epsilon for s in metrics.sites if s.epsilon is not None]
    return max(spent) if spent else None


def round_epsilon(facts: RoundFacts) -> float | None:
    """Largest finite epsilon over the sites by the end of a round, or None."""
    spent = [e for e in facts.epsilon.values() if math.isfinite(e)]
    return max(spent) if spent else None


def total(rows: list[CostRow], quantity: Quantity, phases: tuple[Phase, ...] | None = None) -> float | None:
    """Add up one additive quantity.

    Args:
        rows: Disjoint cost rows.
        quantity: One of `ADDITIVE`.
        phases: Only these phases; None is all of them.

    Returns:
        The sum in the quantity's unit, or None where no row states it.
    """
    if quantity not in ADDITIVE:
        raise ValueError(f"{quantity} does not add up over sites")
    values = [r.value for r in rows if r.quantity == quantity and (phases is None or r.phase in phases)]
    return sum(values) if values else None


def bytes_moved(metrics: Metrics) -> tuple[int, int]:
    """Bytes sent down to and up from all sites over all rounds."""
    return sum(r.bytes_down for r in metrics.rounds), sum(r.bytes_up for r in metrics.rounds)
