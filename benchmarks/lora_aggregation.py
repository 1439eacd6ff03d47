"""Ways to average adapters, side by side: how far from the exact mean, how many bytes, and what they learn.

    python benchmarks/lora_aggregation.py              the table of README.md
    python benchmarks/lora_aggregation.py --quick      tiny sizes: only whether it runs

A small Stable Diffusion is trained first on public phantoms without instruments and overlay boxes. Three
clinics then teach it the rest by adapters, with the package's own steps, noise and aggregation, by every rule
of `federation.lora_aggregation` and with sites of their own rank, with and without privacy. All ways take
their rounds in turn in one process, from the same start, with the same patients, views and noise streams.

The exact mean is that of what each site added to the weights: mean_i (B_i A_i - B A), over all layers.
NOT PRIVATE: fixed keys, so that ways differ by their rule alone; other seeds draw other A, patients, noise.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lora_phantoms import EPSILON, KEY, RANK, SITES, Judge, Sizes, load, place, prepare, study_of
from torch import Tensor

from polyclinic.common.adapters import A, B, layers, narrow, pad, trains
from polyclinic.common.calibration import calibrate
from polyclinic.common.cli import default_home
from polyclinic.common.data.cache import Cached
from polyclinic.common.files import write_atomic
from polyclinic.common.generators.base import Tensors, named, trainable_state
from polyclinic.common.generators.lora import adapter_state
from polyclinic.common.plain_engine import PlainEngine
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.progress import duration, say, track
from polyclinic.common.settings import LoraRule
from polyclinic.common.study import Study
from polyclinic.common.training import PrivateEngine, StepEngine
from polyclinic.server.aggregation import advance
from polyclinic.server.plan_cost import travel_bytes
from polyclinic.server.spool import Spooled, spool_path, write_tensors
from polyclinic.server.stacking import stack

OWN_RANKS = (2, 4, 8)


FULL = Sizes(300, 210, 300, 3, 5, 3, 4, 4, 8)
QUICK = Sizes(40, 20, 3, 2, 1, 1, 1, 1, 2)


@dataclass(frozen=True)
class Way:
    """One row of the table, once with and once without privacy.

    Attributes:
        words: What the table calls it.
        rule: `federation.lora_aggregation`.
        ranks: Of the sites, in the order of `SITES`.
    """

    words: str
    rule: LoraRule
    ranks: tuple[int, ...] = (RANK,) * len(SITES)


PLAIN = Way("factors (FedAvg of A and B)", "factors")
WAYS = (
    PLAIN,
    Way("freeze-a", "freeze-a"),
    Way("stack", "stack"),
    Way("alternate", "alternate"),
    Way("factors, ranks 2, 4, 8", "factors", OWN_RANKS),
    Way("stack, ranks 2, 4, 8", "stack", OWN_RANKS),
)


@dataclass
class Row:
    """What one way came to at one seed.

    Attributes:
        distances: Of each round's move from the exact mean, by the length of the exact mean.
        bytes_up: Of all sites, a round on average; without the hashes of a message.
        bytes_down: As `bytes_up`.
        cpu_s: Training and aggregation of all sites.
        gain: Of the held-out loss of the start, the share that training took away.
        kid: Of images drawn at the end.
    """

    distances: list[float]
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    cpu_s: float = 0.0
    gain: float = math.nan
    kid: float = math.nan


class Federation:
    """One way at one seed, with or without privacy: its state, moved on round by round.

    Attributes:
        way: The rule and the sites' ranks.
        state: All adapters, A also where it is frozen.
        row: What it came to so far.
    """

    def __init__(
        self, way: Way, study: Study, seed: int, state: Tensors, families: dict[int, Any], sigma: float
    ) -> None:
        self.way, self.study, self.seed = way, study, seed
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        self.families, self.sigma, self.row = families, sigma, Row([])

    def round(self, number: int, data: dict[str, Cached], folder: Path) -> None:
        """Train every site, aggregate, and measure the distance of the move from the exact mean."""
        start, rule, busy = self.state, self.way.rule, time.process_time()
        ends, replies = {}, {}
        sent = {n: t for n, t in start.items() if rule != "freeze-a" or not n.endswith(A)}
        for site, rank in zip(SITES, self.way.ranks, strict=True):
            own = narrow(start, rank)
            moved = self._train(number, site, own, self.families[rank], data[site])
            ends[site] = {name: tensor + moved.get(name, 0.0) for name, tensor in own.items()}
            padded = {name: pad(name, tensor, start[name]) for name, tensor in moved.items()}
            path = spool_path(folder, number, site)
            replies[site] = write_tensors(path, sorted(padded.items()), padded)
            share = 1 / self.study.training.rounds
            self.row.bytes_up += share * travel_bytes(narrow(sent, rank), self.study, number)[1]
            self.row.bytes_down += share * travel_bytes(sent, self.study, number)[0]
        after = {name: tensor.clone() for name, tensor in start.items()}
        self._combine(after, replies)
        self.row.cpu_s += time.process_time() - busy
        self.row.distances.append(self._distance(after, ends))
        self.state = after

    def _train(self, number: int, site: str, own: Tensors, family: Any, data: Cached) -> Tensors:
        place(family.module, own)
        for name, parameter in named(family.module).items():
            parameter.requires_grad_(".lora_" in name and trains(name, self.way.rule, number))
        random = KeyedRandom.for_test(f"{KEY}-{self.seed}", site, number)
        engine: StepEngine
        if self.study.privacy.enabled:
            sites = self.study.simulation.sites  # type: ignore[union-attr]
            divisor = self.study.privacy.sampling_rate * sites[site].declared_patients
            engine = PrivateEngine(
                family, data, self.study, random, sigma=self.sigma, divisor=divisor, device="cpu"
            )
        else:
            engine = PlainEngine(family, data, self.study, random, device="cpu")
        steps = self.study.training.steps_per_round
        for step in range((number - 1) * steps, number * steps):
            engine.step(step)
        return {name: tensor - own[name] for name, tensor in trainable_state(family.module).items()}

    def _combine(self, state: Tensors, replies: dict[str, Spooled]) -> None:
        settings, average = self.study.federation, {name: t.clone() for name, t in state.items()}
        if self.way.rule == "stack":
            stack(state, average, replies, dict.fromkeys(replies, 1.0), settings)
        else:
            advance(state, average, replies, settings)

    def _distance(self, after: Tensors, ends: dict[str, Tensors]) -> float:
        missed = whole = 0.0
        for layer in layers(after):
            exact = sum(
                (_product(end, layer) - _product(narrow(self.state, rank), layer)) / len(ends)
                for end, rank in zip(ends.values(), self.way.ranks, strict=True)
            )
            move = _product(after, layer) - _product(self.state, layer)
            missed += float((move - exact).square().sum())
            whole += float(torch.as_tensor(exact).square().sum())
        return math.sqrt(missed / whole)


def _product(state: Tensors, layer: str) -> Tensor:
    return state[layer + B].double().flatten(1) @ state[layer + A].double().flatten(1)


def measure(
    base: Path, data: dict[str, Cached], judge: Judge, sizes: Sizes, rate: float, ways: Sequence[Way]
) -> dict[tuple[Way, bool], list[Row]]:
    """Let all ways take their rounds in turn, for every seed, with and without privacy."""
    rows: dict[tuple[Way, bool], list[Row]] = {
        (way, private): [] for way in ways for private in (False, True)
    }
    plain = study_of(base, sizes, rate)
    sigma = calibrate(EPSILON, plain.privacy.delta, plain.privacy.sampling_rate, plain.total_steps)
    families = {rank: load(plain, rank=rank) for rank in sorted({RANK, *OWN_RANKS})}
    seeds = range(sizes.seeds)
    with track("rounds", len(rows) * len(seeds) * sizes.rounds) as bar, TemporaryDirectory() as spool:
        for seed in seeds:
            drawn = plain.generator.model_copy(update={"init_seed": seed})
            state = adapter_state(load(plain.model_copy(update={"generator": drawn})).module)
            before = judge.loss(state)
            running = [
                Federation(
                    way, study_of(base, sizes, rate, way.rule, enabled=private), seed, state, families, sigma
                )
                for way, private in rows
            ]
            for number in range(1, sizes.rounds + 1):
                for federation in running:
                    federation.round(number, data, Path(spool))
                    bar(1, f"seed {seed}, {federation.way.words}")
            for federation, found in zip(running, rows.values(), strict=True):
                federation.row.gain = 1 - judge.loss(federation.state) / before
                federation.row.kid = judge.kid(federation.state)
                found.append(federation.row)
            say(f"after {seed + 1} of {sizes.seeds} seeds:\n{table(rows)}")
    return rows


def table(rows: dict[tuple[Way, bool], list[Row]]) -> str:
    """Write the table as markdown: medians over seeds, and what lies between them."""
    lines = [
        "| way | ε | missed of the exact mean | up, kB | down, kB | CPU, by plain "
        "| loss taken away, % | by plain | KID | by plain |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (way, private), found in rows.items():
        plain = rows[PLAIN, private]
        missed = [distance for row in found for distance in row.distances]
        lines.append(
            f"| {way.words} | {f'{EPSILON:g}' if private else '–'} | {_missed(missed)} "
            f"| {_kb(found, 'bytes_up')} | {_kb(found, 'bytes_down')} | {_ratio(found, plain, 'cpu_s')} "
            f"| {_spread([100 * row.gain for row in found], 1)} | {_ratio(found, plain, 'gain')} "
            f"| {_spread([row.kid for row in found], 2)} | {_ratio(found, plain, 'kid')} |"
        )
    return "\n".join(lines) + "\n"


def _of(rows: Sequence[Row], field: str) -> list[float]:
    return [getattr(row, field) for row in rows]


def _kb(rows: Sequence[Row], field: str) -> str:
    return f"{statistics.median(_of(rows, field)) / 1e3:.0f}"


def _ratio(rows: Sequence[Row], plain: Sequence[Row], field: str) -> str:
    """Median over seeds of the ratio to plain FedAvg at the same seed."""
    pairs = zip(_of(rows, field), _of(plain, field), strict=True)
    return f"{statistics.median(one / other for one, other in pairs):.2f}"


def _missed(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return (
        "0" if middle < 1e-5 else f"{100 * middle:.1f} % [{100 * min(values):.1f}, {100 * max(values):.1f}]"
    )


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: numbers mean nothing")
    parser.add_argument("--rate", type=float, default=8e-3, help="AdamW, of all ways (%(default)s)")
    parser.add_argument("--home", type=Path, default=default_home(), help="for phantoms (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the table there, as markdown")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    sizes, home, begun = QUICK if asked.quick else FULL, asked.home / KEY, time.monotonic()
    home.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as made:
        base = Path(made) / "base"
        judge, data = prepare(base, home, sizes)
        start = adapter_state(judge.family.module)
        before = judge.loss(start), judge.kid(start)
        say(f"the base, held out: objective {before[0]:.3f}, KID {before[1]:.2f}")
        rows = measure(base, data, judge, sizes, asked.rate, WAYS)
    study = judge.family.study
    settings = (
        f"{sizes.seeds} seeds; {sizes.rounds} rounds of {sizes.steps} steps at {len(SITES)} sites, "
        f"rank {RANK}, AdamW {asked.rate:g}, q = {study.privacy.sampling_rate:g}, K = {study.privacy.views}, "
        f"C = {study.privacy.clip:g}; {len(judge.patients)} images held out"
    )
    text = (
        f"Measured {date.today()} on {_machine()}, in {duration(time.monotonic() - begun)}. {settings}. "
        f"The base has objective {before[0]:.3f} and KID {before[1]:.2f}.\n\n{table(rows)}"
    )
    print(text)
    if asked.out:
        write_atomic(asked.out, text.encode())


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{[*names, platform.machine()][0]}, {threads}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
