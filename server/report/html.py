"""Write the report, the model card and the comparison: rendered in memory first, then written whole."""

from __future__ import annotations

import html
import json
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from polyclinic.common.files import write_atomic
from polyclinic.server.evaluation.estimate import Fidelity
from polyclinic.server.evaluation.probe import ConceptFaithfulness
from polyclinic.server.report import plots, view, wording
from polyclinic.server.report.contest import LEARNING, comparison_verdict, compute
from polyclinic.server.report.metrics import (
    Metrics,
    bytes_moved,
    evaluated_rounds,
    first_and_last,
    round_epsilon,
    total,
    worst_epsilon,
)
from polyclinic.server.report.pictures import cut
from polyclinic.server.report.verdict import verdict

REPORT, NUMBERS, CARD = "report.html", "metrics.json", "MODEL_CARD.md"
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
    gpu: str
    cpu: str
    bytes: str


def markdown(text: object) -> Markup:
    """Make text safe inside a line of Markdown: no HTML, no table or code delimiters, no line breaks."""
    flat = " ".join(str(text).split())
    safe = html.escape(flat, quote=False)
    for character in "\\`*_[]|":
        safe = safe.replace(character, f"&#{ord(character)};")
    return Markup(safe)


def environment() -> jinja2.Environment:
    """Build the template environment: everything escaped, an unknown name is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    made.filters["md"] = markdown
    made.globals["words"] = wording
    return made


def context(run_dir: Path, metrics: Metrics) -> dict[str, Any]:
    """Prepare everything the report's and the model card's templates name."""
    ends = first_and_last(metrics)
    final = ends[1] if ends else None
    judged = [r.faithfulness for r in metrics.rounds if r.faithfulness is not None]
    down, up = bytes_moved(metrics)
    notes = []
    if final is not None and final.fidelity is not None:
        pairs = (("KID", final.fidelity.kid), ("Frechet distance", final.fidelity.frechet))
        notes = [f"{name}: {e.note}." for name, e in pairs if e.note]
    return {
        "m": metrics,
        "sites": [s.name for s in metrics.sites],
        "cards": [view.fidelity_card(metrics), view.epsilon_card(metrics), view.cost_card(metrics)],
        "samples": view.sample_table(run_dir, metrics),
        "judged": evaluated_rounds(metrics),
        "final": final,
        "notes": notes,
        "last_round": max((r.round for r in metrics.rounds), default=0),
        "fidelity_charts": view.fidelity_charts(metrics),
        "panels": view.faithfulness_panels(metrics),
        "faithfulness": judged[-1] if judged else None,
        "faithfulness_marks": [
            plots.Mark("drawn images, 95 % interval", "--c0"),
            plots.Mark("real images, same probe", "--ceiling"),
            plots.Mark("chance", "--muted", "5 3"),
        ],
        "epsilon_chart": view.epsilon_chart(metrics),
        "audit_sizes": [f"{size:,}" for size in sorted({a.coordinates for a in metrics.audit})],
        "alarms": [(a.site, alarm) for a in metrics.audit for alarm in a.alarms],
        "events": view.events(metrics),
        "cost_lines": view.cost_lines(metrics),
        "totals": view.cost_totals(metrics),
        "down": down,
        "up": up,
        "study_text": json.dumps(metrics.study_json, indent=2, ensure_ascii=False, default=str),
    }


def write_report(run_dir: Path, metrics: Metrics) -> Path:
    """Write report.html, metrics.json and MODEL_CARD.md into a run directory.

    The verdict is worked out anew from the numbers. Nothing is written before everything is
    rendered, and each file is replaced whole: an older report survives any failure.

    Args:
        run_dir: The run directory; sample sheets lie in it at the paths the metrics name.
        metrics: The run's numbers.

    Returns:
        Path of report.html.

    Raises:
        BadInput: A sample sheet is missing or broken, or the disk is full.
    """
    metrics = metrics.model_copy(update={"verdict": verdict(metrics)})
    values, made = context(run_dir, metrics), environment()
    files = {
        NUMBERS: metrics.model_dump_json(indent=1) + "\n",
        CARD: made.get_template("MODEL_CARD.md.j2").render(values),
        REPORT: made.get_template("report.html.j2").render(values),
    }
    for name, text in files.items():
        write_atomic(run_dir / name, text.encode())
    return run_dir / REPORT


def read_metrics(path: Path) -> Metrics:
    """Read a `metrics.json`."""
    return Metrics.model_validate_json(path.read_text(encoding="utf-8"))


def link_to(report: Path, page: Path) -> str:
    """Write a relative link from a page to another file; empty where that file is not there."""
    if not report.is_file():
        return ""
    return urllib.parse.quote(Path(os.path.relpath(report, page.parent)).as_posix())


def arm_row(name: str, title: str, metrics: Metrics, link: str) -> ArmRow:
    """Prepare one line of the comparison's table."""
    ends = first_and_last(metrics)
    faithfulness = ends[1].faithfulness if ends else None

    def hours(value: float | None) -> str:
        return wording.seconds(value) if value else wording.DASH

    return ArmRow(
        name,
        title,
        link,
        metrics.private,
        worst_epsilon(metrics),
        ends[1].fidelity if ends else None,
        faithfulness.overall if faithfulness else None,
        hours(total(metrics.cost, "GPU time", LEARNING)),
        hours(total(metrics.cost, "CPU time", LEARNING)),
        wording.scaled(sum(bytes_moved(metrics)), "B"),
    )


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
    charts = [("KID against privacy loss", plots.frontier(guarded, "epsilon", floor, "epsilon"))]
    quantity, unit, values = compute([arm for _, arm, _ in judged])
    size, unit_name = wording.axis_unit(max((v for v in values if v is not None), default=0.0), unit)
    for (name, _, kid), value in zip(judged, values, strict=True):
        if value is not None:
            priced.append(plots.Arm(name, value / size, kid.value, kid.low, kid.high))
    if len(priced) == len(judged):
        charts.append(
            ("KID against compute", plots.frontier(priced, f"{quantity}, {unit_name}", floor, "compute"))
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
    rows = [
        arm_row(name, own_title(arm, shared), arm, link_to(folder / REPORT, path))
        for name, arm, folder in zip(names, arms, arm_dirs, strict=True)
    ]
    values = {
        "title": shared,
        "names": names,
        "rows": rows,
        "verdict": comparison_verdict(arms),
        "open_arms": [name for name, arm in zip(names, arms, strict=True) if not arm.private],
        "simulated": any(arm.simulated for arm in arms),
        "created": max(arm.created for arm in arms),
        "code_version": arms[0].code_version,
        "charts": frontier_charts(names, arms),
        "samples": side_by_side(names, arms, arm_dirs),
        "notes": sorted({w for row in rows if row.fidelity for w in row.fidelity.warnings}),
    }
    text = environment().get_template("compare.html.j2").render(values)
    write_atomic(path, text.encode())
    return path
