"""The report's charts: matplotlib draws them, the page's own colours and fonts dress them.

Each chart is inline SVG in two shapes, wide and narrow, of which the page's CSS shows one, so that
the lettering has its true size on a telephone too. Colours are CSS variables of the page, so that
one drawing serves light, dark and paper. Legends are HTML, drawn by the templates.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from polyclinic.server.report.wording import number

# Stand-ins that matplotlib accepts as colours; the SVG's text is then rewritten to CSS variables.
INK, MUTED, LINE, FLOOR, CEILING = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = tuple(f"#0101{i:02x}" for i in range(0x10, 0x18))
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", FLOOR: "--floor", CEILING: "--ceiling"} | {
    colour: f"--c{i}" for i, colour in enumerate(SERIES)
}
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
SVG_DASHES = ("none", "7 3", "2 2", "8 3 2 3")
SHAPES = ("M12 .5a4.5 4.5 0 1 0 .01 0Z", "M8 1h8v8H8Z", "M12 .5l5 9H7Z", "M12 0l5 5-5 5-5-5Z")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "polyclinic",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
}


@dataclass(frozen=True)
class Mark:
    """One entry of a chart's legend."""

    label: str
    colour: str
    dash: str = "none"
    band: bool = False
    shape: str = ""


@dataclass(frozen=True)
class Chart:
    """A finished chart: its SVG in both shapes, a sentence that describes it, and its legend."""

    wide: Markup
    narrow: Markup
    label: str
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class Series:
    """Values along one line; `low` and `high` bound each value's interval where it has one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    floor: Sequence[float | None] = ()


def dressed(svg: str, label: str) -> Markup:
    """Turn matplotlib's SVG file into inline SVG with the page's colours, font and a label."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([^;\"]*?)([\d.]+px)[^;\"]*", r"font: \1\2 var(--font)", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    head = f'<svg role="img" aria-label="{escape(label)}" '
    # Every character of the drawing comes from matplotlib, which escapes all text it is given.
    return Markup(head + body.removeprefix("<svg "))


def render(draw: Callable[[Any], None], width: float, height: float, salt: str) -> str:
    """Draw on fresh axes of a size in inches and return the SVG file's text."""
    # Ids must differ between charts of one page and be the same in every run.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"polyclinic {salt} {width}"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.patch.set_alpha(0)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def chart(
    draw: Callable[[Any], None],
    label: str,
    marks: list[Mark],
    salt: str,
    wide: tuple[float, float] = (5.3, 3.0),
) -> Chart:
    """Render a chart in both shapes."""
    shapes = (wide, (3.35, 2.7))
    first, second = (dressed(render(draw, *shape, f"{salt}{i}"), label) for i, shape in enumerate(shapes))
    return Chart(first, second, label, marks)


def prepare(axes: Any, xlabel: str, *, rounds: bool = True) -> None:
    """Give axes the common look: horizontal rules only, few ticks, plain numbers."""
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=rounds))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def whiskers(axes: Any, series: Series, colour: str) -> None:
    """Draw the interval of each value that has one."""
    for x, low, high in zip(series.x, series.low, series.high, strict=True):
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=colour, linewidth=1.1, solid_capstyle="butt", alpha=0.75)


