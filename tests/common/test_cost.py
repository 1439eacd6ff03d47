import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from polyclinic.common.cost import (
    Measurement,
    Meter,
    append_cost,
    count_flops,
    in_parallel,
    in_sequence,
    read_costs,
)
from polyclinic.common.energy import WATTS_PER_CORE, EnergyReader
from polyclinic.common.refusals import BadInput

B, H, T, S, D = 2, 4, 16, 24, 8
FORWARD = 4 * B * H * T * S * D


def _attention(device: str, backward: bool, **options: object) -> int:
    query = torch.randn(B, H, T, D, device=device, requires_grad=backward)
    key, value = (torch.randn(B, H, S, D, device=device, requires_grad=backward) for _ in range(2))
    if options.get("masked"):
        options = {"attn_mask": torch.zeros(T, S, device=device)}

    def run() -> None:
        out = F.scaled_dot_product_attention(query, key, value, **options)  # type: ignore[arg-type]
        if backward:
            out.sum().backward()  # type: ignore[no-untyped-call]

    return count_flops(run)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"masked": True}, {"dropout_p": 0.1}])
def test_attention_counts_what_the_formula_says(device: str, options: dict[str, object]) -> None:
    assert _attention(device, False, **options) == FORWARD
    assert _attention(device, True, **options) == 3 * FORWARD


def test_grouped_keys_count_every_query_head() -> None:
    query, key = torch.randn(B, H, T, D), torch.randn(B, 2, S, D)
    assert count_flops(lambda: F.scaled_dot_product_attention(query, key, key, enable_gqa=True)) == FORWARD


def test_convolution_and_linear_count_two_flops_a_multiply_add() -> None:
    conv, linear = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Linear(7, 11)
    image, rows = torch.randn(2, 3, 8, 8), torch.randn(4, 7)
    assert count_flops(lambda: conv(image)) == 2 * 2 * 5 * 3 * 9 * 64
    assert count_flops(lambda: linear(rows)) == 2 * 4 * 7 * 11


@pytest.mark.parametrize("backward", [False, True])
def test_forecast_on_meta_equals_count_on_cpu_for_a_whole_network(backward: bool) -> None:
    def flops(device: str) -> int:
        with torch.device(device):
            layer = torch.nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
            head = torch.nn.Conv1d(32, 8, 3)
            # Both inputs need gradients, as inside a network.
            x, memory = (torch.randn(2, n, 32, requires_grad=True) for n in (16, 5))

        def run() -> None:
            out = head(layer(x, memory).transpose(1, 2)).square().mean()
            if backward:
                out.backward()

        return count_flops(run)

    assert flops("meta") == flops("cpu") > 0


def test_meter_tells_waiting_from_working() -> None:
    with Meter() as meter:
        time.sleep(0.3)
    waiting = meter.measurement
    assert waiting is not None
    assert waiting.wall_s >= 0.3
    assert waiting.cpu_s < 0.2
    with Meter() as meter:
        end = time.process_time() + 0.3
        thread = threading.Thread(
            target=lambda: [None for _ in iter(lambda: time.process_time() < end, False)]
        )
        thread.start()
        thread.join()
    working = meter.measurement
    assert working is not None
    assert working.cpu_s >= 0.29  # another thread's work counts
    assert working.gpu_s is None
    assert working.gpu_peak_bytes is None
    if "estimated" in working.energy_source:
        assert working.energy_j == pytest.approx(working.cpu_s * WATTS_PER_CORE)


def test_meter_measures_when_the_block_fails() -> None:
    meter = Meter()
    with pytest.raises(ZeroDivisionError), meter:
        _ = 1 / 0
    assert meter.measurement is not None


def _touch(mebibytes: int) -> None:
    block = bytearray(mebibytes << 20)
    block[::4096] = b"x" * len(block[::4096])


NESTED = """
import sys
from polyclinic.common.cost import Meter

def touch(mebibytes):
    block = bytearray(mebibytes << 20)
    block[::4096] = b"x" * len(block[::4096])

with Meter() as outer:
    with Meter() as first:
        touch(160)
    with Meter() as second:
        touch(40)
print(first.measurement.peak_source)
print(*(meter.measurement.peak_bytes for meter in (outer, first, second)))
"""


def test_peaks_of_nested_meters_are_their_own() -> None:
    # In a process of its own: memory that other tests have freed here may be handed out again.
    done = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True, check=True)
    source, peaks = done.stdout.splitlines()
    if source != "measured":
        pytest.skip("this kernel does not let a process reset its high-water mark")
    outer, first, second = map(int, peaks.split())
    # Before the mark went down for the second, the outer one has kept what the first reached.
    assert outer == first
    # 120, or up to 160 where the process held enough free memory for the second.
    assert 100 << 20 < first - second < 165 << 20


def test_overlapping_meters_in_threads_both_see_the_process() -> None:
    inside, leave = threading.Event(), threading.Event()
    slow = Meter()

    def wait() -> None:
        with slow:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=wait)
    thread.start()
    inside.wait(10)
    with Meter() as quick:
        _touch(60)
    leave.set()
    thread.join()
    assert slow.measurement
    assert quick.measurement
    assert slow.measurement.peak_bytes >= quick.measurement.peak_bytes > 60 << 20
    assert Meter._running == []


