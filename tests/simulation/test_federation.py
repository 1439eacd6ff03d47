"""A federation as a person runs it: commands in real processes, killed and resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from polyclinic.client.approval import find_approval
from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.reader_study.images import read_candidates
from polyclinic.server.app import load_resolved
from polyclinic.server.report.costs import merged, total
from polyclinic.server.report.html import read_metrics
from tests.simulation.conftest import call, call_here, command, write_study


def run_dir(home: Path) -> Path:
    (folder,) = [path for path in (home / "runs").iterdir() if path.is_dir()]
    return folder


def checkpoint(home: Path, number: int) -> Path:
    return run_dir(home) / "checkpoints" / f"round-{number:04d}"


def killed_at(line: str, arguments: list[str]) -> None:
    """Run a command and kill it at an event that it reports itself, not after a guessed time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stderr is not None
        assert any(line in told for told in process.stderr), f"it ended before {line!r}"
        os.kill(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(random_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run without privacy and with the test key: its study and its home."""
    folder = tmp_path_factory.mktemp("undisturbed")
    study = write_study(folder / "tiny.toml", random_vae)
    done = call("simulation", "run", study, "--home", folder / "home", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"].endswith("report.html")
    return study, folder / "home"


def test_a_run_ends_in_a_report_stamped_not_private(undisturbed: tuple[Path, Path]) -> None:
    _, home = undisturbed
    folder = run_dir(home)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "NOT PRIVATE" in page
    metrics = read_metrics(folder / "metrics.json")
    assert not metrics.private
    assert metrics.simulated
    assert [facts.round for facts in metrics.rounds] == [0, 1, 2, 3]
    assert [facts.evaluated for facts in metrics.rounds] == [True, False, True, True]
    parameters = metrics.study.trainable_parameters
    rows = {
        (row.phase, row.where): merged(
            r for r in metrics.cost if (r.phase, r.where) == (row.phase, row.where)
        )
        for row in metrics.cost
    }
    planned = {(row.phase, row.where): row.figures for row in metrics.forecast}
    for site in ("north", "coast", "valley"):
        down = rows["train", site]["down_bytes"].value
        assert 3 * 2 * parameters < down < 3 * 2 * parameters * 1.1  # bf16, and a hash a tensor
        # A site's bytes stand beside that site's forecast, and operations are those that were planned.
        assert down == pytest.approx(planned["train", site]["down_bytes"].value, rel=0.01)
        assert rows["train", site]["flops"].value == pytest.approx(planned["train", site]["flops"].value)
        assert rows["train", site]["cpu_s"].source == rows["cache", site]["cpu_s"].source == "measured"
        assert planned["train", site]["wall_s"].source == "estimated"
    # Rounds 0, 2 and 3 were judged, as planned.
    assert rows["sample", "server"]["flops"] == planned["sample", "server"]["flops"]
    assert {"combine", "wait", "sample", "evaluate"} == {phase for phase, where in rows if where == "server"}
    assert metrics.cost_summary is not None
    assert 0 < (metrics.cost_summary.critical_path_s or 0) < (metrics.cost_summary.clock_s or 0)
    assert (folder / "MODEL_CARD.md").exists()


@pytest.mark.parametrize(
    "moment", [pytest.param("after round 1", marks=pytest.mark.long), "in the middle of a round"]
)
def test_kill_9_and_resume_gives_the_undisturbed_weights(
    undisturbed: tuple[Path, Path], tmp_path: Path, moment: str
) -> None:
    study, whole = undisturbed
    home = tmp_path / "home"
    killed_at(
        "round 1:" if moment == "after round 1" else "round 2 north 0/2",
        command("simulation", "run", study, "--home", home),
    )
    assert not (run_dir(home) / "report.html").exists()
    again = call("simulation", "run", study, "--home", home, "--resume")
    assert again.returncode == 0, again.stderr
    for name in ("state.safetensors", "average.safetensors"):
        assert (checkpoint(home, 3) / name).read_bytes() == (checkpoint(whole, 3) / name).read_bytes()
    assert (run_dir(home) / "report.html").exists()
    for site in ("north", "coast", "valley"):
        reserved = [x["round"] for x in read_lines(run_dir(home) / "sites" / site) if x["kind"] == "reserve"]
        assert reserved == [1, 2, 3]


def test_ray_gives_the_same_weights(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    study, whole = undisturbed
    done = call("simulation", "run", study, "--home", tmp_path, "--engine", "ray")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (load_file(checkpoint(home, 3) / "state.safetensors") for home in (whole, tmp_path))
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_a_private_run_spends_what_it_claims(random_vae: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path / "private.toml", random_vae, private=True, rounds=2)
    done = call("simulation", "run", study, "--home", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    folder = run_dir(tmp_path / "home")
    metrics = read_metrics(folder / "metrics.json")
    assert metrics.private
    assert "NOT PRIVATE" not in (folder / "report.html").read_text(encoding="utf-8")
    resolved = load_resolved(folder)
    for site in metrics.sites:
        approval = find_approval(folder / "sites" / site.name, resolved.hash)
        assert approval is not None
        assert approval.epsilon is not None
        assert site.epsilon is not None
        assert site.epsilon == pytest.approx(approval.epsilon)
        assert site.epsilon <= 8.0
        assert site.declared_patients == 10
    first, second = (metrics.rounds[i].epsilon["north"] for i in (1, 2))
    assert 0 < first < second
    ledger = call("client", "ledger", "show", "--home", folder / "sites" / "north", "--json")
    assert json.loads(ledger.stdout)["studies"][0]["epsilon"] == pytest.approx(second)

    # Fresh randomness every time: another run of the same study gives other weights.
    other = tmp_path / "other"
    killed_at("round 2 ", command("simulation", "run", study, "--home", other))
    a, b = (load_file(checkpoint(home, 1) / "state.safetensors") for home in (tmp_path / "home", other))
    assert any(bool((a[name] != b[name]).any()) for name in a)

    # A finished run is not trained again by mistake, and `generate` draws from it.
    code, said = call_here("simulation", "run", study, "--home", tmp_path / "home")
    assert code == 2
    assert "--resume" in said
    sheet = tmp_path / "grid.png"
    code, said = call_here("server", "generate", folder, "--prompt", "a polyp", "-n", "3", "--out", sheet)
    assert code == 0, said
    assert Image.open(tmp_path / "grid.png").size == (96, 32)
    # Into a folder: a file each, with its prompt, as a reader study or a data folder wants them.
    asked: list[str | Path] = [
        "--prompt",
        "a polyp",
        "--prompt",
        "no polyp",
        "-n",
        "3",
        "--out",
        tmp_path / "single",
    ]
    assert call_here("server", "generate", folder, *asked)[0] == 0
    found = read_candidates(tmp_path / "single")
    assert [candidate.prompt for candidate in found] == ["a polyp"] * 3 + ["no polyp"] * 3
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    for number, candidate in enumerate(found[:3]):
        # Another size of the batch rounds differently.
        one, wanted = np.asarray(Image.open(candidate.path)), grid[:, 32 * number : 32 * (number + 1)]
        np.testing.assert_allclose(one.astype(int), wanted, atol=1)
    code, said = call_here("server", "generate", folder, *asked)
    assert code == 2
    assert "new folder" in said


def test_compare_draws_three_arms_on_equal_examples(random_vae: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path / "arms.toml", random_vae, private=True, rounds=1)
    code, said = call_here("simulation", "compare", study, "--home", tmp_path / "home")
    assert code == 0, said
    page = (tmp_path / "home" / "runs" / "tiny-compare.html").read_text(encoding="utf-8")
    for arm in ("pooled", "federated", "private"):
        assert arm in page
    folders = sorted(path for path in (tmp_path / "home" / "runs").iterdir() if path.is_dir())
    flops = [
        total(read_metrics(folder / "metrics.json").cost, "flops", ("train",)) or 0.0 for folder in folders
    ]
    assert len(flops) == 3
    # FLOPs are counted from declared sizes, the same patients at the same rate in every arm.
    assert max(flops) == pytest.approx(min(flops), rel=1e-6)
    assert all(math.isfinite(value) and value > 0 for value in flops)


def test_a_terminal_sees_a_bar_and_a_file_sees_lines(undisturbed: tuple[Path, Path]) -> None:
    import pty

    study, home = undisturbed
    leader, follower = pty.openpty()
    arguments = command("simulation", "run", study, "--home", home / "again")
    process = subprocess.Popen(arguments, stderr=follower, stdout=subprocess.DEVNULL)
    os.close(follower)
    seen = b""
    end = time.monotonic() + 120
    while b"\x1b[" not in seen and time.monotonic() < end:
        seen += os.read(leader, 4096)
    process.kill()
    process.wait()
    os.close(leader)
    assert b"\x1b[" in seen  # a bar is redrawn with control codes
    lines = call("simulation", "run", study, "--home", home, "--resume").stderr
    assert "\x1b[" not in lines
