"""Write the report, metrics.json and the model card: rendered in memory first, then written whole."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from polyclinic.common.files import write_atomic
from polyclinic.common.stored import read_stored
from polyclinic.server.report import (
    panels,
    plots,
    view,
    view_cost,
    view_faithfulness,
    view_metrics,
    wording,
)
from polyclinic.server.report.card import front_matter
from polyclinic.server.report.cost_summary import summarise_cost, summarise_forecast
from polyclinic.server.report.costs import CostSummary
from polyclinic.server.report.metrics import (
    Metrics,
    bytes_moved,
    evaluated_rounds,
    first_and_last,
    why_no_fidelity,
)
from polyclinic.server.report.verdict import headline, utility_sentences, verdict

REPORT, NUMBERS, CARD = "report.html", "metrics.json", "MODEL_CARD.md"


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
    summary = metrics.cost_summary or cost_summary(metrics)
    rows = view_metrics.metric_rows(metrics)
    cosine, official = (view_metrics.latest(metrics, name) for name in ("cosine", "medvqa"))
    utility = view_metrics.latest(metrics, "utility")
    taught = utility.utility if utility is not None else None
    faithfulness = judged[-1] if judged else None
    values = view_faithfulness.value_groups(faithfulness)
    return {
        "m": metrics,
        "live": None,
        "front_matter": front_matter(metrics),
        "sites": [s.name for s in metrics.sites],
        "cards": [view.fidelity_card(metrics), view.epsilon_card(metrics), view.cost_card(metrics)],
        "samples": view.sample_table(run_dir, metrics),
        "judged": evaluated_rounds(metrics),
        "final": final,
        "no_fidelity": why_no_fidelity(metrics),
        "contents": contents(metrics),
        "metric_rows": rows,
        "notes": [f"{row.title}, {row.extractor}: {row.final.note}." for row in rows if row.final.note],
        "extractors": list(view_metrics.extractors(final).values()) if final else [],
        "resampled": view_metrics.resampled,
        "intervals": view_metrics.interval_words(final) if final else "",
        "metric_panels": view_metrics.metric_panels(metrics),
        "scores": view_metrics.scores(metrics),
        "medvqa": official and official.medvqa,
        "cosine": cosine and cosine.cosine,
        "utility": utility,
        "utility_said": utility_sentences(utility),
        "utility_chart": panels.diets(taught.rows) if taught and taught.rows else None,
        "leakage_said": view_metrics.leakage_sentences(metrics),
        "near_copies": view_metrics.near_copies(metrics),
        "federated": metrics.federated_fidelity,
        "gates": {gate.site: view_metrics.gate_words(gate) for gate in metrics.gates},
        "noted": view_metrics.noted,
        "charge": view_metrics.epsilon_charge,
        "limits": view_metrics.limits(metrics),
        "hashes": view_metrics.hashes(metrics),
        "states": [(r.round, r.state_hash) for r in metrics.rounds if r.state_hash],
        "site_work": view_cost.site_work(metrics),
        "last_round": max((r.round for r in metrics.rounds), default=0),
        "fidelity_charts": view.fidelity_charts(metrics),
        "panels": view.faithfulness_panels(metrics),
        "faithfulness": faithfulness,
        "value_groups": values,
        "value_intervals": view_faithfulness.value_intervals(values),
        "negations_said": view_faithfulness.negation_sentence(faithfulness),
        "faithfulness_marks": [
            plots.Mark("drawn images, 95 % interval", "--c0"),
            plots.Mark("real images, same probe", "--ceiling"),
            plots.Mark("chance", "--muted", "5 3"),
        ],
        "epsilon_chart": view.epsilon_chart(metrics),
        "audit_sizes": [f"{size:,}" for size in sorted({a.coordinates for a in metrics.audit})],
        "unaudited": [s.name for s in metrics.sites if s.name not in {a.site for a in metrics.audit}],
        "alarms": [(a.site, alarm) for a in metrics.audit for alarm in a.alarms],
        "events": view.events(metrics),
        "ledger": view_cost.ledger_table(metrics),
        "cost_rounds": view_cost.round_rows(metrics),
        "totals": view_cost.total_lines(summary, summarise_forecast(metrics.forecast, metrics.cost_settings)),
        "target": view_cost.target_sentence(
            summary.target, final.fidelity.kid.floor if final and final.fidelity else None
        ),
        "stragglers": view_cost.straggler_sentences(summary),
        "waste": view_cost.waste_sentences(summary),
        "down": down,
        "up": up,
        "study_text": json.dumps(metrics.study_json, indent=2, ensure_ascii=False, default=str),
    }


def contents(metrics: Metrics) -> list[tuple[str, str]]:
    """Sections of the report: id and name, in their order."""
    found = [("images", "Images"), ("fidelity", "Fidelity"), ("faithfulness", "Faithfulness")]
    found += [("utility", "Utility")] if view_metrics.latest(metrics, "utility") is not None else []
    found += [("privacy", "Privacy")] + ([("audit", "Audit")] if metrics.private else [])
    found += [("sites", "Sites"), ("leakage", "Leakage"), ("cost", "Cost"), ("limits", "Limits")]
    return [*found, ("study", "Study")]


def cost_summary(metrics: Metrics) -> CostSummary:
    """Add up a run's cost ledger."""
    return summarise_cost(
        metrics.cost,
        metrics.rounds,
        metrics.cost_settings,
        simulated=metrics.simulated,
        clock_s=metrics.seconds_total,
    )


def concluded(metrics: Metrics) -> Metrics:
    """Fill in what follows from the numbers: headline, verdict, and what the cost ledger comes to."""
    update = {
        "headline": headline(metrics),
        "verdict": verdict(metrics),
        "cost_summary": cost_summary(metrics),
        "forecast_summary": summarise_forecast(metrics.forecast, metrics.cost_settings),
    }
    return metrics.model_copy(update=update)


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
    metrics = concluded(metrics)
    values, made = context(run_dir, metrics), environment()
    files = {
        NUMBERS: metrics.model_dump_json(indent=1) + "\n",
        CARD: made.get_template("MODEL_CARD.md.j2").render(values),
        REPORT: made.get_template("report.html.j2").render(values),
    }
    for name, text in files.items():
        write_atomic(run_dir / name, text.encode())
    return run_dir / REPORT


class Live(NamedTuple):
    """What lets a page look for a newer one.

    Attributes:
        nonce: Of the only script that the page may run; it asks for the page's own address and no other.
        tag: Name of this state of the page.
        every: Seconds between two looks.
    """

    nonce: str
    tag: str
    every: int


def live_page(run_dir: Path, metrics: Metrics, live: Live) -> str:
    """Render the report as a page that renews itself while the run goes on."""
    values = context(run_dir, concluded(metrics)) | {"live": None if metrics.finished else live}
    return environment().get_template("report.html.j2").render(values)


def read_metrics(path: Path) -> Metrics:
    """Read a `metrics.json`.

    Raises:
        BadInput: Another release wrote it.
    """
    return read_stored(path, Metrics, "write it again with `polyclinic-server report RUN`")
