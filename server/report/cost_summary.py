"""What the cost ledger comes to: totals, CO2, money, critical path, stragglers, waste, price of a KID.

Over sites, seconds of computing and joules add, while wall time is the critical path: of each round, the
slowest site. What took the judging is told apart, for it is the same for every generator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from polyclinic.common.cost_settings import CostSettings
from polyclinic.server.report.costs import (
    ADDITIVE,
    LEARNING,
    SERVER,
    CostEntry,
    CostSummary,
    Phase,
    Quantity,
    Straggler,
    Target,
    Total,
    Waste,
    merged,
    total,
    weakest,
)
from polyclinic.server.report.metrics import RoundFacts

JUDGING: tuple[Phase, ...] = ("sample", "evaluate")
# Where the study names no KID to reach: so many times the floor. Only a floor that is clearly above zero has
# multiples: twice a number that may be zero or less is a level that chance has drawn. Its upper end would be
# worse: the smaller the reference, the easier such a level would be to reach.
TARGET_IN_FLOORS = 2.0
JOULES_A_KWH = 3.6e6


def summarise_cost(
    entries: Sequence[CostEntry],
    rounds: Sequence[RoundFacts],
    settings: CostSettings,
    *,
    simulated: bool,
    clock_s: float,
) -> CostSummary:
    """Add up a cost ledger.

    Args:
        entries: Disjoint rows.
        rounds: What happened in each round.
        settings: Prices, the grid, the level of KID.
        simulated: Whether sites show what they measured.
        clock_s: Seconds from start to end.
    """
    return _added_up(entries, settings).model_copy(
        update={
            "site_figures": "measured" if simulated else "nominal",
            "critical_path_s": critical_path(entries, rounds, simulated=simulated),
            "clock_s": clock_s,
            "stragglers": stragglers(entries, rounds),
            "waste": waste(entries, rounds),
            "target": target(entries, rounds, settings.target_kid),
        }
    )


def summarise_forecast(entries: Sequence[CostEntry], settings: CostSettings) -> CostSummary | None:
    """Add up what was forecast; None where nothing was.

    Its critical path is the training of the slowest site: in every round it is the same one.

    Args:
        entries: Disjoint rows over the whole study.
        settings: Prices and the grid.
    """
    if not entries:
        return None
    walls = [
        e.figures["wall_s"].value
        for e in entries
        if e.phase == "train" and e.where != SERVER and "wall_s" in e.figures
    ]
    return _added_up(entries, settings).model_copy(update={"critical_path_s": max(walls) if walls else None})


def _added_up(entries: Sequence[CostEntry], settings: CostSettings) -> CostSummary:
    """Totals, CO2, money and the time of judging, of a forecast as of what it came to."""
    totals = totals_of(entries)
    by_name = {t.quantity: t.value for t in totals}
    energy = by_name.get("energy_j")
    intensity = settings.grid_gco2_per_kwh
    known = energy is not None and intensity is not None
    money, covers = money_of(by_name, settings)
    sites_energy = any(e.where != SERVER and "energy_j" in e.figures for e in entries)
    return CostSummary(
        site_figures="nominal",
        totals=totals,
        co2_g=energy / JOULES_A_KWH * intensity if energy is not None and intensity is not None else None,
        co2_covers=("sites and coordinator" if sites_energy else "coordinator alone") if known else "",
        grid_source=settings.grid_source if known else "",
        money=money,
        money_covers=covers,
        currency=settings.currency if money is not None else "",
        judging_s=_wall(entries, JUDGING),
    )


def totals_of(entries: Sequence[CostEntry]) -> list[Total]:
    """Every quantity that adds up, with the weakest source of its parts."""
    found = []
    for name in ADDITIVE:
        value = total(entries, name)
        if value is not None:
            sources = [e.figures[name].source for e in entries if name in e.figures]
            found.append(Total(quantity=name, value=value, source=weakest(sources)))
    return found


def money_of(totals: dict[Quantity, float], settings: CostSettings) -> tuple[float | None, list[str]]:
    """Price what has a price.

    Returns:
        The sum, None where nothing has a price, and what is in it.
    """
    moved = totals.get("down_bytes", 0.0) + totals.get("up_bytes", 0.0)
    lines: list[tuple[str, float | None, float]] = [
        ("GPU hours", settings.price_gpu_hour, totals.get("gpu_s", 0.0) / 3600),
        ("CPU core hours", settings.price_cpu_hour, totals.get("cpu_s", 0.0) / 3600),
        ("energy", settings.price_kwh, totals.get("energy_j", 0.0) / JOULES_A_KWH),
        ("bytes moved", settings.price_gb, moved / 1e9),
    ]
    priced = [(name, price * amount) for name, price, amount in lines if price is not None and amount > 0]
    return (sum(value for _, value in priced) if priced else None), [name for name, _ in priced]


def critical_path(
    entries: Sequence[CostEntry], rounds: Sequence[RoundFacts], *, simulated: bool
) -> float | None:
    """Wall time of the rounds: as they were, or, of a simulation, as if no site shared its machine."""
    if not simulated:
        return sum(r.seconds for r in rounds)
    slowest = [max(times.values()) for times in _training_times(entries).values()]
    if not slowest:
        return None
    return sum(slowest) + (_wall(entries, ("combine",)) or 0.0)


def stragglers(entries: Sequence[CostEntry], rounds: Sequence[RoundFacts]) -> list[Straggler]:
    """Sites that took longest or did not come, the worst first."""
    slowest: dict[str, int] = defaultdict(int)
    held: dict[str, float] = defaultdict(float)
    for times in _training_times(entries).values():
        ranked = sorted(times.items(), key=lambda pair: -pair[1])
        if len(ranked) > 1 and ranked[0][1] > ranked[1][1]:
            slowest[ranked[0][0]] += 1
            held[ranked[0][0]] += ranked[0][1] - ranked[1][1]
    absent: dict[str, int] = defaultdict(int)
    for r in rounds:
        for site in r.absent:
            absent[site] += 1
    found = [
        Straggler(site=site, slowest=slowest[site], held_s=held.get(site), absent=absent[site])
        for site in sorted({*slowest, *absent})
    ]
    return sorted(found, key=lambda s: (-(s.held_s or 0.0), -s.absent, s.site))


def waste(entries: Sequence[CostEntry], rounds: Sequence[RoundFacts]) -> list[Waste]:
    """Work that entered no round: rejected replies, sites that came too late, rounds never released."""
    rejected = {(site, r.round) for r in rounds for site in r.rejected}
    dropped = [e for e in entries if e.dropped and e.phase == "train"]
    late = [e for e in dropped if (e.where, e.round) not in rejected]
    thrown = [e for e in dropped if (e.where, e.round) in rejected]
    found = []
    for what, times, part in (
        ("a reply that the server rejected", len(rejected), thrown),
        ("a round trained too late or never released", len({(e.where, e.round) for e in late}), late),
    ):
        if times:
            figures = merged(part)
            seconds = figures.get("gpu_s") or figures.get("cpu_s")
            found.append(
                Waste(
                    what=what,
                    times=times,
                    flops=figures["flops"].value if "flops" in figures else None,
                    compute_s=seconds.value if seconds else None,
                    up_bytes=figures["up_bytes"].value if "up_bytes" in figures else None,
                )
            )
    known = {(e.where, e.round) for e in late}
    silent = [(site, r.round) for r in rounds for site in r.absent if (site, r.round) not in known]
    if silent:
        a_round = {e.where: e.figures["flops"].value for e in entries if e.round and "flops" in e.figures}
        bound = [a_round[site] for site, _ in silent if site in a_round]
        found.append(
            Waste(
                what="an absence, at most so much if the site trained",
                times=len(silent),
                flops=sum(bound) if bound else None,
            )
        )
    return found


def target(entries: Sequence[CostEntry], rounds: Sequence[RoundFacts], wanted: float | None) -> Target | None:
    """Find what it took until KID was at or below a level; None where no level or no KID is known.

    Without a level of the study's it is twice the floor, where the floor's interval lies above zero.
    """
    judged = [(r.round, r.fidelity.kid) for r in rounds if r.fidelity is not None]
    if not judged:
        return None
    last = judged[-1][1]
    level = wanted
    if level is None:
        if last.floor is None or last.ratio is None:  # `with_floor` gives a ratio to a clear floor alone
            return None
        level = TARGET_IN_FLOORS * last.floor
    name = computing(entries)
    reached = next((i for i, (_, kid) in enumerate(judged) if kid.value <= level), None)
    found = Target(
        kid=level,
        origin="study" if wanted is not None else "twice the floor",
        quantity=name,
        best=min(kid.value for _, kid in judged),
    )
    if reached is None:
        return found
    update: dict[str, object] = {
        "round": judged[reached][0],
        "value": _up_to(entries, name, judged[reached][0]),
    }
    if reached:
        number = judged[reached - 1][0]
        update |= {"before": number, "value_before": _up_to(entries, name, number)}
    return found.model_copy(update=update)


def computing(entries: Sequence[CostEntry]) -> Quantity:
    """The measure of computing that the sites' training states: GPU time, else CPU time, else FLOPs."""
    trained = [e for e in entries if e.phase == "train" and e.where != SERVER]
    options: tuple[Quantity, ...] = ("gpu_s", "cpu_s")
    return next((name for name in options if total(trained, name)), "flops")


def _up_to(entries: Sequence[CostEntry], name: Quantity, number: int) -> float:
    """What learning took up to the end of a round, preparations included."""
    return total([e for e in entries if e.round is None or e.round <= number], name, LEARNING) or 0.0


def _training_times(entries: Sequence[CostEntry]) -> dict[int, dict[str, float]]:
    """Round to site to the wall time of its training; empty where sites show nominal figures alone."""
    times: dict[int, dict[str, float]] = {}
    for e in entries:
        wall = e.figures.get("wall_s")
        if e.phase == "train" and e.round is not None and wall is not None and wall.source == "measured":
            site = times.setdefault(e.round, {})
            site[e.where] = site.get(e.where, 0.0) + wall.value
    return times


def _wall(entries: Sequence[CostEntry], phases: tuple[Phase, ...]) -> float | None:
    """Wall time of the server's own phases, which follow one another."""
    walls = [
        e.figures["wall_s"].value
        for e in entries
        if e.phase in phases and e.where == SERVER and "wall_s" in e.figures
    ]
    return sum(walls) if walls else None
