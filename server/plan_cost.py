"""The cost ledger before anything runs: the rows that the report later prints beside what it came to.

Operations and bytes follow from the study. Seconds, memory and joules need a speed: measured on this
machine with inputs that show nobody, or the study's own public guess (`cost.site_flops_per_s`). What
neither gives is left out. The number of a site's images is private, so its cache is taken as one image and
one caption a declared patient; that of the reference's is not in a study, so `NOTES` says what is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyclinic.common.adapters import trained
from polyclinic.common.cost import Measurement, Meter, in_sequence
from polyclinic.common.device import pick_device
from polyclinic.common.files import write_json_atomic
from polyclinic.common.generators.base import BaseFiles, Family, Tensors, Views, load_family, trainable
from polyclinic.common.privacy.clipping import ENGINES
from polyclinic.common.privacy.random import KeyedRandom, StepNoise
from polyclinic.common.rounding import rows_of
from polyclinic.common.settings import Transport
from polyclinic.common.stored import read_stored
from polyclinic.common.study import Study
from polyclinic.common.wire_reading import DOWN
from polyclinic.server.cost_record import nominal
from polyclinic.server.plan_phases import Phases, works
from polyclinic.server.report.costs import (
    NAMES,
    SERVER,
    CostEntry,
    CostSummary,
    Figure,
    entry,
    figure,
    measured_entry,
)
from polyclinic.server.report.metrics import Part
from polyclinic.server.report.view_cost import total_lines
from polyclinic.server.report.wording import quantity

SPEED = "speed.json"
NOTES = (
    "Forecast of a cache: one image and one caption a declared patient; how many a site has is its secret.",
    "Not forecast: what grows with the public reference: encoding it, its features, judging's statistics.",
)
_BYTES: dict[Transport, int] = {"fp32": 4, "bf16": 2, "int8": 1}
# A tensor's entry in a file's header and its hash beside it, but for its name, which stands in both.
_BESIDE_A_TENSOR = 140
_SHOWN = 8  # images in the forward pass that is timed
_LONG_ENOUGH_S = 1.0  # a large network is timed on fewer patients


class Speed(Part):
    """How fast this machine is, by lines as `append_cost` writes them.

    Attributes:
        view: Forward and backward of one view of a private step (of a plain one, without privacy).
        step: What a step takes beside its views: the noise.
        forward: One forward pass of one image.
        autoencoder: One image in a training step of the public autoencoder; None where none is trained.
        start: One image in a training step of the public warm start; None where none is trained.
        encode: One image and one caption encoded for a cache; None where that is not known.
        extract: Features of one image by every extractor; None where one is not on this machine.
        device: Where it was measured.
        threads: CPU threads it was given.
    """

    view: dict[str, Any]
    step: dict[str, Any]
    forward: dict[str, Any]
    autoencoder: dict[str, Any] | None = None
    start: dict[str, Any] | None = None
    encode: dict[str, Any] | None = None
    extract: dict[str, Any] | None = None
    device: str
    threads: int


def measure_speed(study: Study, files: BaseFiles) -> Speed:
    """Time the study's network on this machine, with inputs that show nobody.

    Args:
        study: The study.
        files: Its base; without an autoencoder before that is trained. MSDM's weights are random here.
    """
    device, privacy = pick_device(study.training.device), study.privacy
    torch.set_num_threads(study.training.threads or torch.get_num_threads())
    family = load_family(study, files, device=device, encoders=False, quantized=True)

    def learn(count: int) -> None:
        views = family.synthetic_views(count * privacy.views)
        if not privacy.enabled:
            family.view_losses(views).mean().backward()
            family.module.zero_grad()
            return
        shaped = {name: t.unflatten(0, (count, privacy.views)) for name, t in views.tensors().items()}
        ENGINES[privacy.engine](family, Views.of(shaped), privacy.clip, privacy.micro_batch)

    def show() -> None:
        with torch.no_grad():
            family.view_losses(family.synthetic_views(_SHOWN))

    beside = works(study, files, device)
    return Speed(
        view=_each(_time_each(learn, min(privacy.micro_batch, 16), device), privacy.views).to_json(),
        **{name: _time_each(run, _SHOWN, device).to_json() for name, run in beside.items()},
        step=_time(lambda: _noise(family, study), device).to_json(),
        forward=_each(_time(show, device), _SHOWN).to_json(),
        device=device,
        threads=torch.get_num_threads() if device == "cpu" else os.cpu_count() or 1,
    )


def keep_speed(run_dir: Path, study: Study, files: BaseFiles) -> None:
    """Measure this machine before a run's first round, once, for the forecast in its report."""
    if not (run_dir / SPEED).exists():
        write_json_atomic(run_dir / SPEED, measure_speed(study, files).model_dump(mode="json"))


