"""The cost ledger before anything runs: the rows that the report later prints beside what it came to.

Operations and bytes follow from the study. Seconds, memory and joules need a speed: measured on this
machine with inputs that show nobody, or the study's own public guess (`cost.site_flops_per_s`). What
neither gives is left out; so is what depends on the number of a site's images, which is private.
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
from polyclinic.common.study import Study
from polyclinic.common.wire_reading import DOWN
from polyclinic.server.cost_record import nominal
from polyclinic.server.report.costs import NAMES, SERVER, CostEntry, entry, figure, measured_entry
from polyclinic.server.report.metrics import Part
from polyclinic.server.report.wording import quantity

SPEED = "speed.json"
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
        device: Where it was measured.
        threads: CPU threads it was given.
    """

    view: dict[str, Any]
    step: dict[str, Any]
    forward: dict[str, Any]
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

    one = _time(lambda: learn(1), device)
    patients = max(1, min(privacy.micro_batch, 16, int(_LONG_ENOUGH_S / max(one.wall_s, 1e-3))))
    return Speed(
        view=_each(_time(lambda: learn(patients), device), patients * privacy.views).to_json(),
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
    return Speed.model_validate_json(path.read_bytes()) if path.exists() else None


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
        traffic: Bytes down and up of a site over the whole study.
        drawing: Evaluations, and operations of one.
        disk: Bytes of checkpoints at the server.
        speed: This machine's, where the sites are simulated on it.
    """
    rows, walls = [], {}
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
            **nominal(flops, study.cost.site_flops_per_s, study.cost.site_watts),
        )
        if speed is not None and flops is not None:
            work = in_sequence(
                (_times(speed.view, flops / view_flops), _times(speed.step, study.total_steps))
            )
            walls[site] = work.wall_s
            row = row.model_copy(update={"figures": {**row.figures, **_guessed("train", site, work).figures}})
        rows.append(row)
    for site, wall in walls.items():
        rows.append(entry("wait", site, wall_s=figure(max(walls.values()) - wall, "estimated")))
    times, flops_each = drawing
    draw = entry("sample", SERVER, flops=figure(times * flops_each, "counted"))
    if speed is not None:
        passes = 2 if study.evaluation.guidance > 1 else 1
        count = times * study.evaluation.images * study.evaluation.steps * passes
        work = _times(speed.forward, count)
        draw = draw.model_copy(
            update={"figures": {**draw.figures, **_guessed("sample", SERVER, work).figures}}
        )
    return [*rows, draw, entry("combine", SERVER, disk_bytes=figure(disk, "estimated"))]


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
