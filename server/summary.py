"""Everything a report prints, gathered from a run's folder."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path

from polyclinic.common.cost_settings import CostSettings
from polyclinic.common.privacy.tap import COINS, SUM
from polyclinic.common.study import Resolved
from polyclinic.server.alarms import claim_of
from polyclinic.server.app import load_resolved
from polyclinic.server.checkpoints import (
    RoundRecord,
    load_record,
    load_taps,
    rounds_done,
)
from polyclinic.server.collect import FIDELITY, read_gates, read_sums, told
from polyclinic.server.cost_record import cost_lines, gather
from polyclinic.server.evaluation.audit import SiteAudit, audit_site
from polyclinic.server.evaluation.federated import measure_federated
from polyclinic.server.evaluation.judge import final_path, read_judgement, sheet_path
from polyclinic.server.plan import Plan, plan
from polyclinic.server.plan_cost import NOTES, kept_speed
from polyclinic.server.report.cost_summary import JUDGING
from polyclinic.server.report.metrics import (
    Metrics,
    RoundFacts,
    SampleSheet,
    SiteFacts,
    StudyFacts,
)
from polyclinic.server.run_folder import SITES, is_simulated

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
    extra = bool(study.releases.epsilons)
    unit = "patient" if study.data.unit == "patient" else "image (the data has no patient ids)"
    return [
        f"({privacy.epsilon:g}, {privacy.delta:g})-differential privacy for each site on its own, for adding "
        f"or removing one {unit} of that site's snapshot, against everyone who sees the generator"
        + (" and what sites said once beside their rounds: both are in that epsilon." if extra else "."),
        f"Mechanism: Poisson sampling of every {study.data.unit} with public rate q = "
        f"{privacy.sampling_rate:g}; each one's gradient over {privacy.views} views clipped to C; Gaussian "
        "noise of sigma x C; divided by a public constant.",
        f"Noise comes from {privacy.noise_words}.",
        "Accountant: Opacus PRV (upper end), checked against dp-accounting's PLD and Opacus RDP.",
        "It rests on the site's own noise alone: not on the server, not on other sites, not on their number.",
    ]


def summarise(run_dir: Path, planned: Plan | None = None, settings: CostSettings | None = None) -> Metrics:
    """Gather a run, finished or not, from its folder alone.

    Args:
        run_dir: The run.
        planned: What `forecast_of` gave before; worked out where it is left out.
        settings: Prices and the grid's intensity, where the study's own are not to be used.
    """
    resolved = load_resolved(run_dir)
    study = resolved.study
    numbers = rounds_done(run_dir)
    records = [load_record(run_dir, number) for number in numbers]
    planned = planned or forecast_of(run_dir)
    sites = _sites(run_dir, resolved, records)
    cost = gather(run_dir, resolved, records, planned.evaluation_flops)
    judging = sum(row.figures["wall_s"].value for row in cost if row.phase in ("pretrain", *JUDGING))
    rounds = [_round(run_dir, resolved, record) for record in records]
    clock = judging + sum(record.seconds for record in records)
    settings = settings or study.cost
    simulated = is_simulated(run_dir)
    return Metrics(
        study=StudyFacts(
            name=study.name,
            title=study.title or study.name,
            resolved_hash=resolved.hash,
            base_hash=resolved.base_hash,
            start_hash=resolved.start_hash,
            reference_hash=resolved.reference_hash,
            departures=list(study.departures),
            notice=study.notice,
            generator=study.generator.words,
            base=study.generator.pinned,
            licence=planned.licence,
            trainable_parameters=planned.trainable_parameters,
            image_size=study.data.image_size,
        ),
        simulated=simulated,
        private=study.privacy.enabled,
        finished=numbers[-1] >= study.training.rounds,
        rounds_planned=study.training.rounds,
        created=datetime.now(UTC).isoformat(timespec="minutes"),
        code_version=resolved.code_version,
        sites=sites,
        rounds=rounds,
        audit=audits(run_dir, resolved, records),
        federated_fidelity=measure_federated(resolved, read_sums(run_dir, FIDELITY), final_path(run_dir)),
        gates=read_gates(resolved, run_dir, _names(records)),
        cost=cost,
        forecast=planned.forecast,
        cost_settings=settings,
        cost_notes=_cost_notes(run_dir, simulated=simulated),
        prompts=[prompt.text for prompt in study.evaluation.prompts],
        guarantee=guarantee(resolved),
        not_covered=NOT_COVERED if study.privacy.enabled else [],
        study_json=resolved.model_dump(mode="json"),
        seconds_total=clock,
    )


def forecast_of(run_dir: Path) -> Plan:
    """Work out what was planned: with this machine's speed where sites were simulated on it.

    A real site's declared patients are known by the divisor of its replies; before the first of them, only
    the bytes of a site are forecast.
    """
    resolved = load_resolved(run_dir)
    if is_simulated(run_dir):
        return plan(resolved.study, speed=kept_speed(run_dir))
    named = run_dir / "sites.json"
    names = json.loads(named.read_text(encoding="utf-8")) if named.exists() else []
    records = [load_record(run_dir, number) for number in rounds_done(run_dir)]
    known = {site.name: site.declared_patients or None for site in _sites(run_dir, resolved, records)}
    return plan(resolved.study, declared={**dict.fromkeys(names), **known})


def _cost_notes(run_dir: Path, *, simulated: bool) -> list[str]:
    """What a reader of the cost ledger must know."""
    notes = ["FLOPs of sampling are those of the denoising network alone.", *NOTES]
    notes.append("A total and its forecast add up what each knows; the table by phase shows what that is.")
    paths = [run_dir / "cost.jsonl"]
    if simulated:
        notes.append(
            "Sites were simulated in turn on one machine: a peak of memory holds whatever else the process "
            "held, and a site's waiting is worked out as if each had a machine of its own."
        )
        paths += [home / "cost.jsonl" for home in sorted((run_dir / SITES).iterdir())]
    else:
        notes.append(
            "Sites' figures are nominal: operations of the expected batch, from public quantities. What "
            "they measured stays in their own reports."
        )
    sources = {str(line["energy_source"]) for path in paths for line in cost_lines(path)}
    notes += [f"Energy: {source}." for source in sorted(sources)]
    notes.append("Attempts at a round that were killed left no figures.")
    return notes


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


def _names(records: list[RoundRecord]) -> list[str]:
    """Sites that took part, or should have."""
    return sorted(
        {site for record in records for site in (*record.replied, *record.refusals, *record.absent)}
    )


def _sites(run_dir: Path, resolved: Resolved, records: list[RoundRecord]) -> list[SiteFacts]:
    study = resolved.study
    spent, refused = told(run_dir)
    sites = []
    for name in _names(records):
        facts = [record.replied[name] for record in records if name in record.replied]
        last = facts[-1] if facts else {}
        rate = study.privacy.sampling_rate
        sites.append(
            SiteFacts(
                name=name,
                declared_patients=round(float(last.get("divisor", 0.0)) / rate),
                # What was released after the last round has been charged, too.
                epsilon=max(float(last["epsilon"]), spent.get(name, 0.0)) if last else spent.get(name),
                delta=study.privacy.delta if study.privacy.enabled else None,
                epsilon_cap=study.privacy.epsilon if study.privacy.enabled else None,
                sigma=float(last["sigma"]) if last else None,
                rounds_answered=len(facts),
                rounds_absent=sum(name in record.absent for record in records),
                rounds_rejected=sum(name in record.rejected for record in records),
                refusals=[
                    *(f"round {r.round}: {r.refusals[name]}" for r in records if name in r.refusals),
                    *refused.get(name, []),
                ],
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
        state_hash=record.state_hash,
        epsilon={site: value for site, value in epsilon.items() if math.isfinite(value)},
        replied=list(record.replied),
        refused=record.refused,
        rejected=record.rejected,
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
        no_fidelity=judgement.no_fidelity if judgement else "",
    )