def kept_speed(run_dir: Path) -> Speed | None:
    """What `keep_speed` measured, if it did."""
    path = run_dir / SPEED
    fix = "remove that file: the forecast then has no seconds"
    return read_stored(path, Speed, fix) if path.exists() else None


def travel_bytes(state: Tensors, study: Study, number: int = 1) -> tuple[int, int]:
    """Bytes of a state on the way down and of a difference on the way up, in the study's transport.

    Args:
        state: The trainable state; its shapes are enough, so it may be on the meta device.
        study: Names the transport, the audit tap, and which adapters a round trains.
        number: Of the round.
    """
    transport = study.federation.transport
    moved = trained(state, study.federation.lora_aggregation, number)
    down = _payload(state, DOWN[transport])
    up = _payload(moved, transport)
    if transport == "int8":
        up += sum(4 * rows_of(tensor) + _BESIDE_A_TENSOR + 2 * len(name) for name, tensor in moved.items())
    return down, up + (4 * study.privacy.canaries if study.privacy.enabled else 0)


def _payload(tensors: Tensors, transport: Transport) -> int:
    return sum(
        tensor.numel() * _BYTES[transport] + _BESIDE_A_TENSOR + 2 * len(name)
        for name, tensor in tensors.items()
    )


def evaluation_flops(study: Study, forward: int) -> float:
    """Operations of the denoising network in one evaluation; guidance takes two passes a step."""
    passes = 2 if study.evaluation.guidance > 1 else 1
    return float(forward) * passes * study.evaluation.steps * study.evaluation.images


def forecast(
    study: Study,
    declared: Mapping[str, int | None],
    *,
    patient_flops: float,
    view_flops: float,
    phases: Phases,
    traffic: tuple[int, int],
    drawing: tuple[int, float],
    disk: int,
    speed: Speed | None = None,
) -> list[CostEntry]:
    """Write the cost ledger before anything runs; rows of a phase and place over the whole study.

    Args:
        study: The study.
        declared: Site to its declared patients; None where it has not said yet.
        patient_flops: Operations of the whole study for each declared patient.
        view_flops: Operations of one view, forward and backward.
        phases: Operations of what surrounds training.
        traffic: Bytes down and up of a site over the whole study.
        drawing: Evaluations, and operations of one.
        disk: Bytes of checkpoints at the server.
        speed: This machine's, where the sites are simulated on it.
    """
    rows = _pretraining(study, phases, speed)
    for site, patients in declared.items():
        if patients is not None and phases.encode is not None:
            rows.append(_encoding(study, site, patients, phases.encode, speed))
    walls: dict[str, float] = {}
    for site, patients in declared.items():
        flops = None if patients is None else patient_flops * patients
        row = entry(
            "train",
            site,
            None,
            dropped=False,
            # A view's operations are counted, but how many patients a step draws is only expected.
            flops=figure(flops, "estimated"),
            down_bytes=figure(traffic[0], "counted"),
            up_bytes=figure(traffic[1], "counted"),
            **(nominal(flops, study.cost) if speed is None else {}),
        )
        if speed is not None and flops is not None:
            work = in_sequence(
                (_times(speed.view, flops / view_flops), _times(speed.step, study.total_steps))
            )
            row = _with(row, work)
        if "wall_s" in row.figures:
            walls[site] = row.figures["wall_s"].value
        rows.append(row)
    for site, wall in walls.items():
        rows.append(entry("wait", site, wall_s=figure(max(walls.values()) - wall, "estimated")))
    times, flops_each = drawing
    images = times * study.evaluation.images
    draw = entry("sample", SERVER, flops=figure(times * flops_each, "counted"))
    if speed is not None:
        passes = 2 if study.evaluation.guidance > 1 else 1
        draw = _with(draw, _times(speed.forward, images * study.evaluation.steps * passes))
    combine = entry("combine", SERVER, disk_bytes=figure(disk, "estimated"))
    judge = entry("evaluate", SERVER, flops=_scaled(phases.extract, images))
    if speed is not None and speed.extract is not None:
        judge = _with(judge, _times(speed.extract, images))
    return [*rows, combine, draw, *([judge] if judge.figures else [])]


