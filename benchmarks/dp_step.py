"""What per-patient clipping costs: a step of every engine beside the plain step, interleaved in one process.

    python benchmarks/dp_step.py                           the table of README.md; a quarter of an hour
    python benchmarks/dp_step.py --case msdm-tiny --views 4

A step is forward, backward and clipping of the same patients; noise and the optimizer are left out, and the
noise is timed apart. Wall and CPU time are medians over rounds in which each engine takes a turn. Peak
memory is the growth of the resident set over a step in a forked child, from where all others start.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.generators.base import Views, trainable
from polyclinic.common.generators.msdm import Msdm, train_only
from polyclinic.common.privacy.clipping import ENGINES
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.refusals import Refusal

CASES = {
    "msdm-tiny": ("msdm-tiny", "all"),
    "msdm-small": ("msdm-small", "all"),
    "msdm-small LoRA": ("msdm-small", "lora"),
    "msdm-tiny conditioning": ("msdm-tiny", "conditioning"),
}
CLIP = 0.05
Step = Callable[[], object]


def build(case: str, latent: int) -> Msdm:
    """Build a generator with random weights, without VAE and text encoder."""
    size, part = CASES[case]
    settings = GeneratorSettings.model_validate({"size": size, "max_tokens": 16})
    family = Msdm(settings, 8 * latent, None, encoders=False)
    generator = torch.Generator().manual_seed(0)
    if part == "lora":
        from peft import LoraConfig

        family.module.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        family.module.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets))
    else:
        train_only(family.module, part)
    with torch.no_grad():
        for parameter in family.module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return family


def draw(family: Msdm, patients: int, views: int) -> Views:
    """Draw views `[B, K, ...]` that show nobody."""
    generator = torch.Generator().manual_seed(1)
    flat = family.synthetic_views(patients * views).tensors()
    made = {n: t * torch.randn(t.shape, generator=generator) for n, t in flat.items() if n != "uniform"}
    made["uniform"] = torch.rand(patients * views, generator=generator)
    return Views.of({n: t.reshape(patients, views, *t.shape[1:]) for n, t in made.items()})


def steps_of(family: Msdm, views: Views) -> dict[str, Step]:
    """Return every engine's step; Opacus reads permuted inputs wrongly, so its convolutions get copies."""
    patients = len(views.uniform)
    flat = Views.of({n: t.flatten(0, 1) for n, t in views.tensors().items()})

    def plain() -> object:
        return torch.autograd.grad(family.view_losses(flat).mean(), list(trainable(family.module).values()))

    def opacus(engine: str) -> object:
        def contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.contiguous() for t in inputs)

        convolutions = [m for m in family.module.modules() if isinstance(m, nn.Conv2d)]
        handles = [m.register_forward_pre_hook(contiguous) for m in convolutions]
        try:
            return ENGINES[engine](family, views, CLIP, patients)
        finally:
            for handle in handles:
                handle.remove()

    ours: dict[str, Step] = {
        name: lambda name=name: ENGINES[name](family, views, CLIP, patients)  # type: ignore[misc]
        for name in ("bookkeeping", "vmap", "loop")
    }
    return {"plain": plain} | ours | {n: lambda n=n: opacus(n) for n in ("hooks", "ghost")}  # type: ignore[misc]


def status(field: str) -> int:
    """Read a size from the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_growth(step: Step) -> int:
    """Return by how many bytes one step raises the resident set of a child that does nothing else."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        step()  # what is allocated once and for all
        ctypes.CDLL(None).malloc_trim(0)  # or the second step would live on what the first gave back
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS:")
        step()
        os.write(writer, struct.pack("q", status("VmHWM:") - before))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        sent = pipe.read()
    os.waitpid(child, 0)
    return int(struct.unpack("q", sent)[0])


def able(step: Step) -> bool:
    """Say whether an engine takes this step at all."""
    try:
        step()
    except Refusal as refusal:
        print(f"  refused: {refusal.detail}")
        return False
    return True


def measure(case: str, patients: int, views: int, latent: int, rounds: int, threads: int) -> list[str]:
    """Measure one row of the table for every engine."""
    torch.set_num_threads(1)  # a child may not fork from a pool of threads
    family = build(case, latent)
    some = draw(family, patients, views)
    steps = {name: step for name, step in steps_of(family, some).items() if able(step)}
    memory = {name: peak_growth(step) for name, step in steps.items()}
    torch.set_num_threads(threads)
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start, busy = time.perf_counter(), time.process_time()
            step()
            if turn:  # the first warms up
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - busy)
    rows = []
    for name in steps:
        ratio = {
            kind: statistics.median(times[name]) / statistics.median(times["plain"])
            for kind, times in (("wall", wall), ("cpu", cpu))
        }
        milliseconds = 1e3 * statistics.median(cpu[name])
        rows.append(
            f"| {case} | {views} | {name} | {milliseconds:.0f} | {ratio['cpu']:.2f} | {ratio['wall']:.2f} "
            f"| {memory[name] / 2**20:.0f} | {memory[name] / memory['plain']:.2f} |"
        )
        print(rows[-1], flush=True)
    random, shapes = KeyedRandom(b"b" * 32), {n: p.shape for n, p in trainable(family.module).items()}
    start = time.process_time()
    for name, shape in shapes.items():
        random.stream("noise", 0, name).protective_normal(shape, 1.0)
    count = sum(shape.numel() for shape in shapes.values())
    print(
        f"  noise of {count / 1e6:.2f} M parameters, apart: {1e3 * (time.process_time() - start):.0f} ms CPU"
    )
    return rows


def main() -> None:
    """Measure what was asked for and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--views", type=int, action="append", help="K; default: 1 and 4")
    parser.add_argument("--patients", type=int, default=8, help="B, all in one micro-batch")
    parser.add_argument("--latent", type=int, default=8, help="latent pixels a side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus's, on first layers
    print(f"torch {torch.__version__}, {asked.threads} thread(s), {asked.patients} patients, ", end="")
    print(f"{asked.latent} x {asked.latent} latents, median of {asked.rounds}")
    rows = []
    for case in asked.case or CASES:
        for views in asked.views or (1, 4):
            rows += measure(case, asked.patients, views, asked.latent, asked.rounds, asked.threads)
    print("\n| generator | K | engine | CPU ms | CPU / plain | wall / plain | peak MiB | peak / plain |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
