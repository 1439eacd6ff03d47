"""The cost ledger as the report shows it: by phase and place, by round, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from polyclinic.server.report import wording
from polyclinic.server.report.cost_summary import computing
from polyclinic.server.report.costs import (
    NAMES,
    PEAKS,
    SERVER,
    CostEntry,
    CostSummary,
    Figure,
    Phase,
    Quantity,
    Target,
    merged,
    weakest,
)
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.wording import DASH, count, listed, number, quantity

# With more sites than this, the table shows all of them in one row a phase; metrics.json has each.
SITES_SHOWN = 8
PHASES: tuple[Phase, ...] = ("pretrain", "cache", "train", "wait", "combine", "sample", "evaluate")


@dataclass(frozen=True)
class Cell:
    """A figure of the ledger with its source, and what was forecast."""

    actual: str = DASH
    source: str = ""
    forecast: str = ""
    compared: str = ""


@dataclass(frozen=True)
class Row:
    """A phase at a place."""

    phase: str
    where: str
    cells: list[Cell]
    first: bool = False


@dataclass(frozen=True)
class CostTable:
    """The ledger over the whole run; columns are quantities."""

    columns: list[str]
    rows: list[Row]
    has_forecast: bool


@dataclass(frozen=True)
class RoundRow:
    """What one round took."""

    round: int
    cells: list[str]


def ledger_table(metrics: Metrics) -> CostTable | None:
    """Lay out the ledger by phase and place, the forecast beside what it came to."""
    sites = sorted({e.where for e in (*metrics.cost, *metrics.forecast)} - {SERVER})
    together = len(sites) > SITES_SHOWN
    actual, forecast = (_by_place(rows, together, len(sites)) for rows in (metrics.cost, metrics.forecast))
    named = {name for found in (*actual.values(), *forecast.values()) for name in found}
    if not named:
        return None
    columns = [name for name in NAMES if name in named]
    rows: list[Row] = []
    for phase in PHASES:
        places = sorted(
            {place for p, place in (*actual, *forecast) if p == phase}, key=lambda w: (w == SERVER, w)
        )
        for place in places:
            found, expected = actual.get((phase, place), {}), forecast.get((phase, place), {})
            cells = [_cell(name, found.get(name), expected.get(name)) for name in columns]
            rows.append(Row(phase, place, cells, first=place == places[0]))
    return CostTable([NAMES[name][0] for name in columns], rows, bool(metrics.forecast))


def _by_place(
    entries: Iterable[CostEntry], together: bool, sites: int
) -> dict[tuple[str, str], dict[Quantity, Figure]]:
    grouped: dict[tuple[str, str], dict[str, list[CostEntry]]] = {}
    for e in entries:
        place = f"all {sites} sites" if together and e.where != SERVER else e.where
        grouped.setdefault((e.phase, place), {}).setdefault(e.where, []).append(e)
    found = {}
    for key, parts in grouped.items():
        each = [merged(part) for part in parts.values()]
        found[key] = each[0] if len(each) == 1 else _over_sites(each)
    return found


def _over_sites(each: list[dict[Quantity, Figure]]) -> dict[Quantity, Figure]:
    """Put sites together: sums, but the largest wall time and peak, which sites have at the same time."""
    found: dict[Quantity, Figure] = {}
    for name in NAMES:
        parts = [figures[name] for figures in each if name in figures]
        if parts:
            values = [part.value for part in parts]
            value = max(values) if name in (*PEAKS, "wall_s") else sum(values)
            found[name] = Figure(value=value, source=weakest(part.source for part in parts))
    return found


def _cell(name: Quantity, actual: Figure | None, expected: Figure | None) -> Cell:
    unit = NAMES[name][1]
    forecast = quantity(expected.value, unit) if expected else ""
    compared: str = expected.source if expected else ""
    if actual is None:
        return Cell(forecast=forecast, compared=compared)
    if expected and expected.value > 0:
        compared = f"{number(actual.value / expected.value, 2)} x, {compared}"
    return Cell(quantity(actual.value, unit), actual.source, forecast, compared)


def round_rows(metrics: Metrics) -> list[RoundRow]:
    """What each round took, sites together."""
    rows = []
    for r in metrics.rounds:
        own = [e for e in metrics.cost if e.round == r.round]
        if not own:
            continue
        trained = [merged([e for e in own if e.phase == "train" and e.where == site]) for site in r.replied]
        together = _over_sites(trained)
        judging = merged([e for e in own if e.phase in ("sample", "evaluate")])
        combine = merged([e for e in own if e.phase == "combine"])
        compute = together.get("gpu_s") or together.get("cpu_s")
        rows.append(
            RoundRow(
                r.round,
                [
                    wording.seconds(r.seconds) if r.round else DASH,
                    _said("wall_s", together.get("wall_s")),
                    _said("cpu_s", compute),
                    _said("flops", together.get("flops")),
                    _said("energy_j", together.get("energy_j")),
                    _said("wall_s", combine.get("wall_s")),
                    _said("wall_s", judging.get("wall_s")),
                    wording.scaled(r.bytes_down, "B") if r.round else DASH,
                    wording.scaled(r.bytes_up, "B") if r.round else DASH,
                ],
            )
        )
    return rows


def _said(name: Quantity, found: Figure | None) -> str:
    return DASH if found is None else quantity(found.value, NAMES[name][1])


def site_work(metrics: Metrics) -> dict[str, str]:
    """Site to what its training took: GPU or CPU time in a simulation, else nominal operations."""
    name = computing(metrics.cost)
    found = {}
    for site in metrics.sites:
        mine = merged(e for e in metrics.cost if e.phase == "train" and e.where == site.name)
        found[site.name] = _said(name, mine.get(name))
    return found


def total_lines(summary: CostSummary, forecast: CostSummary | None = None) -> list[tuple[str, str, str, str]]:
    """Every total as name, figure, how it was obtained, and what was forecast of it, if anything."""
    expected = {} if forecast is None else {name: value for name, value, _ in _figures(forecast)}
    lines = [(name, value, said, expected.pop(name, "")) for name, value, said in _figures(summary)]
    return [
        *lines,
        *((name, DASH, "forecast alone", value) for name, value in expected.items() if value != DASH),
    ]


def _figures(summary: CostSummary) -> list[tuple[str, str, str]]:
    lines: list[tuple[str, str, str]] = [
        (NAMES[t.quantity][0], quantity(t.value, NAMES[t.quantity][1]), t.source) for t in summary.totals
    ]
    energy = next((t for t in summary.totals if t.quantity == "energy_j"), None)
    if summary.co2_g is not None and energy is not None:
        said = f"{energy.source} energy of {summary.co2_covers}; {summary.grid_source}"
        lines.append(("CO2 equivalent", wording.scaled(summary.co2_g, "g"), said))
    elif energy is not None:
        lines.append(("CO2 equivalent", DASH, "unknown: no intensity of the grid was given"))
    if summary.money is not None:
        figure = f"{number(summary.money)} {summary.currency}"
        lines.append(("money", figure, f"configured prices of {listed(summary.money_covers)}"))
    forecast = summary.clock_s is None
    own = "measured" if summary.site_figures == "nominal" else "worked out from measured times"
    if summary.critical_path_s is not None:
        words = wording.seconds(summary.critical_path_s)
        lines.append(("critical path of the rounds", words, "estimated" if forecast else own))
    if summary.judging_s is not None:
        words = wording.seconds(summary.judging_s)
        lines.append(("drawing and judging", words, "estimated" if forecast else "measured"))
    if summary.clock_s is not None:
        lines.append(("from start to end", wording.seconds(summary.clock_s), "measured"))
    return lines


def target_sentence(target: Target | None, floor: float | None = None) -> str:
    """Say what it took to bring KID down to the level.

    Args:
        target: The level and what it took; None where there is none.
        floor: Of the last KID; None where none was measured.
    """
    if target is None:
        return (
            ""
            if floor is None
            else (
                f"No price of a KID: the study names no level, and twice the floor is none, for the floor of "
                f"{number(floor)} cannot be told from zero. `--cost target_kid=X` sets one."
            )
        )
    origin = "set by the study" if target.origin == "study" else target.origin
    level = f"KID of {number(target.kid)} or less ({origin})"
    if target.round is None or target.value is None:
        return f"A {level} was not reached: the lowest of a judged round is {number(target.best)}."
    name, unit = NAMES[target.quantity]
    price = f"{quantity(target.value, unit)} of {name}" if unit == "s" else quantity(target.value, unit)
    if target.before is None or target.value_before is None:
        return f"A {level} was there at the first judged round, {target.round}, after {price}."
    between = f"it was not yet there at round {target.before}, after {quantity(target.value_before, unit)}"
    return f"A {level} took at most {price}, judging apart: first seen at round {target.round}; {between}."


def straggler_sentences(summary: CostSummary, most: int = 5) -> list[str]:
    """Say who was waited for."""
    lines = []
    for s in summary.stragglers[:most]:
        parts = []
        if s.slowest and s.held_s is not None:
            rounds = count(s.slowest, "round")
            parts.append(f"slowest in {rounds}, by {wording.seconds(s.held_s)} beyond the next in all")
        if s.absent:
            parts.append(f"absent from {count(s.absent, 'round')}")
        lines.append(f"{s.site}: {'; '.join(parts)}")
    if len(summary.stragglers) > most:
        lines.append(f"and {len(summary.stragglers) - most} more sites")
    return lines


def waste_sentences(summary: CostSummary) -> list[str]:
    """Say what was done for nothing."""
    lines = []
    for w in summary.waste:
        figures = [wording.scaled(w.flops, "FLOP")] if w.flops is not None else []
        figures += [f"{wording.seconds(w.compute_s)} of computing"] if w.compute_s is not None else []
        figures += [f"{wording.scaled(w.up_bytes, 'B')} received"] if w.up_bytes is not None else []
        lines.append(f"{w.times:,} x {w.what}: {listed(figures) or 'its cost is not known'}")
    return lines