def distance_over_rounds(name: str, series: Series) -> Chart:
    """Draw a distance to the reference over rounds, with intervals and the floor below it.

    Args:
        name: Name of the distance.
        series: One value a judged round, with intervals and floors.
    """
    floors = [(x, f) for x, f in zip(series.x, series.floor, strict=True) if f is not None]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        prepare(axes, "round")
        bounds = [v for v in (*series.y, *series.low, *series.high, *(f for _, f in floors)) if v is not None]
        top, bottom = max(bounds), min(0.0, *bounds)
        if floors:
            xs = [f[0] for f in floors] if len(floors) > 1 else [floors[0][0] - 0.5, floors[0][0] + 0.5]
            ys = [f[1] for f in floors] if len(floors) > 1 else [floors[0][1]] * 2
            axes.fill_between(xs, [bottom - top] * len(xs), ys, color=FLOOR, alpha=0.16, linewidth=0)
            axes.plot(xs, ys, color=FLOOR, linewidth=1.3)
        axes.plot(series.x, series.y, color=SERIES[0], linewidth=1.8, marker="o", markersize=4.5)
        whiskers(axes, series, SERIES[0])
        axes.set_ylim(bottom - 0.06 * (top - bottom) * (bottom < 0), top + 0.08 * (top - bottom) or 1)

    last = f"{number(series.y[-1])} at round {series.x[-1]:g}"
    label = f"{name} over rounds: from {number(series.y[0])} to {last}"
    marks = [Mark(f"{name}, 95 % interval" if any(v is not None for v in series.low) else name, "--c0")]
    if floors:
        marks.append(Mark("floor: real against real", "--floor", band=True))
    return chart(draw, label, marks, f"distance {name}")


