"""What work costs: FLOPs, seconds, memory and energy, each figure with its source.

FLOPs are those of the model's arithmetic, the same on every device, so that a forecast on the meta
device and a count on a CPU or GPU agree. Seconds, bytes and joules are measured around a block by
`Meter`; joules that no counter gives are estimated and say so.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from polyclinic.common.energy import EnergyReader
from polyclinic.common.files import naming_full_disk, sync_folder, write_fully
from polyclinic.common.generators.base import Family
from polyclinic.common.refusals import BadInput

# ---------------------------------------------------------------- FLOPs


def _matmuls(number: int, query: torch.Size, key: torch.Size) -> int:
    """Count FLOPs of so many (T x D)(D x S)-sized products.

    Args:
        number: Products.
        query: Shape (B, H, T, D).
        key: Shape (B, H or fewer, S, D); grouped keys are repeated over the query's heads.
    """
    batch, heads, tokens, width = query
    return number * 2 * batch * heads * tokens * key[-2] * width


def _attention_forward(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
    return _matmuls(2, query, key)


def _attention_backward(_: torch.Size, query: torch.Size, key: torch.Size, *__: object, **___: object) -> int:
    return _matmuls(4, query, key)


_aten = torch.ops.aten
# torch 2.13 has no formula for the CPU kernels (they count 0). For the fused GPU kernels it counts a
# fifth product in backward, the recomputed scores, which the meta device's unfused attention does not
# do; replacing it keeps one count for one model on every device.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


def view_flops(family: Family) -> int:
    """Forward and backward operations of one view, on synthetic inputs of public shapes."""
    views = family.synthetic_views(1)
    count = count_flops(lambda: family.view_losses(views).sum().backward())
    family.module.zero_grad()
    return count


def count_flops(fn: Callable[[], object]) -> int:
    """Run a function once and count the FLOPs of its convolutions, products and attention.

    A multiply-add is two FLOPs. Attention counts 4 B H T S D forward and twice that backward, masked
    or not; element-wise work is not counted, as is the custom for models. Tensors and modules on the
    meta device give the count without memory or arithmetic.

    Args:
        fn: Takes nothing; includes `backward()` where that should count.

    Returns:
        FLOPs.
    """
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        fn()
    return int(counter.get_total_flops())


# ---------------------------------------------------------------- what a block cost


def _added(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else one + other


def _larger(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)


@dataclass(frozen=True)
class Measurement:
    """What a piece of work cost.

    `a + b` is the cost of doing a and then b: everything adds but the peaks, whose larger counts.

    Attributes:
        wall_s: Seconds on the clock.
        cpu_s: Seconds of CPU time of this process, all threads together, children not included.
        gpu_s: Seconds for which a GPU was held (not: busy); None where none was used.
        peak_bytes: Highest resident memory of this process, in bytes.
        energy_j: Joules.
        energy_source: How the joules were found, in words.
        peak_source: How the peak was found; "" for no work.
        gpu_peak_bytes: Highest memory that torch held on the GPU, in bytes; None where none was used.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    gpu_s: float | None = None
    peak_bytes: int = 0
    energy_j: float = 0.0
    energy_source: str = ""
    peak_source: str = ""
    gpu_peak_bytes: int | None = None

    def __add__(self, other: Measurement) -> Measurement:
        return Measurement(
            wall_s=self.wall_s + other.wall_s,
            cpu_s=self.cpu_s + other.cpu_s,
            gpu_s=_added(self.gpu_s, other.gpu_s),
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            energy_j=self.energy_j + other.energy_j,
            energy_source=_merged(self.energy_source, other.energy_source),
            peak_source=_merged(self.peak_source, other.peak_source),
            gpu_peak_bytes=_larger(self.gpu_peak_bytes, other.gpu_peak_bytes),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> Measurement:
        """Build from a JSON object such as a row of `read_costs`; other keys are ignored."""
        return cls(**{field.name: obj[field.name] for field in fields(cls) if field.name in obj})


def _merged(one: str, other: str) -> str:
    """Name every source once, in order of appearance."""
    return "; ".join(dict.fromkeys(part for part in (*one.split("; "), *other.split("; ")) if part))


def in_sequence(parts: Iterable[Measurement]) -> Measurement:
    """Add up work done one after another; no parts cost nothing."""
    return reduce(Measurement.__add__, parts, Measurement())


def in_parallel(parts: Iterable[Measurement]) -> Measurement:
    """Add up work done at the same time on different machines: wall time is that of the slowest.

    CPU, GPU and energy add; the peaks are those of the hungriest machine.
    """
    parts = list(parts)
    total = in_sequence(parts).to_json()
    return Measurement.from_json(total | {"wall_s": max((part.wall_s for part in parts), default=0.0)})


class Meter:
    """Measure the block it wraps; `measurement` holds it once the block ends, by an error too.

    Meters may nest and overlap in several threads; each then sees the whole process.

    Args:
        device: Where the work runs; on "cuda" the block ends when the GPU's queue is empty.
    """

    _lock = threading.Lock()
    _running: list[Meter] = []  # noqa: RUF012 - one list for the process: the kernel has one high-water mark

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.measurement = Measurement()
        self._peak = 0
        self._gpu_peak: int | None = None
        self._can_reset = False

    def __enter__(self) -> Meter:
        self._synchronize()
        with Meter._lock:
            # The running meters keep what they have seen before the mark goes down for the new one.
            Meter._note_peaks()
            self._can_reset = _reset_peak()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            Meter._running.append(self)
        self._energy = EnergyReader(self.device)
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._synchronize()
        wall_s, cpu_s = time.perf_counter() - self._wall, time.process_time() - self._cpu
        energy_j, energy_source = self._energy.joules(wall_s, cpu_s)
        with Meter._lock:
            Meter._note_peaks()
            Meter._running.remove(self)
        self.measurement = Measurement(
            wall_s=wall_s,
            cpu_s=cpu_s,
            gpu_s=wall_s if self.device.type == "cuda" else None,
            peak_bytes=self._peak,
            energy_j=energy_j,
            energy_source=energy_source,
            peak_source="measured" if self._can_reset else "measured since the process began",
            gpu_peak_bytes=self._gpu_peak,
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @staticmethod
    def _note_peaks() -> None:
        """Give every running meter the high-water marks reached since they were last reset."""
        peak = _peak_bytes()
        for meter in Meter._running:
            meter._peak = max(meter._peak, peak)
            if meter.device.type == "cuda":
                meter._gpu_peak = _larger(meter._gpu_peak, torch.cuda.max_memory_allocated(meter.device))


def _peak_bytes() -> int:
    """Read the process's resident high-water mark in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> bool:
    """Lower the resident high-water mark to the present; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return "VmHWM:" in Path("/proc/self/status").read_text()


# ---------------------------------------------------------------- the record of costs


def append_cost(path: Path, phase: str, measurement: Measurement, **extra: object) -> None:
    """Append one line to a cost record and force it to disk.

    A torn last line, left by a crash, is cut off first. Several processes may append.

    Args:
        path: JSON-lines file, made if absent; its folder exists.
        phase: What the cost was for.
        measurement: The cost.
        extra: More fields that strict JSON can hold, such as round or site.
    """
    row = {"phase": phase} | measurement.to_json()
    if clash := row.keys() & extra.keys():
        raise ValueError(
            f"a cost line already has {', '.join(sorted(clash))}; name the extra field otherwise"
        )
    line = json.dumps(row | extra, allow_nan=False).encode() + b"\n"
    with naming_full_disk(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = _whole_length(handle)
            os.ftruncate(handle, size)
            try:
                write_fully(handle, line)
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
        if size == 0:
            sync_folder(path.parent)


def _whole_length(handle: int) -> int:
    """Return the length in bytes up to and with the last newline."""
    size = os.fstat(handle).st_size
    while size:
        start = max(0, size - 4096)
        found = os.pread(handle, size - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0


def read_costs(path: Path) -> list[dict[str, Any]]:
    """Read a cost record: one object a line, in the order written; a torn last line is left out.

    Args:
        path: File of `append_cost`; an absent one gives no rows.

    Raises:
        BadInput: A whole line is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    # What follows the last newline is "" or torn.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise BadInput(
                f"{path}, line {number}: this is not a cost line; restore the file or remove the line"
            )
        rows.append(row)
    return rows
