"""Everything a report prints, gathered from a run's folder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.common.cost import read_costs
from polyclinic.common.privacy.tap import COINS, SUM
from polyclinic.common.study import Resolved
from polyclinic.server.alarms import claim_of
from polyclinic.server.app import load_resolved
from polyclinic.server.checkpoints import (
    RoundRecord,
    load_checkpoint,
    load_record,
    load_taps,
    rounds_done,
)
from polyclinic.server.evaluation.audit import SiteAudit, audit_site
from polyclinic.server.evaluation.judge import read_judgement, sheet_path
from polyclinic.server.report.metrics import (
    UNIT_OF,
    CostRow,
    Metrics,
    Phase,
    Quantity,
    RoundFacts,
    SampleSheet,
    SiteFacts,
    Source,
    StudyFacts,
)

NOT_COVERED = [
    "A patient who is in two hospitals: the epsilons add up.",
    "When a site replies, and whether it takes part at all.",
    "Manual cleaning of the data before the snapshot, and a person's veto.",
    "Tuning by repeated runs on real data outside one ledger.",
    "The patients of the public reference: they have no guarantee.",
]


def guarantee(resolved: Resolved) -> list[str]:
    """State the guarantee in full: unit, adjacency, accountant, sampler."""
    study = resolved.study
    privacy = study.privacy
    if not privacy.enabled:
        return ["None. This run trained without differential privacy."]
    unit = "patient" if study.data.unit == "patient" else "image (the data has no patient ids)"
    return [
        f"({privacy.epsilon:g}, {privacy.delta:g})-differential privacy for each site on its own, for adding "
        f"or removing one {unit} of that site's snapshot, against everyone who sees the generator.",
        f"Mechanism: Poisson sampling of every {study.data.unit} with public rate q = "
        f"{privacy.sampling_rate:g}; each one's gradient over {privacy.views} views clipped to C; Gaussian "
        "noise of sigma x C; divided by a public constant.",
        f"Noise comes from {privacy.noise_words}.",
        "Accountant: Opacus PRV (upper end), checked against dp-accounting's PLD and Opacus RDP.",
        "It rests on the site's own noise alone: not on the server, not on other sites, not on their number.",
    ]


def summarise(
    run_dir: Path, *, simulated: bool, extra_cost: Iterable[CostRow] = (), forecast: Iterable[CostRow] = ()
) -> Metrics:
    """Gather a run.

    Args:
        run_dir: The run.
        simulated: Its sites were simulated on one machine.
        extra_cost: Rows the server does not know; only a simulation may show sites' measured cost.
        forecast: What `plan` said.
    """
    resolved = load_resolved(run_dir)
    study = resolved.study
    numbers = rounds_done(run_dir)
    records = [load_record(run_dir, number) for number in numbers]
    state = load_checkpoint(run_dir, numbers[-1]).state
    return Metrics(
        study=StudyFacts(
            name=study.name,
            title=study.title or study.name,
            resolved_hash=resolved.hash,
            base_hash=resolved.base_hash,
            generator=study.generator.size,
            trainable_parameters=sum(tensor.numel() for tensor in state.values()),
            image_size=study.data.image_size,
        ),
        simulated=simulated,
        private=study.privacy.enabled,
        created=datetime.now(UTC).isoformat(timespec="minutes"),
        code_version=resolved.code_version,
        sites=_sites(resolved, records),
        rounds=[_round(run_dir, resolved, record) for record in records],
        audit=audits(run_dir, resolved, records),
        cost=[*server_cost(run_dir, records), *extra_cost],
        forecast=list(forecast),
        prompts=[prompt.text for prompt in study.evaluation.prompts],
        guarantee=guarantee(resolved),
        not_covered=NOT_COVERED if study.privacy.enabled else [],
        study_json=resolved.model_dump(mode="json"),
        seconds_total=sum(record.seconds for record in records)
        + sum(float(row["wall_s"]) for row in read_costs(run_dir / "cost.jsonl")),
    )


def cost_rows(phase: Phase, where: str, lines: list[dict[str, Any]]) -> list[CostRow]:
    """Turn measured cost lines of one phase and place into rows."""
    if not lines:
        return []
    source_of_energy: Source = (
        "measured" if "estimated" not in str(lines[-1]["energy_source"]) else "estimated"
    )
    rows: list[tuple[Quantity, float, Source]] = [
        ("wall time", sum(line["wall_s"] for line in lines), "measured"),
        ("CPU time", sum(line["cpu_s"] for line in lines), "measured"),
        ("peak memory", max(line["peak_bytes"] for line in lines), "measured"),
        ("energy", sum(line["energy_j"] for line in lines), source_of_energy),
    ]
    if any(line.get("gpu_s") is not None for line in lines):
        rows.append(("GPU time", sum(line["gpu_s"] or 0.0 for line in lines), "measured"))
    if any("flops" in line for line in lines):
        rows.append(("FLOPs", sum(line.get("flops", 0.0) for line in lines), "counted"))
    return [
        CostRow(
            phase=phase, where=where, quantity=quantity, value=value, unit=UNIT_OF[quantity], source=source
        )
        for quantity, value, source in rows
    ]


def server_cost(run_dir: Path, records: list[RoundRecord]) -> list[CostRow]:
    """What the server measured of itself, and the bytes it counted."""
    lines = read_costs(run_dir / "cost.jsonl")
    phases: tuple[Phase, ...] = ("pretraining", "preparation", "evaluation")
    rows = [
        row
        for phase in phases
        for row in cost_rows(phase, "server", [x for x in lines if x["phase"] == phase])
    ]
    for quantity, value in (
        ("bytes down", sum(record.bytes_down for record in records)),
        ("bytes up", sum(record.bytes_up for record in records)),
    ):
        rows.append(
            CostRow(
                phase="training",
                where="all sites",
                quantity=quantity,
                value=value,
                unit="B",
                source="counted",
            )  # type: ignore[arg-type]
        )
    return rows


def audits(run_dir: Path, resolved: Resolved, records: list[RoundRecord]) -> list[SiteAudit]:
    """Audit every site by what its tap sent over the rounds."""
    taps = {record.round: load_taps(run_dir, record.round) for record in records}
    heard = {number: len(sent) for number, sent in taps.items()}
    found = []
    for site in sorted({site for sent in taps.values() for site in sent}):
        own = {number: sent[site] for number, sent in taps.items() if site in sent}
        last = next(record for record in reversed(records) if site in record.replied)
        found.append(
            audit_site(
                site,
                {number: tap[SUM] for number, tap in own.items()},
                own[max(own)].get(COINS),
                claim_of(resolved, last.replied[site]),
                rounds=resolved.study.training.rounds,
                heard=heard,
            )
        )
    return found


def _sites(resolved: Resolved, records: list[RoundRecord]) -> list[SiteFacts]:
    study = resolved.study
    names = sorted(
        {site for record in records for site in (*record.replied, *record.refusals, *record.absent)}
    )
    sites = []
    for name in names:
        facts = [record.replied[name] for record in records if name in record.replied]
        last = facts[-1] if facts else {}
        rate = study.privacy.sampling_rate
        sites.append(
            SiteFacts(
                name=name,
                declared_patients=round(float(last.get("divisor", 0.0)) / rate),
                epsilon=float(last["epsilon"]) if last else None,
                delta=study.privacy.delta if study.privacy.enabled else None,
                epsilon_cap=study.privacy.epsilon if study.privacy.enabled else None,
                sigma=float(last["sigma"]) if last else None,
                rounds_answered=len(facts),
                rounds_absent=sum(name in record.absent for record in records),
                refusals=[f"round {r.round}: {r.refusals[name]}" for r in records if name in r.refusals],
            )
        )
    return sites


def _round(run_dir: Path, resolved: Resolved, record: RoundRecord) -> RoundFacts:
    judgement = read_judgement(run_dir, record.round)
    size = resolved.study.data.image_size
    sheet = None
    if judgement is not None:
        sheet = SampleSheet(
            path=str(sheet_path(run_dir, record.round).relative_to(run_dir)),
            rows=len(resolved.study.evaluation.prompts),
            columns=judgement.columns,
            image_size=size,
        )
    epsilon = {site: float(facts["epsilon"]) for site, facts in record.replied.items()}
    return RoundFacts(
        round=record.round,
        released=record.released,
        epsilon={site: value for site, value in epsilon.items() if math.isfinite(value)},
        replied=list(record.replied),
        refused=record.refusals,
        absent=record.absent,
        bytes_down=record.bytes_down,
        bytes_up=record.bytes_up,
        seconds=record.seconds,
        evaluated=judgement is not None,
        fidelity=judgement.fidelity if judgement else None,
        faithfulness=judgement.faithfulness if judgement else None,
        samples=sheet,
        second=judgement.second if judgement else [],
        cosine=judgement.cosine if judgement else None,
        utility=judgement.utility if judgement else None,
        near_copies=judgement.near_copies if judgement else [],
        medvqa=judgement.medvqa if judgement else None,
    )