def share_over_rounds(series: Series, chance: float, real: float | None, salt: str) -> Chart:
    """Draw balanced accuracy over rounds for one concept, with chance and the real images' ceiling.

    Args:
        series: One value a judged round, between 0 and 1.
        chance: Accuracy of guessing.
        real: Accuracy of the same probe on real images.
        salt: Name that is this chart's alone on the page.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        prepare(axes, "round")
        axes.axhline(chance, color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)))
        if real is not None:
            axes.axhline(real, color=CEILING, linewidth=1.3)
        axes.plot(series.x, series.y, color=SERIES[0], linewidth=1.8, marker="o", markersize=4)
        whiskers(axes, series, SERIES[0])
        axes.set_ylim(min(0.0 if chance < 0.4 else 0.3, *series.y), 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))

    ceiling = f", real images {100 * real:.0f} %" if real is not None else ""
    end = f"balanced accuracy {100 * series.y[-1]:.0f} % at the end"
    label = f"{series.label}: {end}, chance {100 * chance:.0f} %{ceiling}"
    return chart(draw, label, [], salt, wide=(2.75, 2.0))


def epsilon_over_rounds(sites: list[Series], caps: dict[str, float]) -> Chart:
    """Draw each site's spending over rounds with its cap; beyond eight sites, only their range.

    Args:
        sites: One line a site.
        caps: Site to what it allowed.
    """
    many = len(sites) > len(SERIES)
    levels = sorted(set(caps.values()))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        prepare(axes, "round")
        if many:
            spent: dict[float, list[float]] = {}
            for series in sites:
                for x, y in zip(series.x, series.y, strict=True):
                    spent.setdefault(x, []).append(y)
            xs = sorted(spent)
            axes.fill_between(
                xs, [min(spent[x]) for x in xs], [max(spent[x]) for x in xs], color=SERIES[0], alpha=0.3
            )
            axes.plot(xs, [max(spent[x]) for x in xs], color=SERIES[0], linewidth=1.8)
        else:
            for i, series in enumerate(sites):
                style = {"linestyle": DASHES[i % 4], "marker": MARKERS[i], "markersize": 3.5}
                axes.plot(series.x, series.y, color=SERIES[i], linewidth=1.7, **style)
        for level in levels:
            owners = [name for name, cap in caps.items() if cap == level]
            index = next((i for i, s in enumerate(sites) if s.label == owners[0]), 0)
            shared = many or len(owners) > 1 or len(levels) == 1
            axes.axhline(
                level, color=MUTED if shared else SERIES[index], linewidth=1.1, linestyle=(0, (4, 3))
            )
            words = f"cap {level:g}" if shared else f"cap of {owners[0]} {level:g}"
            axes.annotate(
                words,
                (1, level),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color=MUTED,
                fontsize=8,
            )
        highest = max([*levels, *(y for s in sites for y in s.y)])
        axes.set_ylim(0, 1.12 * highest or 1)

    marks = (
        [Mark(f"range over {len(sites)} sites", "--c0", band=True)]
        if many
        else [Mark(s.label, f"--c{i}", SVG_DASHES[i % 4]) for i, s in enumerate(sites)]
    )
    label = "Epsilon spent over rounds: " + ", ".join(f"{s.label} {number(s.y[-1])}" for s in sites[:8])
    return chart(draw, label, marks, "epsilon")


@dataclass(frozen=True)
class Arm:
    """One arm on a frontier plot: where it ended, and the way there. `x` of None is "no DP"."""

    label: str
    x: float | None
    y: float
    low: float | None = None
    high: float | None = None
    trail: Sequence[tuple[float, float]] = ()


def frontier(arms: list[Arm], xlabel: str, floor: float | None, start: float | None, salt: str) -> Chart:
    """Draw each arm's final KID over what it cost; arms without privacy stand apart on the right.

    Args:
        arms: The arms.
        xlabel: What the horizontal axis counts.
        floor: KID between halves of the reference, drawn as a band.
        start: KID of the public start that all arms share, drawn as a line.
        salt: Name that is this chart's alone on the page.
    """
    finite = [x for a in arms for x in (a.x, *(t[0] for t in a.trail)) if x is not None]
    reach = max(finite, default=1.0) or 1.0
    aside = [a for a in arms if a.x is None]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        prepare(axes, xlabel, rounds=False)
        end = 1.12 * reach
        # Arms without DP share one place; a small shift keeps their intervals apart.
        places = {a.label: end + reach * (0.16 + 0.12 * i) for i, a in enumerate(aside)}
        right = end + reach * (0.2 + 0.12 * len(aside)) if aside else end
        if floor is not None and floor > 0:
            axes.axhspan(0, floor, color=FLOOR, alpha=0.16, linewidth=0)
            axes.axhline(floor, color=FLOOR, linewidth=1.2)
        if start is not None:
            axes.axhline(start, color=MUTED, linewidth=1.1, linestyle=(0, (5, 3)))
        for i, arm in enumerate(arms):
            colour = SERIES[i % len(SERIES)]
            x = places[arm.label] if arm.x is None else arm.x
            if arm.trail:
                axes.plot(
                    *zip(*arm.trail, strict=True),
                    color=colour,
                    linewidth=1,
                    alpha=0.5,
                    marker=".",
                    markersize=3,
                )
            if arm.low is not None and arm.high is not None:
                axes.plot([x, x], [arm.low, arm.high], color=colour, linewidth=1.4, solid_capstyle="butt")
            axes.plot(
                [x], [arm.y], color=colour, marker=MARKERS[i % len(SHAPES)], markersize=7, linestyle="none"
            )
        ticks = [t for t in MaxNLocator(4).tick_values(0, reach) if 0 <= t <= end]
        words = [f"{t:g}" for t in ticks]
        if aside:
            axes.axvline(end, color=LINE, linewidth=1, linestyle=(0, (2, 2)))
            ticks.append((end + right) / 2)
            words.append("no DP")
        axes.set_xticks(ticks, words)
        axes.set_xlim(0, right)
        heights = [
            v for a in arms for v in (a.y, a.low, a.high, start, *(t[1] for t in a.trail)) if v is not None
        ]
        low, high = min(0.0, *heights), max(heights)
        axes.set_ylim(1.1 * low, high + 0.1 * (high - low) or 1)
        axes.set_ylabel("KID")

    def place(arm: Arm) -> str:
        return "without DP" if arm.x is None else f"at {number(arm.x)}"

    label = f"KID against {xlabel}: " + "; ".join(f"{a.label} {number(a.y)} {place(a)}" for a in arms)
    marks = [
        Mark(a.label, f"--c{i % len(SERIES)}", shape=SHAPES[i % len(SHAPES)]) for i, a in enumerate(arms)
    ]
    if floor is not None:
        marks.append(Mark("floor: real against real", "--floor", band=True))
    if start is not None:
        marks.append(Mark("public start", "--muted", dash="5 3"))
        label += f"; the public start {number(start)}"
    return chart(draw, label, marks, f"frontier {salt}")


def finite(value: float | None) -> bool:
    """Whether a value is there and can be drawn."""
    return value is not None and math.isfinite(value)
