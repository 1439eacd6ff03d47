"""A federation small enough for seconds: a VAE with random weights and a few phantoms."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

STUDY = """
name = "tiny"
[data]
source = "phantoms"
image_size = 32
phantoms = {{patients_per_site = 12, seed = 3}}
[generator]
size = "msdm-tiny"
max_tokens = 8
vae = "{vae}"
[privacy]
enabled = {private}
delta = 1e-3
sampling_rate = 0.3
views = 2
[training]
rounds = {rounds}
steps_per_round = 2
threads = 1
{key}
[federation]
min_sites = 2
ema = 0.5
[reference]
fraction = 0.2
[evaluation]
steps = 2
draws = 1
every = 2
prompts = [{{text = "Generate an image with a polyp."}}, {{text = "Generate an image with no polyp."}}]
[simulation.sites]
north = {{declared_patients = 10, min_patients = 2}}
coast = {{declared_patients = 10, min_patients = 2}}
valley = {{declared_patients = 10, min_patients = 2}}
"""


@pytest.fixture(scope="session")
def random_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderKL with random weights, in the real format."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae") / "random-weights-vae"
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 16, 16),
        latent_channels=8,
        norm_num_groups=16,
        sample_size=32,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return folder


def write_study(
    path: Path, vae: Path, *, private: bool = False, rounds: int = 3, key: str | None = "k"
) -> Path:
    """Write the tiny study."""
    line = "" if key is None or private else f'test_key = "{key}"'
    text = STUDY.format(vae=vae, private=str(private).lower(), rounds=rounds, key=line)
    path.write_text(text, encoding="utf-8")
    return path


def command(room: str, *arguments: str | Path) -> list[str]:
    """Command line of one of the three programs, in a process of its own."""
    return [sys.executable, "-W", "ignore", "-m", f"polyclinic.{room}.cli", *map(str, arguments)]


def call(room: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(room, *arguments), capture_output=True, text=True, timeout=500, env=environment
    )


def call_here(room: str, *arguments: str | Path) -> tuple[int, str]:
    """Run a command in this process, which has everything imported; returns its exit code and its errors."""
    said = io.StringIO()
    program = importlib.import_module(f"polyclinic.{room}.cli")
    with contextlib.redirect_stderr(said):
        code = program.main([str(argument) for argument in arguments])
    return code, said.getvalue()
