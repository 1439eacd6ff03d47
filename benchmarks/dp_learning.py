"""What helps learning under DP: one factor at a time around the demo's settings, judged by what is drawn.

    python benchmarks/dp_learning.py --out table.md    the whole table; under half an hour on two idle cores
    python benchmarks/dp_learning.py --cells views clip    these factors beside the default
    python benchmarks/dp_learning.py --quick           tiny sizes and a few cells: only whether it runs

One site of public phantom patients trains by DP-SGD from the packaged start, in one process. The loss does
not rank such settings, so each cell draws the study's prompts and is judged as a round is.
NOT PRIVATE: a fixed key gives every cell the same random numbers, so that cells differ by their setting
and are compared prompt by prompt; rows that repeat the default with other keys show what chance does.
Finished cells are kept under HOME/dp-learning by a hash of settings and code: a killed run goes on there.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers.utils import logging

from polyclinic.client.approval import code_hash
from polyclinic.common.calibration import calibrate
from polyclinic.common.cli import default_home
from polyclinic.common.data.cache import Cached, build_cache, load_cache
from polyclinic.common.data.holdout import position
from polyclinic.common.data.table import patients_of
from polyclinic.common.device import pick_device
from polyclinic.common.files import canonical_json, write_atomic
from polyclinic.common.generators import base as generators
from polyclinic.common.generators.public import hash_state
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.progress import duration, say, track
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study, load_study, parse_study
from polyclinic.common.training import PrivateEngine
from polyclinic.server import checkpoints
from polyclinic.server.base import Base, prepare_base
from polyclinic.server.checkpoints import Checkpoint, RoundRecord
from polyclinic.server.evaluation import estimate, measure, probe
from polyclinic.server.evaluation.judge import Judge, read_judgement
from polyclinic.server.reference import Reference, split_reference
from polyclinic.simulation.data import make_federation

STUDY, KEY = "phantom-demo", "dp-learning"
EMA = 0.9  # decay a step of the averaged weights, kept beside every training
ROUND = 1  # a cell is a study of one round


@dataclass(frozen=True)
class Sizes:
    """How much of everything: less than the demo, to fit all cells into half an hour on two cores.

    Attributes:
        patients_per_site: Drawn for each of the study's three clinics, before the reference is held out.
        patients: Of the one site, from all three clinics.
        steps: DP-SGD steps of a default cell.
        draws: Images a prompt.
        sampling_steps: DDIM steps an image.
    """

    patients_per_site: int
    patients: int
    steps: int
    draws: int
    sampling_steps: int


FULL = Sizes(patients_per_site=500, patients=360, steps=30, draws=4, sampling_steps=25)
QUICK = Sizes(patients_per_site=160, patients=24, steps=3, draws=2, sampling_steps=3)


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        factor: What is varied; `--cells` chooses by it.
        level: To which value.
        changes: Dotted field of the study to its value.
        epsilon: Budget; infinite takes the same clipped steps without noise.
        averaged: Judge the moving average of the weights.
        seed: Of the key that all draws come from.
        trained: False judges the public start.
    """

    factor: str
    level: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    epsilon: float = 8.0
    averaged: bool = False
    seed: int = 0
    trained: bool = True


