"""The report's small charts: one metric over rounds, and what three diets teach a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.results import ConceptUtility
from polyclinic.server.report.plots import (
    CEILING,
    MUTED,
    SERIES,
    SHAPES,
    Chart,
    Mark,
    Series,
    chart,
    prepare,
    whiskers,
)
from polyclinic.server.report.wording import number

DIETS = (("real", "real images"), ("both", "real and drawn"), ("synthetic", "drawn images"))


def over_rounds(title: str, found: Sequence[tuple[int, Estimate]], salt: str) -> Chart:
    """Draw one metric over rounds with its intervals, and its level between halves of the reference.

    Args:
        title: Name of the metric.
        found: Round and estimate, in order.
        salt: Name that is this chart's alone on the page.
    """
    estimates = [estimate for _, estimate in found]
    series = Series(
        title,
        [n for n, _ in found],
        [e.value for e in estimates],
        [e.low for e in estimates],
        [e.high for e in estimates],
    )
    floor = estimates[-1].floor

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        prepare(axes, "round")
        if floor is not None:
            axes.axhline(floor, color=CEILING, linewidth=1.3)
        axes.plot(series.x, series.y, color=SERIES[0], linewidth=1.8, marker="o", markersize=4)
        whiskers(axes, series, SERIES[0])

    level = f", real against real {number(floor)}" if floor is not None else ""
    label = f"{title}: from {number(series.y[0])} to {number(series.y[-1])} at round {series.x[-1]:g}{level}"
    return chart(draw, label, [], salt, wide=(2.75, 2.0))


def diets(rows: Sequence[ConceptUtility]) -> Chart:
    """Draw balanced accuracy on real patients by concept and by what the classifier was trained on."""
    names = [row.concept for row in rows]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        prepare(axes, "balanced accuracy on real patients, %", rounds=False)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        for place, row in enumerate(rows):
            axes.plot([100 * row.chance] * 2, [place - 0.36, place + 0.36], color=MUTED, linewidth=1.2)
            for i, (diet, _) in enumerate(DIETS):
                found: Estimate = getattr(row, diet)
                y = place + 0.24 * (i - 1)
                if found.low is not None and found.high is not None:
                    axes.plot([100 * found.low, 100 * found.high], [y, y], color=SERIES[i], linewidth=1.5)
                axes.plot([100 * found.value], [y], color=SERIES[i], marker="os^"[i], markersize=6)
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.4, -0.6)

    said = "; ".join(
        f"{row.concept}: "
        + ", ".join(f"{words} {100 * getattr(row, diet).value:.0f} %" for diet, words in DIETS)
        for row in rows
    )
    marks = [
        *(Mark(f"trained on {words}", f"--c{i}", shape=SHAPES[i]) for i, (_, words) in enumerate(DIETS)),
        Mark("chance", "--muted"),
    ]
    height = 0.9 + 0.55 * len(rows)
    return chart(
        draw, f"Balanced accuracy by what was trained on. {said}", marks, "diets", wide=(5.3, height)
    )
