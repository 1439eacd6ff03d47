"""The cost ledger's rows: what each phase cost at each place in each round, each figure with its source.

A real site's time, memory and energy stay in its own report (PRIVACY.md, rule 12). Here it appears with
nominal figures alone: operations of the expected batch, the bytes the server counted, and seconds and
joules that the study's own public guesses make of them. A simulation shows what its sites measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Source = Literal["measured", "sampled", "counted", "estimated"]
# In the order in which a study goes through them.
Phase = Literal["pretrain", "cache", "train", "wait", "combine", "sample", "evaluate"]
Quantity = Literal[
    "wall_s",
    "cpu_s",
    "gpu_s",
    "peak_bytes",
    "gpu_peak_bytes",
    "flops",
    "energy_j",
    "down_bytes",
    "up_bytes",
    "disk_bytes",
]
SERVER = "server"

# Quantity to its name and unit.
NAMES: dict[Quantity, tuple[str, str]] = {
    "wall_s": ("wall time", "s"),
    "cpu_s": ("CPU time", "s"),
    "gpu_s": ("GPU time", "s"),
    "peak_bytes": ("peak memory", "B"),
    "gpu_peak_bytes": ("GPU peak memory", "B"),
    "flops": ("FLOPs", "FLOP"),
    "energy_j": ("energy", "J"),
    "down_bytes": ("bytes down", "B"),
    "up_bytes": ("bytes up", "B"),
    "disk_bytes": ("disk", "B"),
}
# Wall times overlap between sites and memory peaks do not coincide: neither may be added up over places.
ADDITIVE: tuple[Quantity, ...] = (
    "cpu_s",
    "gpu_s",
    "flops",
    "energy_j",
    "down_bytes",
    "up_bytes",
    "disk_bytes",
)
PEAKS: tuple[Quantity, ...] = ("peak_bytes", "gpu_peak_bytes")
# Judging is the same for every generator, so it would only blur a comparison of what learning took.
LEARNING: tuple[Phase, ...] = ("pretrain", "cache", "train", "combine")


class Part(BaseModel):
    """Base of every model here: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Figure(Part):
    """One number with how it was obtained."""

    value: float = Field(ge=0, allow_inf_nan=False)
    source: Source


class CostEntry(Part):
    """What one phase cost at one place. Entries are disjoint, so none may be a total of others.

    Attributes:
        phase: What was done.
        where: Site, "server", or "each site" in a forecast for sites that nobody knows yet.
        round: Round it was done for; None where it belongs to the study as a whole.
        figures: Quantity to its figure, in s, B, FLOP or J as the name says; absent where unknown.
        dropped: It was done for a reply that entered no round.
    """

    phase: Phase
    where: str
    round: int | None = None
    figures: dict[Quantity, Figure] = {}
    dropped: bool = False


class Total(Part):
    """A quantity added up over the whole run; `source` is the weakest of its parts'."""

    quantity: Quantity
    value: float
    source: Source


class Straggler(Part):
    """A site that others waited for.

    Attributes:
        site: Its name.
        slowest: Rounds in which it took longest.
        held_s: Seconds by which it was slower than the next in those rounds, together.
        absent: Rounds that ended without it.
    """

    site: str
    slowest: int = 0
    held_s: float | None = None
    absent: int = 0


class Waste(Part):
    """Work that entered no round.

    Attributes:
        what: What was wasted, in words.
        times: How often.
        flops: Operations; an upper bound for absent sites, since nobody knows whether they trained.
        compute_s: GPU seconds, else CPU seconds, where they were measured.
        up_bytes: Bytes received for nothing.
    """

    what: str
    times: int
    flops: float | None = None
    compute_s: float | None = None
    up_bytes: float | None = None


class Target(Part):
    """What it took until KID was at or below a level, judging apart.

    KID is known at judged rounds only: it was first seen at or below the level at `round`, and above it at
    `before`, so the price lies in (`value_before`, `value`]. Nothing is interpolated.

    Attributes:
        kid: The level.
        origin: Who chose it.
        quantity: What the price counts: GPU time, else CPU time, else FLOPs.
        round: First judged round at or below it; None where none was.
        value: Price up to that round; None where the level was not reached.
        before: The judged round before it.
        value_before: Price up to that one.
        best: Lowest KID of all judged rounds.
    """

    kid: float
    origin: Literal["study", "twice the floor"]
    quantity: Quantity
    round: int | None = None
    value: float | None = None
    before: int | None = None
    value_before: float | None = None
    best: float


