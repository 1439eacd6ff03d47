"""What the templates show, prepared from the metrics: cards, charts, tables of finished text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.probe import ConceptFaithfulness, Faithfulness
from polyclinic.server.report import plots, wording
from polyclinic.server.report.costs import NAMES, Quantity, total
from polyclinic.server.report.metrics import (
    Metrics,
    RoundFacts,
    bytes_moved,
    evaluated_rounds,
    first_and_last,
    worst_epsilon,
)
from polyclinic.server.report.pictures import cut, spread
from polyclinic.server.report.wording import number, percent

ROUNDS_SHOWN, ROUNDS_SHOWN_NARROW, PROMPTS_SHOWN = 8, 4, 12


@dataclass(frozen=True)
class Scale:
    """A small bar: an interval, a value to compare with and the floor, in percent of the bar's length.

    `ends` names places under the bar.
    """

    low: float
    high: float
    value: float
    start: float | None
    floor: float | None
    ends: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Card:
    """One of the numbers that matter."""

    title: str
    figure: str
    lines: list[str]
    unit: str = ""
    alarm: bool = False
    scale: Scale | None = None


@dataclass(frozen=True)
class SampleColumn:
    """One round of the sample table; `narrow` columns are shown on a narrow screen too."""

    round: int
    label: str
    narrow: bool


@dataclass(frozen=True)
class SampleRow:
    """One prompt with its pictures: data URIs, [round][draw]."""

    prompt: str
    cells: list[list[str]]


@dataclass(frozen=True)
class SampleTable:
    """The same prompts and seeds at several rounds."""

    columns: list[SampleColumn]
    rows: list[SampleRow]
    pixelated: bool
    image_size: int

    @property
    def shown(self) -> list[SampleRow]:
        """Rows that are open from the beginning."""
        return self.rows[:PROMPTS_SHOWN]

    @property
    def folded(self) -> list[SampleRow]:
        """Rows behind a fold."""
        return self.rows[PROMPTS_SHOWN:]


@dataclass(frozen=True)
class Panel:
    """One concept's chart with its words."""

    title: str
    line: str
    chart: plots.Chart | None


@dataclass(frozen=True)
class Event:
    """A round in which something went missing."""

    round: int
    released: bool
    lines: list[str] = field(default_factory=list)


def round_name(facts: RoundFacts, last: int) -> str:
    """Name a round as a column's head."""
    if facts.round == 0:
        return "start"
    return f"round {facts.round}" + (" (last)" if facts.round == last else "")


def scale_of(kid: Estimate, start: Estimate | None) -> Scale | None:
    """Place a KID, its start and its floor on a bar from 0 to the largest of them."""
    if kid.low is None or kid.high is None:
        return None
    top = 1.06 * max(kid.high, start.value if start else 0.0, kid.floor or 0.0)
    if top <= 0:
        return None

    def at(value: float) -> float:
        return round(min(100.0, max(0.0, 100 * value / top)), 2)

    began = at(start.value) if start else None
    # A name under the bar needs room to its left.
    ends = (("start", began),) if began is not None and began > 35 else ()
    floor = at(kid.floor) if kid.floor is not None else None
    return Scale(at(kid.low), at(kid.high), at(kid.value), began, floor, ends)


def floor_words(estimate: Estimate) -> str:
    """Put an estimate beside its floor."""
    if estimate.floor is None:
        return "no floor measured"
    text = f"floor {number(estimate.floor)}"
    if around := wording.floor_interval(estimate):
        text += f" ({around})"
    if estimate.ratio is not None and math.isfinite(estimate.ratio):
        text += f", ratio {number(estimate.ratio, 2)}"
    return text


def sample_size(estimate: Estimate) -> str:
    """State how many images and groups an estimate stands on."""
    return f"{estimate.n:,} images, {estimate.groups:,} patients"


def fidelity_card(metrics: Metrics) -> Card:
    """The final KID, its interval, its floor and where it began."""
    ends = first_and_last(metrics)
    if ends is None or ends[1].fidelity is None or ends[0].fidelity is None:
        return Card("Fidelity (KID)", wording.DASH, ["not measured"])
    kid = ends[1].fidelity.kid
    start = ends[0].fidelity.kid if ends[0].round != ends[1].round else None
    interval = wording.interval(kid)
    # A narrow screen shows the first three: no number goes without its interval, floor and sample size.
    lines = [f"95 % interval {interval}" if interval else "no interval", floor_words(kid), sample_size(kid)]
    if start is not None:
        lines.append(
            f"{number(start.value)} at {'the start' if ends[0].round == 0 else f'round {ends[0].round}'}"
        )
    return Card("Fidelity (KID, lower is better)", number(kid.value), lines, scale=scale_of(kid, start))


