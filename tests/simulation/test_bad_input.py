"""Every mistake ends in one sentence that names the thing and the fix, exit code 2, nothing half-written."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from polyclinic.simulation.cli import main
from tests.simulation.conftest import call, write_study

Change = Callable[[Path, Path], None]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def rows(data: Path, change: Callable[[list[dict[str, str]]], None]) -> None:
    with (data / "images.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    change(table)
    with (data / "images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


@pytest.fixture
def case(random_vae: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A good study on a good folder, for a test to spoil."""
    study = write_study(tmp_path / "study.toml", random_vae, private=True, rounds=1)
    edit(study, 'source = "phantoms"', 'source = "folder"')
    data = tmp_path / "data"
    data.mkdir()
    table = []
    for site in ("north", "coast", "valley"):
        for patient in range(8):
            name = f"{site}-{patient}.png"
            Image.new("RGB", (40, 40), (patient * 20, 60, 90)).save(data / name)
            table.append(
                {"image": name, "caption": "a picture", "patient": f"{site}-{patient}", "site": site}
            )
    with (data / "images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return study, data


def no_image(study: Path, data: Path) -> None:
    (data / "north-3.png").unlink()


def unreadable(study: Path, data: Path) -> None:
    for path in data.glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])


def two_sites(study: Path, data: Path) -> None:
    rows(data, lambda table: table[9].update(patient="north-1"))


def unknown_field(study: Path, data: Path) -> None:
    edit(study, "sampling_rate = 0.3", "sampling_rate = 0.3\nsamplingrate = 0.3")


def no_epsilon(study: Path, data: Path) -> None:
    edit(study, "sampling_rate = 0.3", "sampling_rate = 0.3\nepsilon = 0")


def no_gpu(study: Path, data: Path) -> None:
    edit(study, "threads = 1", 'threads = 1\ndevice = "cuda"')


def no_data(study: Path, data: Path) -> None:
    shutil.rmtree(data)


def odd_size(study: Path, data: Path) -> None:
    edit(study, "image_size = 32", "image_size = 33")


def no_vae(study: Path, data: Path) -> None:
    text = study.read_text(encoding="utf-8").splitlines()
    study.write_text(
        "\n".join('vae = "/nowhere/vae"' if x.startswith("vae") else x for x in text), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (no_image, ["caption without its image", "north-3.png", "add the file"]),
        (unreadable, ["unreadable image", ".png", "replace the file"]),
        (two_sites, ["north-1", "two sites", "give each patient one site"]),
        (unknown_field, ["study.toml", "privacy.samplingrate", "remove it"]),
        (no_epsilon, ["study.toml", "privacy.epsilon", "greater than 0"]),
        (no_gpu, ["training.device", "no GPU", '"auto"']),
        (no_data, ["images.csv", "no such file"]),
        (odd_size, ["image_size", "multiple of 8"]),
        (no_vae, ["generator.vae", "/nowhere/vae"]),
    ],
)
def test_one_sentence_and_exit_code_2(
    case: tuple[Path, Path],
    tmp_path: Path,
    spoil: Change,
    names: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    if spoil is no_gpu and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    study, data = case
    spoil(study, data)
    home = tmp_path / "home"
    # In this process, so that an exception is an error here; `test_full_disk_while_caching` starts commands.
    assert main(["run", str(study), "--data", str(data), "--home", str(home)]) == 2
    said = capsys.readouterr().err
    sentence = said.strip().splitlines()[-1]
    assert sentence.startswith("polyclinic-simulate: ")
    assert "Traceback" not in said
    for name in names:
        assert name in sentence
    assert not list(home.rglob("checkpoints"))
    assert not [path for path in home.rglob("*") if path.name.startswith(".tmp-")]


@pytest.mark.long  # tests/common/test_cache.py fills a disk in seconds
def test_full_disk_while_caching(case: tuple[Path, Path], tmp_path: Path) -> None:
    """The home is on a disk of 2 MiB: caching stops with a sentence, and goes on once there is space."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    study, data = case
    home = tmp_path / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(home)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    try:
        done = call("simulation", "run", study, "--data", data, "--home", home)
        assert done.returncode == 2, done.stderr
        sentence = done.stderr.strip().splitlines()[-1]
        assert "disk is full" in sentence
        assert "free space" in sentence
        assert str(home) in sentence
        assert not [path for path in home.rglob("*") if path.name.startswith(".tmp-")]
        subprocess.run(["mount", "-o", "remount,size=300m", str(home)], check=True)
        again = call("simulation", "run", study, "--data", data, "--home", home, "--resume")
        assert again.returncode == 0, again.stderr
    finally:
        subprocess.run(["umount", "-l", str(home)], check=False)


def test_generate_from_what_is_no_run(tmp_path: Path) -> None:
    done = call("server", "generate", tmp_path, "--prompt", "a polyp")
    assert done.returncode == 2
    assert "not a run" in done.stderr