def _pretraining(study: Study, phases: Phases, speed: Speed | None) -> list[CostEntry]:
    """Row of what the coordinator trains on public images; none where it trains nothing."""
    if phases.pretrain is None:
        return []
    row = entry("pretrain", SERVER, flops=figure(phases.pretrain, "estimated"))
    if speed is None:
        return [row]
    recipe = study.generator.warm_start_training
    works = []
    if phases.autoencoder and phases.autoencoder_image and speed.autoencoder is not None:
        works.append(_times(speed.autoencoder, phases.autoencoder / phases.autoencoder_image))
    if phases.start and speed.start is not None:
        works.append(_times(speed.start, recipe.steps * recipe.batch_size))
    parts = sum(part is not None for part in (phases.autoencoder, phases.start))
    return [_with(row, in_sequence(works)) if len(works) == parts else row]


def _encoding(study: Study, site: str, patients: int, flops: float, speed: Speed | None) -> CostEntry:
    """Row of a site's cache, at one image and one caption a declared patient."""
    expected = nominal(flops * patients, study.cost) if speed is None else {}
    row = entry("cache", site, None, dropped=False, flops=_scaled(flops, patients), **expected)
    if speed is None or speed.encode is None:
        return row
    return _with(row, _times(speed.encode, patients))


def _scaled(each: float | None, count: int) -> Figure | None:
    return None if each is None else figure(each * count, "estimated")


def _with(row: CostEntry, work: Measurement) -> CostEntry:
    """A row with what the work would take."""
    return row.model_copy(update={"figures": {**row.figures, **_guessed(row.phase, row.where, work).figures}})


def ledger_lines(rows: Iterable[CostEntry]) -> list[str]:
    """Write rows for the terminal, one a line, each figure with its source."""
    return [
        f"{row.phase} at {row.where}: "
        + ", ".join(
            f"{NAMES[name][0]} {quantity(found.value, NAMES[name][1])} ({found.source})"
            for name, found in row.figures.items()
        )
        for row in rows
        if row.figures
    ]


def forecast_words(summary: CostSummary | None) -> list[str]:
    """What a forecast comes to, and what it leaves out, one line each."""
    if summary is None:
        return []
    lines = [f"in all, {name}: {value} ({source})" for name, value, source, _ in total_lines(summary)]
    known = {t.quantity for t in summary.totals}
    if "energy_j" not in known:
        lines.append(
            "in all, energy and CO2: unknown; `--measure` times this machine, or state cost.site_flops_per_s "
            "and cost.site_watts"
        )
    if summary.money is None:
        lines.append("in all, money: unknown; state what is forecast a price in [cost], e.g. cost.price_gb")
    return [*lines, *NOTES]


def _guessed(phase: Any, where: str, work: Measurement) -> CostEntry:
    """A measurement of another piece of work, scaled: every figure of it is an estimate."""
    row = measured_entry(phase, where, work.to_json())
    return row.model_copy(
        update={
            "figures": {
                name: found.model_copy(update={"source": "estimated"}) for name, found in row.figures.items()
            }
        }
    )


def _time(run: Callable[[], object], device: str) -> Measurement:
    run()  # the first time, kernels and caches are made
    with Meter(device) as meter:
        run()
    return meter.measurement


def _time_each(run: Callable[[int], object], most: int, device: str) -> Measurement:
    """Time one of at most so many that are done together, in about a second."""
    one = _time(lambda: run(1), device)
    count = max(1, min(most, int(_LONG_ENOUGH_S / max(one.wall_s, 1e-3))))
    return one if count == 1 else _each(_time(lambda: run(count), device), count)


def _each(work: Measurement, count: int) -> Measurement:
    return _times(work.to_json(), 1 / count)


def _times(line: dict[str, Any], factor: float) -> Measurement:
    """So many times a piece of work; peaks stay."""
    work = Measurement.from_json(line)
    return replace(
        work,
        wall_s=work.wall_s * factor,
        cpu_s=work.cpu_s * factor,
        gpu_s=None if work.gpu_s is None else work.gpu_s * factor,
        energy_j=work.energy_j * factor,
    )


def _noise(family: Family, study: Study) -> None:
    """Make one step's noise as a site would; nothing where the study adds none."""
    if not study.privacy.enabled:
        return
    shapes = {name: parameter.shape for name, parameter in trainable(family.module).items()}
    noise = StepNoise(KeyedRandom.from_os(), 0, shapes)
    for name, shape in shapes.items():
        noise(name, shape, 1.0)
