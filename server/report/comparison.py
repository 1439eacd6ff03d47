"""One page that compares arms judged alike: the frontier of privacy, fidelity and cost, and their images."""

from __future__ import annotations

import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from polyclinic.common.files import write_atomic
from polyclinic.server.evaluation.estimate import Fidelity
from polyclinic.server.evaluation.probe import ConceptFaithfulness
from polyclinic.server.evaluation.results import ConceptUtility
from polyclinic.server.report import plots, view, wording
from polyclinic.server.report.comparability import comparability
from polyclinic.server.report.contest import comparison_verdict, compute, shared_start
from polyclinic.server.report.cost_summary import computing, target
from polyclinic.server.report.costs import LEARNING, NAMES, total
from polyclinic.server.report.html import REPORT, cost_summary, environment
from polyclinic.server.report.metrics import (
    Metrics,
    bytes_moved,
    evaluated_rounds,
    first_and_last,
    round_epsilon,
    worst_epsilon,
)
from polyclinic.server.report.pictures import cut

# A comparison shows this many draws of each prompt and arm.
DRAWS_COMPARED = 4


@dataclass(frozen=True)
class ArmRow:
    """One line of the comparison's table."""

    name: str
    title: str
    link: str
    private: bool
    epsilon: float | None
    fidelity: Fidelity | None
    overall: ConceptFaithfulness | None
    utility: ConceptUtility | None
    gpu: str
    cpu: str
    price: str
    price_round: str
    co2: str
    bytes: str


def link_to(report: Path, page: Path) -> str:
    """Write a relative link from a page to another file; empty where that file is not there."""
    if not report.is_file():
        return ""
    return urllib.parse.quote(Path(os.path.relpath(report, page.parent)).as_posix())


def common_level(arms: list[Metrics]) -> tuple[float, str] | None:
    """KID by which the arms' prices are compared, and who chose it: the study, or what every arm reached."""
    wanted = arms[0].cost_settings.target_kid
    if wanted is not None:
        return wanted, "set by the study"
    kids = [[r.fidelity.kid.value for r in arm.rounds if r.fidelity] for arm in arms]
    reached = [min(values) for values in kids if values]
    return (max(reached), "the lowest that every arm reached") if reached else None


def arm_row(name: str, title: str, metrics: Metrics, link: str, level: float | None) -> ArmRow:
    """Prepare one line of the comparison's table."""
    ends = first_and_last(metrics)
    faithfulness = ends[1].faithfulness if ends else None
    utility = ends[1].utility if ends else None

    def hours(value: float | None) -> str:
        return wording.seconds(value) if value else wording.DASH

    spent = target(metrics.cost, metrics.rounds, level) if level is not None else None
    price, when = wording.DASH, ""
    if spent is not None:
        unit = NAMES[spent.quantity][1]
        price = "not reached" if spent.value is None else wording.quantity(spent.value, unit)
        when = "" if spent.round is None else f"round {spent.round}" if spent.round else "the start has it"
    co2 = cost_summary(metrics).co2_g
    return ArmRow(
        name,
        title,
        link,
        metrics.private,
        worst_epsilon(metrics),
        ends[1].fidelity if ends else None,
        faithfulness.overall if faithfulness else None,
        utility.overall if utility else None,
        hours(total(metrics.cost, "gpu_s", LEARNING)),
        hours(total(metrics.cost, "cpu_s", LEARNING)),
        price,
        when,
        wording.DASH if co2 is None else wording.scaled(co2, "g"),
        wording.scaled(sum(bytes_moved(metrics)), "B"),
    )


def start_row(arms: list[Metrics]) -> ArmRow | None:
    """Prepare the line of the public start that all arms began from, where they share one."""
    start = shared_start(arms)
    if start is None:
        return None
    public = {total(arm.cost, "cpu_s", ("pretrain",)) or 0.0 for arm in arms}
    cpu = wording.seconds(public.pop()) if len(public) == 1 else wording.DASH
    return ArmRow(
        "start",
        "public data alone",
        "",
        private=True,
        epsilon=0.0,
        fidelity=start.fidelity,
        overall=start.faithfulness.overall if start.faithfulness else None,
        utility=start.utility.overall if start.utility else None,
        gpu=wording.DASH,
        cpu=cpu,
        price=wording.DASH,
        price_round="",
        co2=wording.DASH,
        bytes=wording.DASH,
    )


def _co2_note(arms: list[Metrics]) -> str:
    sources = sorted(
        {summary.grid_source for arm in arms if (summary := cost_summary(arm)).co2_g is not None}
    )
    if not sources:
        return "CO2 is unknown: no study names the intensity of its grid (cost.grid_gco2_per_kwh)."
    return f"CO2 equivalent is that of all phases, judging included; the grid: {wording.listed(sources)}."


def _public_note(names: list[str], arms: list[Metrics]) -> list[str]:
    """Say how much of an arm's compute its public parts took, where they were trained for it."""
    quantity, unit, _ = compute(arms)
    name = next(key for key, (words, _) in NAMES.items() if words == quantity)
    spent = [total(arm.cost, name, ("pretrain",)) or 0.0 for arm in arms]
    if not any(spent):
        return []
    if max(spent) <= 1.05 * min(spent):
        much = f"in every arm, {wording.quantity(spent[0], unit)}"
    else:
        each = zip(names, spent, strict=True)
        much = wording.listed([f"in {arm} {wording.quantity(value, unit)}" for arm, value in each])
    return [f"{quantity} holds what training the public parts took: {much}."]


