"""Joules from the machine's own counters, or an estimate that says so."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

# Server CPUs draw 5 to 15 W for each busy core, with their share of memory and uncore: the middle.
WATTS_PER_CORE = 10.0
# A data-centre board under training load; used only where no NVML counter can be read.
WATTS_PER_GPU = 300.0
# No CPU package draws more; a RAPL counter that could have gone round twice at this power is not used.
_MOST_PACKAGE_WATTS = 500.0

POWERCAP = Path("/sys/class/powercap")


class EnergyReader:
    """Reads the energy counters when made, and again when asked for the joules between.

    CPU: RAPL (whole package, other processes included), else CPU seconds times `WATTS_PER_CORE`.
    GPU: NVML's total-energy counter (whole board), else GPU seconds times `WATTS_PER_GPU`.

    Args:
        device: Where the work runs; a GPU counts only where it is a CUDA device.
        powercap: Folder of the kernel's RAPL counters.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self._device = device
        self._packages = rapl_packages(powercap)
        self._nvml: Any = None
        self._board: Any = None
        if device.type == "cuda":
            self._nvml, self._board = _nvml_board(device)
        self._cpu_start = [_read_int(package / "energy_uj") for package in self._packages]
        self._gpu_start = self._gpu_millijoules()

    def joules(self, wall_s: float, cpu_s: float) -> tuple[float, str]:
        """Return the energy used since this reader was made, and its source in words.

        Args:
            wall_s: Seconds on the clock since then.
            cpu_s: CPU seconds of this process since then.
        """
        energy, source = self._cpu_joules(wall_s, cpu_s)
        if self._device.type != "cuda":
            return energy, source
        end = self._gpu_millijoules()
        if self._gpu_start is None or end is None:
            gpu, gpu_source = wall_s * WATTS_PER_GPU, f"GPU estimated ({WATTS_PER_GPU:g} W a GPU)"
        else:
            shared = " shared with other processes" if self._is_shared() else ""
            gpu, gpu_source = (end - self._gpu_start) / 1e3, f"GPU measured (NVML, whole board{shared})"
        return energy + gpu, f"{source}; {gpu_source}"

    def _cpu_joules(self, wall_s: float, cpu_s: float) -> tuple[float, str]:
        used = 0
        for package, start in zip(self._packages, self._cpu_start, strict=True):
            span = _read_int(package / "max_energy_range_uj")
            end = _read_int(package / "energy_uj")
            if start is None or end is None or not span or wall_s * _MOST_PACKAGE_WATTS > span / 1e6:
                break
            used += (end - start) % span
        else:
            if self._packages:
                return used / 1e6, "CPU measured (RAPL, whole package)"
        return cpu_s * WATTS_PER_CORE, f"CPU estimated ({WATTS_PER_CORE:g} W a busy core)"

    def _gpu_millijoules(self) -> int | None:
        """Read the board's counter since the driver was loaded, in millijoules."""
        if self._nvml is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._board))
        except self._nvml.NVMLError:
            return None  # boards before Volta and MIG slices have no counter

    def _is_shared(self) -> bool:
        """Say whether a process other than ours computes on the board, or that is not known."""
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._board)
        except self._nvml.NVMLError:
            return True
        # Process ids are the host's, not a container's, so only their number says something.
        return len(processes) != 1


def rapl_packages(powercap: Path = POWERCAP) -> list[Path]:
    """Find the RAPL counters of whole CPU packages that this process may read.

    Args:
        powercap: Folder of the counters, with entries such as `intel-rapl:0` (a package) and
            `intel-rapl:0:0` (a part of it, which must not be counted twice).
    """
    packages = [
        entry
        for entry in sorted(powercap.glob("intel-rapl:*"))
        if entry.name.count(":") == 1 and _read_text(entry / "name").startswith("package")
    ]
    return [entry for entry in packages if _read_int(entry / "energy_uj") is not None]


def _read_text(path: Path) -> str:
    """Read a small kernel file; "" where it is absent or forbidden (RAPL is root-only)."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    text = _read_text(path)
    return int(text) if text.isdigit() else None


def _nvml_board(device: torch.device) -> tuple[Any, Any]:
    """Open NVML and find the board behind a torch device; (None, None) where that cannot be done."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        # By id and not by index: CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.
        uuid = torch.cuda.get_device_properties(device).uuid
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return None, None