A = Measurement(2.0, 3.0, None, 100, 30.0, "CPU estimated (10 W a busy core)", "measured")
G = Measurement(
    5.0, 1.0, 5.0, 70, 50.0, "CPU estimated (10 W a busy core); GPU measured (NVML, whole board)", "", 9
)


def test_costs_add_and_keep_their_sources() -> None:
    total = in_sequence([A, G, A])
    assert total == Measurement(9.0, 7.0, 5.0, 100, 110.0, G.energy_source, "measured", 9)
    assert in_parallel([A, G, A]) == Measurement(5.0, 7.0, 5.0, 100, 110.0, G.energy_source, "measured", 9)
    assert in_sequence([]) == in_parallel([]) == Measurement()
    assert A + Measurement() == Measurement() + A == A
    assert Measurement.from_json(json.loads(json.dumps(G.to_json()))) == G


def _package(powercap: Path, name: str, kind: str, energy: int, span: int = 262_143_328_850) -> Path:
    entry = powercap / name
    entry.mkdir(parents=True)
    (entry / "name").write_text(f"{kind}\n")
    (entry / "energy_uj").write_text(f"{energy}\n")
    (entry / "max_energy_range_uj").write_text(f"{span}\n")
    return entry / "energy_uj"


def test_rapl_adds_packages_not_their_parts_and_survives_one_wrap(tmp_path: Path) -> None:
    one = _package(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    two = _package(tmp_path, "intel-rapl:1", "package-1", 262_143_000_000)
    core = _package(tmp_path, "intel-rapl:0:0", "core", 0)
    psys = _package(tmp_path, "intel-rapl:2", "psys", 0)
    reader = EnergyReader(torch.device("cpu"), tmp_path)
    one.write_text("6000000\n")
    two.write_text("1671150\n")  # 2 J further on, past the end of the counter
    core.write_text("900000000\n")
    psys.write_text("900000000\n")
    joules, source = reader.joules(wall_s=1.0, cpu_s=7.0)
    assert joules == pytest.approx(7.0)
    assert source.startswith("CPU measured (RAPL")
    # After an hour the counter may have gone round more than once: then it is worth nothing.
    assert reader.joules(wall_s=3600.0, cpu_s=7.0)[0] == 7.0 * WATTS_PER_CORE
    one.unlink()
    joules, source = reader.joules(wall_s=1.0, cpu_s=7.0)
    assert (joules, source.split()[1]) == (7.0 * WATTS_PER_CORE, "estimated")


def test_cost_record_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    assert read_costs(path) == []
    append_cost(path, "cache", A, site="north")
    append_cost(path, "round", G, round=3)
    rows = read_costs(path)
    assert [(row["phase"], row.get("site"), row.get("round")) for row in rows] == [
        ("cache", "north", None),
        ("round", None, 3),
    ]
    assert [Measurement.from_json(row) for row in rows] == [A, G]
    with pytest.raises(ValueError, match="wall_s"):
        append_cost(path, "round", A, wall_s=1)
    with pytest.raises(ValueError, match="Out of range"):
        append_cost(path, "round", A, loss=float("nan"))
    assert read_costs(path) == rows


@pytest.mark.parametrize("torn", ['{"phase": "x"', "x" * 10_000])
def test_torn_last_line_is_left_out_and_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "costs.jsonl"
    append_cost(path, "first", A)
    with path.open("a") as stream:
        stream.write(torn)
    assert [row["phase"] for row in read_costs(path)] == ["first"]
    append_cost(path, "second", A)
    assert [row["phase"] for row in read_costs(path)] == ["first", "second"]
    path.write_text(torn)
    append_cost(path, "only", A)
    assert [row["phase"] for row in read_costs(path)] == ["only"]


def test_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    append_cost(path, "first", A)
    path.write_text("[1]\n" + path.read_text())
    with pytest.raises(BadInput, match="line 1"):
        read_costs(path)


def _append_many(path: Path, who: int) -> None:
    for number in range(50):
        append_cost(path, "round", A, who=who, number=number)


def test_processes_appending_together_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, who)) for who in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted((row["who"], row["number"]) for row in read_costs(path)) == [
        (who, number) for who in range(3) for number in range(50)
    ]


def test_a_line_that_does_not_fit_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    append_cost(path, "first", A)
    before = path.read_bytes()
    # The kernel stops the child's file 10 bytes into the second line.
    code = (
        "import resource, sys; from pathlib import Path; from polyclinic.common.cost import *\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 10},) * 2)\n"
        "append_cost(Path(sys.argv[1]), 'second', Measurement())"
    )
    child = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert "File too large" in child.stderr
    assert path.read_bytes() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_meter_on_a_gpu() -> None:
    with Meter("cuda") as meter:
        block = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
        del block
    assert meter.measurement is not None
    assert meter.measurement.gpu_s == meter.measurement.wall_s
    assert (meter.measurement.gpu_peak_bytes or 0) >= 64 << 20
    assert "GPU" in meter.measurement.energy_source
