"""What a run's folder says the run cost, as rows of the cost ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, NonNegativeFloat, RootModel, ValidationError, model_validator

from polyclinic.common.cost import read_costs
from polyclinic.common.cost_settings import CostSettings
from polyclinic.common.refusals import BadInput
from polyclinic.common.stored import read_stored
from polyclinic.common.study import Resolved, explain
from polyclinic.server.checkpoints import RoundRecord
from polyclinic.server.report.costs import SERVER, CostEntry, Figure, entry, figure, measured_entry
from polyclinic.server.run_folder import BASE_COSTS, SITES, is_simulated

ONCE = ("pretrain", "cache")  # phases of no round
WITHOUT_BASE = "remove that file: the report then leaves out what training the base cost"


class CostLine(BaseModel):
    """A line as `append_cost` writes it; further fields are let pass.

    Attributes:
        phase: What was done.
        wall_s: Seconds on the clock.
        cpu_s: Seconds of CPU time.
        gpu_s: Seconds of a GPU; None where none was used.
        peak_bytes: Highest memory.
        gpu_peak_bytes: Highest memory of the GPU; None where none was used.
        energy_j: Joules.
        energy_source: How they were found.
        flops: Operations; None where they were not counted.
        round: Of the study; None for what was done once.
    """

    model_config = {"allow_inf_nan": False}

    phase: str
    wall_s: NonNegativeFloat
    cpu_s: NonNegativeFloat
    gpu_s: NonNegativeFloat | None = None
    peak_bytes: NonNegativeFloat
    gpu_peak_bytes: NonNegativeFloat | None = None
    energy_j: NonNegativeFloat
    energy_source: str
    flops: NonNegativeFloat | None = None
    round: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _belongs_to_a_round(self) -> CostLine:
        if self.round is None and self.phase not in ONCE:
            raise ValueError(f"a line of {self.phase} has no `round`")
        return self


def cost_lines(path: Path) -> list[dict[str, Any]]:
    """Read a cost record whose every line has what a report needs.

    Args:
        path: File of `append_cost`; an absent one gives no lines.

    Raises:
        BadInput: Names the file, the line, the field and the fix.
    """
    lines = read_costs(path)
    for number, line in enumerate(lines, start=1):
        try:
            CostLine.model_validate(line)
        except ValidationError as error:
            words = f"{path}, line {number}: {explain(error)}"
            raise BadInput(f"{words}; restore the file or remove the line") from error
    return lines


def gather(
    run_dir: Path, resolved: Resolved, records: Sequence[RoundRecord], evaluation_flops: float
) -> list[CostEntry]:
    """Gather every row.

    Args:
        run_dir: The run.
        resolved: Its study.
        records: Rounds done so far.
        evaluation_flops: Operations of the denoising network in one evaluation.
    """
    rows = list(_server(run_dir, records, evaluation_flops))
    sites = _simulated_sites(run_dir, records) if is_simulated(run_dir) else _nominal_sites(resolved, records)
    return [*rows, *sites]


def _server(run_dir: Path, records: Sequence[RoundRecord], evaluation_flops: float) -> Iterator[CostEntry]:
    """What the server measured of itself."""
    base = run_dir / BASE_COSTS
    kept = read_stored(base, RootModel[list[CostLine]], WITHOUT_BASE).root if base.exists() else []
    for part in kept:
        yield measured_entry("pretrain", SERVER, part.model_dump())
    done = {record.round for record in records}
    combined: dict[int, float] = {}
    for line in cost_lines(run_dir / "cost.jsonl"):
        number = int(line["round"])
        if line["phase"] == "combine":
            combined[number] = combined.get(number, 0.0) + float(line["wall_s"])
            yield measured_entry("combine", SERVER, line, dropped=number not in done)
        elif line["phase"] == "sample":
            row = measured_entry("sample", SERVER, line)
            counted = Figure(value=evaluation_flops, source="counted")
            yield row.model_copy(update={"figures": {**row.figures, "flops": counted}})
        else:
            yield measured_entry("evaluate", SERVER, line)
    for record in records:
        if record.round:
            waited = max(0.0, record.seconds - combined.get(record.round, 0.0))
            yield entry("wait", SERVER, record.round, wall_s=figure(waited, "measured"))


def _simulated_sites(run_dir: Path, records: Sequence[RoundRecord]) -> Iterator[CostEntry]:
    """What the sites of a simulation measured, with the bytes that the server counted."""
    trained: dict[int, dict[str, float]] = {}
    replied = {record.round: set(record.replied) for record in records}
    for home in sorted((run_dir / SITES).iterdir()):
        for line in cost_lines(home / "cost.jsonl"):
            if line["phase"] == "cache":
                yield measured_entry("cache", home.name, line)
                continue
            number = int(line["round"])
            dropped = home.name not in replied.get(number, set())
            yield measured_entry("train", home.name, line, dropped=dropped)
            times = trained.setdefault(number, {})
            times[home.name] = times.get(home.name, 0.0) + float(line["wall_s"])
    for number, times in sorted(trained.items()):
        for site, seconds in sorted(times.items()):
            # They took turns on one machine: what a site of its own would have waited is worked out.
            idle = max(times.values()) - seconds
            yield entry("wait", site, number, wall_s=figure(idle, "estimated"))
    for record in records:
        yield from _bytes(record)


def _nominal_sites(resolved: Resolved, records: Sequence[RoundRecord]) -> Iterator[CostEntry]:
    """What follows from public quantities: operations of the expected batch, and the bytes that moved."""
    settings = resolved.study.cost
    known: dict[str, float] = {}
    for record in records:
        known |= {site: float(facts["flops"]) for site, facts in record.replied.items()}
    for record in records:
        for site in (*record.replied, *record.rejected):
            flops = known.get(site)
            yield entry(
                "train",
                site,
                record.round,
                dropped=site in record.rejected,
                flops=figure(flops, "estimated"),
                **nominal(flops, settings),
            )
        yield from _bytes(record)


def nominal(flops: float | None, settings: CostSettings) -> dict[str, Figure | None]:
    """Seconds, GPU time and joules that public guesses at a site's speed and power make of its operations."""
    speed, watts = settings.site_flops_per_s, settings.site_watts
    seconds = None if flops is None or speed is None else flops / speed
    held = None if flops is None else settings.gpu_seconds(flops)
    joules = None if seconds is None or watts is None else seconds * watts
    found = {"wall_s": seconds, "gpu_s": held, "energy_j": joules}
    return {name: figure(value, "estimated") for name, value in found.items()}


def _bytes(record: RoundRecord) -> Iterator[CostEntry]:
    """Payload to and from each site in a round, as the server counted it."""
    for site in sorted(record.down.keys() | record.up.keys()):
        yield entry(
            "train",
            site,
            record.round,
            dropped=site not in record.replied,
            down_bytes=figure(record.down.get(site), "counted"),
            up_bytes=figure(record.up.get(site), "counted"),
        )
