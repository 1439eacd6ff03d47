"""What `metrics.json` holds: every number that the report, the model card and `compare` print.

The file is the only source of those pages, so that they can never disagree. Unknown fields are
refused on reading. Infinities (the epsilon of a run without privacy) travel as the string
"Infinity", since JSON has no word for them.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polyclinic.common.cost_settings import CostSettings
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
from polyclinic.server.report.costs import SERVER, CostEntry, CostSummary

SCHEMA_VERSION: Literal[1] = 1


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
        start_hash: SHA-256 of the trainable state of round 0.
        reference_hash: SHA-256 of the coordinator's reference table.
        departures: Where and why the study departs from the released MSDM.
        notice: A sentence that every page opens with.
        generator: Generator family and size, or what it adapts.
        base: Large model's checkpoints, each with its revision; "" for MSDM.
        licence: Terms of a large model's base, which bind its adapters; "" for MSDM.
        trainable_parameters: Number of parameters in the trainable state.
        image_size: Side of the square images the generator draws, in pixels.
    """

    name: str
    title: str
    resolved_hash: str
    base_hash: str
    start_hash: str = ""
    reference_hash: str = ""
    departures: list[str] = []
    notice: str = ""
    generator: str
    base: str = ""
    licence: str = ""
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
        rounds_rejected: Rounds whose reply was thrown away.
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
    rounds_rejected: int = Field(default=0, ge=0)
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
        state_hash: SHA-256 of the trainable state after the round.
        epsilon: Site to privacy loss spent by the end of the round.
        replied: Sites whose reply entered the round.
        refused: Site to its refusal, as a sentence.
        rejected: Site to why its reply was thrown away.
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
        near_copies: Public patients of whom a near copy was drawn, by features and by pixels.
        medvqa: The official MedVQA-GI 2025 scores.
        no_fidelity: Why an evaluated round has no fidelity, as a sentence.
    """

    round: int = Field(ge=0)
    released: bool = True
    state_hash: str = ""
    epsilon: dict[str, float] = {}
    replied: list[str] = []
    refused: dict[str, str] = {}
    rejected: dict[str, str] = {}
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
    no_fidelity: str = ""


class Metrics(Part):
    """Everything the report shows.

    Attributes:
        schema_version: Version of this schema.
        study: The study.
        simulated: Whether the sites were simulated on one machine.
        private: Whether every round ran under differential privacy.
        finished: Whether the last round of the study is there.
        rounds_planned: Rounds of the study; 0 where that is not known.
        created: ISO 8601 date, or date and time, of writing.
        code_version: Version of the installed package.
        sites: One entry for each site.
        rounds: One entry for each round, from 0 on, in order.
        audit: What the audit tap shows, one entry for each site that sent one.
        federated_fidelity: DP-CMMD against the sites' own images, where the study asks for it.
        gates: What the sites said after their leakage gate, where the study asks for it.
        cost: The cost ledger: what each phase cost at each place in each round.
        forecast: The same before anything ran, over the whole study.
        cost_settings: Prices, the grid's intensity and the level of KID by which the ledger is read.
        cost_summary: What the ledger comes to; `write_report` fills it.
        forecast_summary: What the forecast comes to at the same prices; `write_report` fills it.
        cost_notes: What a reader of the ledger must know.
        prompts: Evaluation prompts, in the order of the rows of every sample sheet.
        guarantee: Sentences that state the privacy guarantee.
        not_covered: Sentences that state what it does not cover.
        study_json: The resolved study.
        headline: The verdict in one sentence; `write_report` fills it.
        verdict: The verdict in words; `write_report` fills it.
        seconds_total: Wall time from start to end.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    study: StudyFacts
    simulated: bool
    private: bool
    finished: bool = True
    rounds_planned: int = Field(default=0, ge=0)
    created: str
    code_version: str
    sites: list[SiteFacts]
    rounds: list[RoundFacts]
    audit: list[SiteAudit] = []
    federated_fidelity: FederatedFidelity | None = None
    gates: list[SiteGate] = []
    cost: list[CostEntry] = []
    forecast: list[CostEntry] = []
    cost_settings: CostSettings = CostSettings()
    cost_summary: CostSummary | None = None
    forecast_summary: CostSummary | None = None
    cost_notes: list[str] = []
    prompts: list[str] = []
    guarantee: list[str] = []
    not_covered: list[str] = []
    study_json: dict[str, Any] = {}
    headline: str = ""
    verdict: list[str] = []
    seconds_total: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _sites_keep_what_they_measured(self) -> Metrics:
        """PRIVACY.md, rule 12: a real site's figures follow from public quantities."""
        if not self.simulated:
            for row in (*self.cost, *self.forecast):
                told = [
                    name for name, found in row.figures.items() if found.source in ("measured", "sampled")
                ]
                if row.where != SERVER and told:
                    raise ValueError(f"{row.where}: {told[0]} was measured at a site, which may not leave it")
        return self


def evaluated_rounds(metrics: Metrics) -> list[RoundFacts]:
    """Rounds whose images were judged for fidelity, in order."""
    return [r for r in metrics.rounds if r.fidelity is not None]


def first_and_last(metrics: Metrics) -> tuple[RoundFacts, RoundFacts] | None:
    """First and last judged round, or None where nothing was judged; both may be the same round."""
    judged = evaluated_rounds(metrics)
    return (judged[0], judged[-1]) if judged else None


def why_no_fidelity(metrics: Metrics) -> str:
    """Why images were drawn and no round has a fidelity, as a sentence; "" where that is not so."""
    drawn = [r for r in metrics.rounds if r.evaluated]
    if not drawn or evaluated_rounds(metrics):
        return ""
    return drawn[-1].no_fidelity or "Fidelity was not measured."


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


def bytes_moved(metrics: Metrics) -> tuple[int, int]:
    """Bytes sent down to and up from all sites over all rounds."""
    return sum(r.bytes_down for r in metrics.rounds), sum(r.bytes_up for r in metrics.rounds)