class CostSummary(Part):
    """What a run cost in all.

    Attributes:
        site_figures: "measured" in a simulation; "nominal", from public quantities alone, otherwise.
        totals: Every quantity that adds up.
        co2_g: Grams of CO2 equivalent of the energy in `totals`; None where the grid's intensity is unknown.
        co2_covers: Whose energy that is.
        grid_source: Where the intensity stands.
        money: In `currency`, of what has a price; None where nothing has.
        money_covers: What has a price and is in `money`.
        currency: Of `money`.
        critical_path_s: Wall time of the rounds if every site works on a machine of its own.
        judging_s: Wall time of drawing and measuring.
        clock_s: What the clock showed for the whole run; sites of a simulation share one machine. None of a
            forecast.
        stragglers: Sites that others waited for, worst first.
        waste: Work that entered no round.
        target: What a level of KID took.
    """

    site_figures: Literal["measured", "nominal"]
    totals: list[Total]
    co2_g: float | None = None
    co2_covers: str = ""
    grid_source: str = ""
    money: float | None = None
    money_covers: list[str] = []
    currency: str = ""
    critical_path_s: float | None = Field(default=None, ge=0)
    judging_s: float | None = None
    clock_s: float | None = Field(default=None, ge=0)
    stragglers: list[Straggler] = []
    waste: list[Waste] = []
    target: Target | None = None


def figure(value: float | None, source: Source) -> Figure | None:
    """Make a figure; None of an unknown value."""
    return None if value is None else Figure(value=value, source=source)


def entry(
    phase: Phase, where: str, number: int | None = None, *, dropped: bool = False, **found: Figure | None
) -> CostEntry:
    """Make an entry of the figures that are known."""
    return CostEntry(
        phase=phase,
        where=where,
        round=number,
        figures={name: value for name, value in found.items() if value is not None},  # type: ignore[misc]
        dropped=dropped,
    )


def measured_entry(phase: Phase, where: str, line: dict[str, Any], *, dropped: bool = False) -> CostEntry:
    """Make an entry of a line that `append_cost` wrote."""
    energy: Source = "estimated" if "estimated" in str(line.get("energy_source")) else "measured"
    return entry(
        phase,
        where,
        line.get("round"),
        dropped=dropped,
        wall_s=figure(line.get("wall_s"), "measured"),
        cpu_s=figure(line.get("cpu_s"), "measured"),
        gpu_s=figure(line.get("gpu_s"), "measured"),
        peak_bytes=figure(line.get("peak_bytes"), "measured"),
        gpu_peak_bytes=figure(line.get("gpu_peak_bytes"), "measured"),
        # A view's operations are counted, but how many patients a step drew is only expected.
        flops=figure(line.get("flops"), "estimated"),
        energy_j=figure(line.get("energy_j"), energy),
    )


def total(
    entries: Iterable[CostEntry], quantity: Quantity, phases: Sequence[Phase] | None = None
) -> float | None:
    """Add up one additive quantity.

    Args:
        entries: Disjoint entries.
        quantity: One of `ADDITIVE`.
        phases: Only these phases; None is all of them.

    Returns:
        The sum in the quantity's unit, or None where no entry states it.
    """
    if quantity not in ADDITIVE:
        raise ValueError(f"{NAMES[quantity][0]} does not add up over sites")
    chosen = [e.figures for e in entries if phases is None or e.phase in phases]
    values = [figures[quantity].value for figures in chosen if quantity in figures]
    return sum(values) if values else None


def merged(entries: Iterable[CostEntry]) -> dict[Quantity, Figure]:
    """Put entries of one phase and place together: everything adds but the peaks, whose larger counts.

    A sum's source is the weakest of its parts': estimated, then sampled, then measured, then counted.
    """
    entries = list(entries)
    found: dict[Quantity, Figure] = {}
    for name in NAMES:
        parts = [e.figures[name] for e in entries if name in e.figures]
        if parts:
            values = [part.value for part in parts]
            found[name] = Figure(
                value=max(values) if name in PEAKS else sum(values),
                source=weakest([part.source for part in parts]),
            )
    return found


def weakest(sources: Iterable[Source]) -> Source:
    """The least certain of several sources."""
    order: tuple[Source, ...] = ("estimated", "sampled", "measured", "counted")
    found = set(sources)
    return next(source for source in order if source in found)