def cells(sizes: Sizes) -> list[Cell]:
    """Return all rows; the first is the default that the others are compared with."""
    rate, start = "training.learning_rate", "generator.warm_start"

    def views(count: int) -> Cell:
        changes = {"views": count, "sampling_rate": 0.6 / count, "micro_batch": 56 // count}
        of_privacy = {f"privacy.{name}": value for name, value in changes.items()}
        return Cell("views", f"K = {count}, q = {0.6 / count:g}", of_privacy)

    def batch(q: float, steps: int) -> Cell:
        changes = {"privacy.sampling_rate": q, "training.steps_per_round": steps}
        return Cell("batch", f"q = {q:g}, {steps} steps", changes)

    def layers(part: str, peak: float) -> Cell:
        return Cell("layers", f"{part}, rate {peak:g}", {"generator.train": part, rate: peak})

    return [
        Cell("default", "the demo's settings"),
        Cell("start", "no private training", trained=False),
        *(Cell("epsilon", f"ε = {epsilon:g}", epsilon=epsilon) for epsilon in (1.0, 3.0, math.inf)),
        *(Cell("repeat", f"other draws, {seed}", seed=seed) for seed in (1, 2, 3)),
        *(views(count) for count in (1, 2, 8)),
        *(Cell("rate", f"{peak:g}", {rate: peak}) for peak in (1e-3, 1.6e-2)),
        *(Cell("clip", f"C = {clip:g}", {"privacy.clip": clip}) for clip in (1e-3, 1e-1, 1.0)),
        batch(0.3, max(1, sizes.steps // 2)),
        batch(0.075, 2 * sizes.steps),
        Cell("timesteps", "timestep_shift 3", {"generator.timestep_shift": 3.0}),
        Cell("ema", f"weights averaged, {EMA:g} a step", averaged=True),
        # Adam moves each weight by about the rate: many more weights need a lower rate, too.
        layers("conditioning", 4e-3),
        *(layers("all", peak) for peak in (4e-3, 1e-3)),
        Cell("warm start", "none: all, rate 0.001",
             {"generator.train": "all", start: "none", f"{start}_sha256": None, rate: 1e-3}),
        Cell("sampler", "DDIM with eta 0", {"evaluation.eta": 0.0}),
    ]  # fmt: skip


def study_of(cell: Cell, sizes: Sizes) -> Study:
    """Change the demo's study to one site and one round of the cell's settings."""
    fixed = {
        "data.phantoms.patients_per_site": sizes.patients_per_site,
        "training.rounds": 1,
        "training.steps_per_round": sizes.steps,
        "federation.min_sites": 1,
        "evaluation.draws": sizes.draws,
        "evaluation.steps": sizes.sampling_steps,
        "simulation.split": "pooled",
        "simulation.sites": {"one-site": {"declared_patients": sizes.patients}},
    }
    if math.isfinite(cell.epsilon):
        fixed["privacy.epsilon"] = cell.epsilon
    values = load_study(STUDY).model_dump(mode="json")
    for name, value in {**fixed, **cell.changes}.items():
        *tables, last = name.split(".")
        functools.reduce(lambda table, key: table[key], tables, values)[last] = value
    return parse_study(values, f"{STUDY} with {cell.level}")


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        home: Where phantoms, latents, trainings and cells are kept.
        sizes: How much of everything.
        reference: The public images that cells are judged against.
        data: Latents and embeddings of the one site.
        code: Hash of what trains, and the versions of what judges: results of others are not reused.
    """

    home: Path
    sizes: Sizes
    reference: Reference
    data: Cached
    code: str

    def name(self, *what: object) -> str:
        """Name a thing by all it depends on."""
        return hashlib.sha256(canonical_json([*what, EMA, asdict(self.sizes), self.code])).hexdigest()[:16]


class Row(BaseModel):
    """A finished cell.

    Attributes:
        sigma: Noise in units of C; None where nothing was trained.
        seconds: Wall time of its training, drawing and judging apart.
        judgement: What its images were worth; None where it failed.
        failed: Why it could not be judged, e.g. because it diverged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigma: float | None
    seconds: float
    judgement: measure.Judgement | None
    failed: str = ""


def prepare(home: Path, sizes: Sizes) -> Bench:
    """Draw the phantoms, choose the site's patients by a keyed hash and encode them once for all cells."""
    study = study_of(Cell("default", ""), sizes)
    federation = make_federation(study, home, None)
    reference = split_reference(study, federation.reference)
    groups = patients_of(federation.sites["one-site"])
    chosen = sorted(groups, key=lambda patient: position(patient, KEY))[: sizes.patients]
    files = prepare_base(home, study, reference).files
    family = generators.load_family(study, files)
    records = [record for patient in chosen for record in groups[patient]]
    data = load_cache(home / "cache", build_cache(records, family, study.data, home / "cache"))
    return Bench(home, sizes, reference, data, f"{code_hash()} {estimate.PROTOCOL} {probe.PROTOCOL}")


def trained(cell: Cell, study: Study, base: Base, bench: Bench, sigma: float) -> Checkpoint:
    """Train a cell, or find its training: cells that differ by average or sampler share one."""
    what = [getattr(study, table).model_dump(mode="json") for table in ("generator", "privacy", "training")]
    run_dir = bench.home / "trained" / bench.name(what, sigma, cell.seed)
    if checkpoints.rounds_done(run_dir):
        return checkpoints.load_checkpoint(run_dir, ROUND)
    device = pick_device(study.training.device)
    files, random = base.files, KeyedRandom.for_test(KEY, "one-site", cell.seed)
    family = generators.load_family(study, files, device=device, encoders=False)
    generators.load_trainable_state(family.module, base.start)
    divisor = study.privacy.sampling_rate * bench.sizes.patients
    engine = PrivateEngine(family, bench.data, study, random, sigma=sigma, divisor=divisor, device=device)
    parameters = generators.trainable(family.module)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    start = time.monotonic()
    with track(f"train {cell.level}", study.total_steps) as advance:
        for step in range(study.total_steps):
            engine.step(step)
            for name, parameter in parameters.items():
                average[name].lerp_(parameter.detach(), 1 - EMA)
            advance()
    state = generators.trainable_state(family.module)
    record = RoundRecord(round=ROUND, state_hash=hash_state(state), seconds=time.monotonic() - start)
    checkpoint = Checkpoint(record, state, {name: tensor.cpu() for name, tensor in average.items()})
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoints.save_checkpoint(run_dir, checkpoint)
    return checkpoint


def cell_folder(cell: Cell, study: Study, bench: Bench) -> Path:
    """Where a cell's row, judgement and sample sheet are."""
    what = [study.model_dump(mode="json"), str(cell.epsilon), cell.averaged, cell.seed, cell.trained]
    return bench.home / "cells" / f"{cell.factor.replace(' ', '-')}-{bench.name(what)}"


def finished(cell: Cell, bench: Bench) -> Row | None:
    """Read a cell's row, if there is one."""
    path = cell_folder(cell, study_of(cell, bench.sizes), bench) / "row.json"
    return Row.model_validate(json.loads(path.read_text())) if path.exists() else None


def measure_cell(cell: Cell, bench: Bench) -> Row:
    """Train a cell, draw the prompts, judge the images and keep the row."""
    study = study_of(cell, bench.sizes)
    folder = cell_folder(cell, study, bench)
    folder.mkdir(parents=True, exist_ok=True)
    base = prepare_base(bench.home, study, bench.reference)
    sigma, seconds, weights = None, 0.0, base.start
    if cell.trained:
        privacy, sigma = study.privacy, 0.0
        if math.isfinite(cell.epsilon):
            sigma = calibrate(cell.epsilon, privacy.delta, privacy.sampling_rate, study.total_steps)
        checkpoint = trained(cell, study, base, bench, sigma)
        weights = checkpoint.average if cell.averaged else checkpoint.state
        seconds = checkpoint.record.seconds
    judge = Judge(folder, base.resolved, bench.reference, base.files, bench.home / "features")
    failed, record = "", RoundRecord(round=ROUND, state_hash=hash_state(weights))
    try:
        judge.judge(Checkpoint(record, state={}, average=weights))  # it looks at the average alone
    except BadInput as error:  # features that are not finite: it diverged
        failed = str(error)
    row = Row(sigma=sigma, seconds=seconds, judgement=read_judgement(folder, ROUND), failed=failed)
    write_atomic(folder / "row.json", row.model_dump_json(indent=1).encode())
    return row


def table(rows: list[tuple[Cell, Row]], sizes: Sizes, seconds: float) -> str:
    """Write the table as markdown, with everything a reader needs beside the numbers."""
    default = rows[0][1].judgement
    lines = [
        f"Measured {date.today()} on {machine()}; this run took {duration(seconds)}.\n",
        _settings(study_of(rows[0][0], sizes), sizes),
        "" if default is None else _measures(default),
        "| factor | level | ε | σ | faithfulness [95 %] | minus default [95 %] | KID [95 %] | train, s |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(cell, row, default) for cell, row in rows),
    ]
    return "\n".join(lines) + "\n"


def _settings(study: Study, sizes: Sizes) -> str:
    """Say what the default is and how the others differ from it."""
    privacy, training = study.privacy, study.training
    return (
        f"Default: ε = {privacy.epsilon:g} at δ = {privacy.delta:g}, K = {privacy.views}, "
        f"q = {privacy.sampling_rate:g}, C = {privacy.clip:g}, AdamW {training.learning_rate:g} with "
        f"{training.schedule} decay, {study.total_steps} steps, trains {study.generator.train} from the "
        f"label start, no average; {study.evaluation.steps} DDIM steps with eta {study.evaluation.eta:g}, "
        f"guidance {study.evaluation.guidance:g}; one site of {sizes.patients} phantom patients. Other rows "
        "change only what they name, and their noise is calibrated to their own ε over all their steps. ε "
        "is varied with the default alone, every other factor at ε = 8; ε = ∞ clips but adds no noise. K is "
        "varied at equal views a step, batch against steps at equal views in all. All rows but `repeat`, "
        "which shows what chance does, have the same draws; `ema` and `sampler` judge the default's "
        "training. One training a row: a difference within the spread of the repeats ranks nothing.\n"
    )


def _measures(judged: measure.Judgement) -> str:
    """Say what the numbers are, on how many images, and what real images score."""
    text = []
    if judged.faithfulness:
        overall, rows = judged.faithfulness.overall, judged.faithfulness.rows
        text.append(
            f"Faithfulness: balanced accuracy of a linear probe, mean over {len(rows)} concepts, "
            f"{overall.accuracy.n} images of {overall.accuracy.groups} prompts; chance {overall.chance:.2f}, "
            f"real images {_interval(overall.real)}; {overall.accuracy.interval}; differences pair by pair."
        )
    if judged.fidelity:
        kid = judged.fidelity.kid
        text.append(
            f"KID: {judged.fidelity.extractor}, grouped, {kid.n} images a side, {kid.groups} patients; "
            f"floor {'none' if kid.floor is None else f'{kid.floor:.3f}'}; {kid.interval}."
        )
    return " ".join(text) + "\n"


def _line(cell: Cell, row: Row, default: measure.Judgement | None) -> str:
    epsilon = "–" if not cell.trained else "∞" if math.isinf(cell.epsilon) else f"{cell.epsilon:g}"
    values = [cell.factor, cell.level, epsilon, "–" if row.sigma is None else f"{row.sigma:.2f}"]
    faithfulness = row.judgement and row.judgement.faithfulness
    fidelity = row.judgement and row.judgement.fidelity
    change = None
    if faithfulness and default and default.faithfulness and row.judgement is not default:
        change = probe.faithfulness_change(default.faithfulness, faithfulness)
    values.append(row.failed or _interval(faithfulness.overall.accuracy if faithfulness else None))
    values += [_interval(change, "+"), _interval(fidelity.kid if fidelity else None), f"{row.seconds:.0f}"]
    return f"| {' | '.join(values)} |"


def _interval(number: estimate.Estimate | None, sign: str = "") -> str:
    if number is None or number.low is None or number.high is None:
        return "–"
    return f"{number.value:{sign}.2f} [{number.low:{sign}.2f}, {number.high:{sign}.2f}]"


def machine() -> str:
    """Name processor, threads and torch."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{[*names, platform.machine()][0]}, {threads}, torch {torch.__version__}"


def main() -> None:
    """Measure what is missing and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    factors = list(dict.fromkeys(cell.factor for cell in cells(FULL)))
    parser.add_argument("--cells", nargs="+", choices=factors, metavar="FACTOR", help=", ".join(factors))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: numbers mean nothing")
    parser.add_argument("--home", type=Path, default=default_home(), help="where cells are (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the table there, as markdown")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(asked.threads)
    sizes = QUICK if asked.quick else FULL
    wanted = asked.cells or (["start", "ema", "clip"] if asked.quick else factors)
    chosen = [cell for cell in cells(sizes) if cell.factor in {"default", *wanted}]
    start = time.monotonic()
    bench = prepare(asked.home / KEY, sizes)
    rows = [finished(cell, bench) for cell in chosen]
    missing = [place for place, row in enumerate(rows) if row is None]
    say(f"{len(chosen) - len(missing)} of {len(chosen)} cells are there already, in {bench.home}")
    with track("cells", len(missing)) as advance:
        for place in missing:
            rows[place] = measure_cell(chosen[place], bench)
            advance(1, f"{chosen[place].factor}: {chosen[place].level}")
    done = [(cell, row) for cell, row in zip(chosen, rows, strict=True) if row is not None]
    warning = "QUICK: sizes at which these numbers mean nothing.\n\n" if asked.quick else ""
    text = warning + table(done, sizes, time.monotonic() - start)
    print(text)
    if asked.out:
        write_atomic(asked.out, text.encode())


if __name__ == "__main__":
    main()