def epsilon_card(metrics: Metrics) -> Card:
    """The largest epsilon over the sites as claimed and as audited, or the absence of any bound."""
    epsilon = worst_epsilon(metrics)
    title = "Privacy loss of a patient (epsilon)"
    if epsilon is None or math.isinf(epsilon):
        return Card(title, "∞" if epsilon else wording.DASH, ["no bound on what it reveals"], alarm=True)
    deltas = [s.delta for s in metrics.sites if s.delta is not None]
    at = f" at delta {wording.bound(max(deltas))}" if deltas else ""
    lines = [f"claimed{at}, {wording.count(len(metrics.sites), 'site')}"]
    alarmed = [a.site for a in metrics.audit if a.alarms]
    bounds = [a.bound.epsilon for a in metrics.audit if a.bound is not None]
    reach = audit_reach(metrics)
    if alarmed:
        lines.append(f"AUDIT ALARM at {wording.listed(alarmed)}; {reach}")
    elif metrics.audit:
        lines.append(f"{reach}: the noise is as claimed")
    else:
        lines.append("not audited")
    if bounds:
        lines.append(f"audited: refuted below {number(max(bounds))}")
    caps = [s.epsilon_cap for s in metrics.sites if s.epsilon_cap is not None]
    if caps:
        lines.append(f"sites allow {min(caps):g}" + (f" to {max(caps):g}" if len(set(caps)) > 1 else ""))
    return Card(
        title, wording.bound(epsilon), lines, alarm=bool(alarmed), scale=epsilon_scale(epsilon, bounds, caps)
    )


def audit_reach(metrics: Metrics) -> str:
    """Say at how many sites the tap was read, and whether their coins are still to be revealed."""
    sites = len({s.name for s in metrics.sites} | {a.site for a in metrics.audit})
    so_far = "" if all(a.revealed for a in metrics.audit) else " so far"
    return f"audited at {len(metrics.audit)} of {wording.count(sites, 'site')}{so_far}"


def epsilon_scale(epsilon: float, bounds: list[float], caps: list[float]) -> Scale | None:
    """Place the audited lower bound and the claim on a bar that ends beyond the largest cap."""
    if not bounds or not caps:
        return None
    top = 1.06 * max(epsilon, *caps)
    at = [round(100 * value / top, 2) for value in (max(bounds), epsilon, max(caps))]
    return Scale(
        min(at[0], at[1]), at[1], at[1], at[2], None, ends=(("refuted below", at[0]), ("cap", at[2]))
    )


def cost_card(metrics: Metrics) -> Card:
    """Computing first, then time, traffic, energy, CO2 and money."""
    down, up = bytes_moved(metrics)
    summary = metrics.cost_summary
    lines = [f"{wording.seconds(metrics.seconds_total)} from start to end"]
    lines += [f"{wording.scaled(down, 'B')} down, {wording.scaled(up, 'B')} up"] if down or up else []
    for t in summary.totals if summary else []:
        if t.quantity == "energy_j" and t.value:
            grams = summary.co2_g if summary else None
            co2 = f", {wording.scaled(grams, 'g')} CO2" if grams is not None else ""
            lines.append(f"{wording.energy(t.value)}{co2} ({t.source})")
    if summary and summary.money is not None:
        lines.append(f"{number(summary.money)} {summary.currency}")
    options: tuple[Quantity, ...] = ("gpu_s", "cpu_s")
    for name in options:
        value = total(metrics.cost, name)
        if value:
            if not metrics.simulated:
                lines.append("the coordinator's computing; sites keep theirs")
            figure, _, unit = wording.seconds(value).rpartition(wording.GAP)
            return Card(f"Cost ({NAMES[name][0]})", figure, lines, unit=unit)
    figure, _, unit = wording.seconds(metrics.seconds_total).rpartition(wording.GAP)
    return Card("Cost (wall time)", figure, lines[1:] or ["nothing else was measured"], unit=unit)


