"""The frontier of a comparison of systems: KID over GPU time, one panel a way of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polyclinic.server.report.plots import (
    FLOOR,
    LINE,
    MUTED,
    SERIES,
    SHAPES,
    Chart,
    Mark,
    dressed,
    prepare,
    render,
)
from polyclinic.server.report.wording import axis_unit, number

BUDGETS = {"images": "equal images seen", "hours": "equal GPU-hours"}
MARKERS = {"images": "o", "hours": "s"}
DODGE = 0.022  # of the axis, between systems that cost the same


@dataclass(frozen=True)
class Point:
    """Where one arm of a system ended.

    Attributes:
        panel: How it was trained.
        system: Whose it is.
        budget: `images` or `hours`.
        seconds: GPU time of its training.
        value: KID.
        low: Lower end of its interval.
        high: Upper end.
    """

    panel: str
    system: str
    budget: str
    seconds: float
    value: float
    low: float | None = None
    high: float | None = None


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in both time and value, from the cheapest on."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, p.value)):
        if not found or point.value < found[-1].value:
            found.append(point)
    return found


def systems_frontier(points: Sequence[Point], floor: float | None) -> Chart | None:
    """Draw the points of every panel, the two budgets of a system joined, and the frontier through the best.

    Args:
        points: In the order in which panels and systems are shown; None is drawn of no points.
        floor: KID between halves of the reference.
    """
    if not points:
        return None
    panels = list(dict.fromkeys(p.panel for p in points))
    systems = list(dict.fromkeys(p.system for p in points))
    size, unit = axis_unit(max(p.seconds for p in points), "s")
    if unit == "s" and max(p.seconds for p in points) < 1:
        size, unit = 1e-3, "ms"
    reach = max(p.seconds for p in points) / size
    heights = [v for p in points for v in (p.value, p.low, p.high) if v is not None]
    top = max([*heights, floor or 0.0])
    bottom = min(0.0, *heights)

    def panel(axes: Any, name: str) -> None:
        prepare(axes, f"GPU time, {unit}", rounds=False)
        axes.set_title(name)
        own = [p for p in points if p.panel == name]
        if floor is not None and floor > 0:
            axes.axhspan(0, floor, color=FLOOR, alpha=0.16, linewidth=0)
        edge = unbeaten(own)
        axes.step(
            [p.seconds / size for p in edge] + [1.15 * reach],
            [p.value for p in edge] + [edge[-1].value],
            where="post",
            color=MUTED,
            linewidth=1,
            linestyle=(0, (4, 3)),
        )
        for i, system in enumerate(systems):
            colour = SERIES[i % len(SERIES)]
            shift = (i - (len(systems) - 1) / 2) * DODGE * reach
            both = [(p, p.seconds / size + (shift if p.budget == "hours" else 0.0)) for p in own]
            both = [(p, x) for p, x in both if p.system == system]
            axes.plot([x for _, x in both], [p.value for p, _ in both], color=colour, linewidth=1, alpha=0.5)
            for point, x in both:
                if point.low is not None and point.high is not None:
                    axes.plot([x, x], [point.low, point.high], color=colour, linewidth=1.1, alpha=0.75)
                axes.plot([x], [point.value], color=colour, marker=MARKERS[point.budget], markersize=6)
        axes.set_xlim(0, 1.15 * reach)
        axes.set_ylim(bottom * 1.1, top + 0.08 * (top - bottom) or 1)
        axes.spines["bottom"].set_color(LINE)

    def draw(figure: Any, *, across: bool) -> None:
        shape = (1, len(panels)) if across else (len(panels), 1)
        grid = figure.subplots(*shape, sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, panels, strict=True):
            panel(axes, name)
        for axes in grid[:, 0]:
            axes.set_ylabel("KID")

    label = "KID against GPU time: " + "; ".join(
        f"{p.system} {p.panel} at {BUDGETS[p.budget]} {number(p.value)} at {number(p.seconds / size)} {unit}"
        for p in points
    )
    marks = [Mark(system, f"--c{i % len(SERIES)}") for i, system in enumerate(systems)]
    marks += [Mark(f"at {words}", "--muted", shape=SHAPES[i]) for i, words in enumerate(BUDGETS.values())]
    marks.append(Mark("frontier: no arm is both cheaper and closer", "--muted", "4 3"))
    if floor is not None:
        marks.append(Mark("floor: real against real", "--floor", band=True))
    wide = render(lambda figure: draw(figure, across=True), 10.4, 3.4, "systems wide")
    narrow = render(lambda figure: draw(figure, across=False), 3.35, 2.3 * len(panels), "systems narrow")
    return Chart(dressed(wide, label), dressed(narrow, label), label, marks)