def own_title(metrics: Metrics, shared: str) -> str:
    """Write an arm's title without the words that all arms' titles begin with."""
    return metrics.study.title.removeprefix(shared).strip(" ,:;–-()")


def frontier_charts(names: list[str], arms: list[Metrics]) -> list[tuple[str, plots.Chart]]:
    """KID against epsilon, and KID against compute where every arm states it."""
    judged = [(name, arm, ends[1].fidelity.kid) for name, arm in zip(names, arms, strict=True)
              if (ends := first_and_last(arm)) and ends[1].fidelity]  # fmt: skip
    if not judged:
        return []
    floors = [kid.floor for _, _, kid in judged if kid.floor is not None]
    floor = max(floors, default=None)
    start = shared_start(arms)
    begun = start.fidelity.kid.value if start and start.fidelity else None
    guarded, priced = [], []
    for name, arm, kid in judged:
        epsilon = worst_epsilon(arm) if arm.private else None
        trail = [
            (e, r.fidelity.kid.value)
            for r in evaluated_rounds(arm)
            if arm.private and r.fidelity and (e := 0.0 if r.round == 0 else round_epsilon(r)) is not None
        ]
        finite = epsilon if plots.finite(epsilon) else None
        guarded.append(plots.Arm(name, finite, kid.value, kid.low, kid.high, trail))
    charts = [("KID against privacy loss", plots.frontier(guarded, "epsilon", floor, begun, "epsilon"))]
    quantity, unit, values = compute([arm for _, arm, _ in judged])
    size, unit_name = wording.axis_unit(max((v for v in values if v is not None), default=0.0), unit)
    for (name, _, kid), value in zip(judged, values, strict=True):
        if value is not None:
            priced.append(plots.Arm(name, value / size, kid.value, kid.low, kid.high))
    if len(priced) == len(judged):
        charts.append(
            (
                "KID against compute",
                plots.frontier(priced, f"{quantity}, {unit_name}", floor, begun, "compute"),
            )
        )
    return charts


def side_by_side(names: list[str], arms: list[Metrics], arm_dirs: list[Path]) -> view.SampleTable | None:
    """Set the last images of all arms beside each other, prompt by prompt."""
    columns, pictures, size = [], [], 0
    prompts = max((arm.prompts for arm in arms), key=len, default=[])
    for i, (name, arm, folder) in enumerate(zip(names, arms, arm_dirs, strict=True)):
        drawn = [r for r in arm.rounds if r.samples is not None]
        if not drawn or drawn[-1].samples is None:
            continue
        columns.append(view.SampleColumn(drawn[-1].round, name, i < view.ROUNDS_SHOWN_NARROW))
        sheet = drawn[-1].samples
        found = cut(folder, sheet, DRAWS_COMPARED if len(arms) < 5 and sheet.columns >= DRAWS_COMPARED else 2)
        # Arms may list the same prompts in another order; a row must show one prompt.
        pictures.append(dict(zip(arm.prompts, found, strict=False)))
        size = max(size, drawn[-1].samples.image_size)
    if not columns:
        return None
    rows = [view.SampleRow(prompt, [p.get(prompt, []) for p in pictures]) for prompt in prompts]
    return view.SampleTable(columns, rows, size < 128, size)


def write_comparison(path: Path, arms: list[Metrics], arm_dirs: list[Path]) -> Path:
    """Write one page that compares arms judged alike.

    Args:
        path: Where the page will stand.
        arms: Metrics of each arm; `study.name` names it, less the beginning all names share.
        arm_dirs: Run directory of each arm, for its images and for links to its report.

    Returns:
        The path.

    Raises:
        BadInput: A sample sheet is missing or broken, or the disk is full.
        ValueError: No arms, or not one directory an arm.
    """
    if not arms or len(arms) != len(arm_dirs):
        raise ValueError(f"{len(arms)} arms and {len(arm_dirs)} directories")
    names = wording.arm_names(arms)
    shared = wording.shared_title(arms)
    level = common_level(arms)
    rows = [
        arm_row(name, own_title(arm, shared), arm, link_to(folder / REPORT, path), level and level[0])
        for name, arm, folder in zip(names, arms, arm_dirs, strict=True)
    ]
    start = start_row(arms)
    rows = [*([start] if start else []), *rows]
    warnings = sorted({w for row in rows if row.fidelity for w in row.fidelity.warnings})
    values = {
        "title": shared,
        "names": names,
        "rows": rows,
        "start": start,
        "level": level,
        "on_gpu": any(row.gpu != wording.DASH for row in rows),
        "priced": NAMES[computing(arms[0].cost)][0],
        "verdict": comparison_verdict(arms),
        "unfair": comparability(names, arms),
        "notices": wording.notices(arms),
        "open_arms": [name for name, arm in zip(names, arms, strict=True) if not arm.private],
        "simulated": any(arm.simulated for arm in arms),
        "created": max(arm.created for arm in arms),
        "code_version": arms[0].code_version,
        "charts": frontier_charts(names, arms),
        "samples": side_by_side(names, arms, arm_dirs),
        "notes": [*_public_note(names, arms), _co2_note(arms), *warnings],
    }
    text = environment().get_template("compare.html.j2").render(values)
    write_atomic(path, text.encode())
    return path