def sample_table(run_dir: Path, metrics: Metrics, rounds_shown: int = ROUNDS_SHOWN) -> SampleTable | None:
    """Cut the pictures of some rounds, the first and last among them, for every prompt."""
    drawn = {r.round: r for r in metrics.rounds if r.samples is not None}
    if not drawn:
        return None
    chosen = spread(sorted(drawn), rounds_shown)
    narrow = set(spread(chosen, ROUNDS_SHOWN_NARROW))
    sheets = [sheet for n in chosen if (sheet := drawn[n].samples) is not None]
    draws = 2 if len(chosen) > 1 else 6
    pictures = [cut(run_dir, sheet, draws) for sheet in sheets]
    rows = []
    for i in range(max(len(p) for p in pictures)):
        prompt = metrics.prompts[i] if i < len(metrics.prompts) else f"prompt {i + 1}"
        rows.append(SampleRow(prompt, [p[i] if i < len(p) else [] for p in pictures]))
    size = sheets[-1].image_size
    columns = [SampleColumn(n, round_name(drawn[n], chosen[-1]), n in narrow) for n in chosen]
    return SampleTable(columns, rows, size < 128, size)


def distance_series(metrics: Metrics, name: str) -> plots.Series:
    """A distance over the judged rounds with intervals and floors."""
    judged = evaluated_rounds(metrics)
    found: list[Estimate] = [getattr(r.fidelity, name) for r in judged]
    return plots.Series(
        name,
        [r.round for r in judged],
        [e.value for e in found],
        [e.low for e in found],
        [e.high for e in found],
        [e.floor for e in found],
    )


def fidelity_charts(metrics: Metrics) -> list[plots.Chart]:
    """KID and Frechet distance over rounds; a single judged round needs no chart."""
    if len(evaluated_rounds(metrics)) < 2:
        return []
    pairs = (("KID", "kid"), ("Frechet distance", "frechet"))
    return [plots.distance_over_rounds(words, distance_series(metrics, name)) for words, name in pairs]


def concept_panel(
    title: str, found: list[tuple[int, Estimate]], row: ConceptFaithfulness, salt: str
) -> Panel:
    """One concept's words, and its chart where there is more than one round."""
    last = found[-1][1]
    interval = wording.percent_interval(last)
    line = percent(last.value) + (f" ({interval})" if interval else "")
    line += f", chance {percent(row.chance)}" + (f", real {percent(row.real.value)}" if row.real else "")
    if len(found) < 2:
        return Panel(title, line, None)
    series = plots.Series(
        title,
        [n for n, _ in found],
        [e.value for _, e in found],
        [e.low for _, e in found],
        [e.high for _, e in found],
    )
    real = row.real.value if row.real else None
    return Panel(title, line, plots.share_over_rounds(series, row.chance, real, salt))


def faithfulness_panels(metrics: Metrics) -> list[Panel]:
    """The overall panel first, then one for each concept of the last judged round."""
    judged: list[tuple[int, Faithfulness]] = [
        (r.round, r.faithfulness) for r in metrics.rounds if r.faithfulness is not None
    ]
    if not judged:
        return []
    last = judged[-1][1]
    whole = [(n, f.overall.accuracy) for n, f in judged]
    panels = [concept_panel("all concepts", whole, last.overall, "overall")]
    for i, row in enumerate(last.rows):
        found = [(n, r.accuracy) for n, f in judged for r in f.rows if r.concept == row.concept]
        panels.append(concept_panel(row.concept, found, row, f"concept {i}"))
    return panels


def epsilon_chart(metrics: Metrics) -> plots.Chart | None:
    """Epsilon of each site over rounds with its cap; None where nothing finite was spent."""
    lines = []
    for site in metrics.sites:
        spent = [(r.round, e) for r in metrics.rounds if plots.finite(e := r.epsilon.get(site.name))]
        if spent:
            # Before its first round a site has spent nothing on this study.
            spent = spent if spent[0][0] == 0 else [(0, 0.0), *spent]
            lines.append(
                plots.Series(site.name, [n for n, _ in spent], [e for _, e in spent if e is not None])
            )
    if not lines or not metrics.private:
        return None
    drawn = {line.label for line in lines}
    caps = {s.name: s.epsilon_cap for s in metrics.sites if s.name in drawn and s.epsilon_cap is not None}
    return plots.epsilon_over_rounds(lines, caps)


def events(metrics: Metrics) -> list[Event]:
    """Rounds with refusals, absences or no release."""
    found = []
    for r in metrics.rounds:
        lines = [f"{site} refused: {why.removeprefix('refused ')}" for site, why in r.refused.items()]
        lines += [f"reply of {site} rejected: {why}" for site, why in r.rejected.items()]
        lines += [f"no reply in time from {wording.listed(r.absent, 20)}"] if r.absent else []
        if lines or (r.round > 0 and not r.released):
            found.append(Event(r.round, r.released, lines))
    return found
