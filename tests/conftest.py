"""Fixtures that several rooms share: a random-weight VAE, MSDM's smallest size, a site of drawn images."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from polyclinic.client.approval import Approval, prepare_and_approve
from polyclinic.client.ledger_books import create_ledger
from polyclinic.common.data.cache import Cached
from polyclinic.common.data.table import Record
from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.generators.base import BaseFiles, Tensors, trainable_state
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.generators.public import hash_base, resolve
from polyclinic.common.study import NearScale, PublicScale, Resolved, Study, parse_study
from polyclinic.common.wire_reading import RoundOrder
from tests.browser import Browser
from tests.server.joining import Joining, copied, prepare

# Never the network, in any test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nor the user's own list of ledgers; it goes with the process.
_STATE = tempfile.TemporaryDirectory(prefix="polyclinic-state-")
os.environ["XDG_STATE_HOME"] = _STATE.name

SETTINGS = GeneratorSettings(size="msdm-tiny", max_tokens=16)
LATENT, TOKENS, TEXT_WIDTH = (8, 4, 4), 16, 384
PATIENTS = 12

POLICY = f"declared_patients = {PATIENTS}\nmin_patients = 5\nepsilon_per_study = 20.0\nepsilon_total = 20.0\n"


@pytest.fixture(autouse=True)
def _threads() -> Any:
    """Keep a test's thread count from leaking into the next."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real browser; skips without Chromium, and fails in CI."""
    with Browser() as started:
        yield started


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random-weight AutoencoderKL of factor 8: 32 px become 8 x 4 x 4."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("base") / "random-weight-vae"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 16, 16, 16),
            latent_channels=8,
            norm_num_groups=16,
        )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def family(tiny_vae: Path) -> Msdm:
    """msdm-tiny at 4 x 4 latents, without encoders, moved away from its zero-initialised output."""
    made = Msdm(SETTINGS, 32, tiny_vae, encoders=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture(scope="session")
def cached() -> Cached:
    """A cache of 12 patients with 1-3 images of 1-2 captions each."""
    generator = torch.Generator().manual_seed(2)
    images: list[list[int]] = []
    rows = 0
    for number in range(PATIENTS):
        images.append(list(range(rows, rows + 1 + number % 3)))
        rows += 1 + number % 3
    return Cached(
        [f"p{number:02d}" for number in range(PATIENTS)],
        images,
        [[1 + row % 4] if row % 2 else [1 + row % 4, 5] for row in range(rows)],
        {
            "mean": torch.randn(rows, *LATENT, generator=generator),
            "std": 0.1 + 0.1 * torch.rand(rows, *LATENT, generator=generator),
        },
        {"states": torch.randn(6, TOKENS, TEXT_WIDTH, generator=generator)},
        0,
    )


MakeStudy = Callable[..., Study]


@pytest.fixture(scope="session")
def make_study() -> MakeStudy:
    """Builds a tiny study; keyword arguments update its tables."""

    def make(**tables: dict[str, Any]) -> Study:
        values: dict[str, Any] = {
            "name": "tiny",
            "data": {"image_size": 32},
            "generator": {"size": "msdm-tiny", "max_tokens": 16},
            "privacy": {"epsilon": 8.0, "delta": 1e-3, "sampling_rate": 0.5, "views": 2, "micro_batch": 4},
            "training": {
                "rounds": 3,
                "steps_per_round": 2,
                "learning_rate": 1e-3,
                "device": "cpu",
                "threads": 1,
            },
            "evaluation": {"prompts": [{"text": "a polyp"}]},
        }
        for table, update in tables.items():
            values[table] = {**values.get(table, {}), **update}
        return parse_study(values, "tiny")

    return make


@dataclass
class Site:
    """A site's home with what a test needs to ask it."""

    home: Path
    resolved: Resolved
    records: list[Record]
    vae: Path
    state: Tensors

    def approve(self) -> Approval:
        return prepare_and_approve(self.home, "site-a", self.resolved, self.records, BaseFiles(vae=self.vae))

    def order(self, number: int = 1) -> RoundOrder:
        return RoundOrder(round=number, study_hash=self.resolved.hash)


MakeSite = Callable[..., Site]


def public_scale() -> PublicScale:
    """A scale as a coordinator would take it from public images."""
    return PublicScale(
        extractor=efficientnet().weights,
        bandwidth=5.0,
        near=NearScale(features=0.2, pixels=0.2, chance=0.005, patients=199, more=1.0),
    )


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Twelve patients' drawings of 40 px: a disc on a tinted ground."""
    folder = tmp_path_factory.mktemp("drawn")
    records = []
    for number in range(PATIENTS):
        image = Image.new("RGB", (40, 40), (180, 90 + 5 * number, 80))
        ImageDraw.Draw(image).ellipse((8, 8, 20 + number, 20 + number), fill=(220, 60, 60))
        path = folder / f"{number:02d}.png"
        image.save(path)
        records.append(Record(f"patient-{number:02d}", path, ("a polyp",) if number % 2 else ("no polyp",)))
    return records


@pytest.fixture
def make_site(tmp_path: Path, tiny_vae: Path, drawn: list[Record], make_study: MakeStudy) -> MakeSite:
    """Builds a site with a ledger and a policy; `approve()` is left to the test."""

    def make(policy: str = "", **tables: dict[str, Any]) -> Site:
        home = tmp_path / "site-a"
        home.mkdir(mode=0o700)
        (home / "policy.toml").write_text(POLICY + policy)
        create_ledger(home, "site-a", simulated=True)
        study = make_study(**tables)
        text = resolve(study.generator.text_encoder, None, "generator.text_encoder")
        base = hash_base(tiny_vae, text, study.generator.max_tokens)
        resolved = Resolved(
            study=study,
            base_hash=base,
            start_hash="0" * 64,
            reference_hash="0" * 64,
            public=public_scale() if study.releases.epsilons or study.releases.leakage_gate else None,
        )
        state = trainable_state(Msdm(study.generator, 32, tiny_vae, encoders=False).module)
        return Site(home, resolved, drawn, tiny_vae, state)

    return make


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory, tiny_vae: Path, drawn: list[Record]) -> Joining:
    """A coordinator with kits for a and b; copied for each test."""
    return prepare(tmp_path_factory.mktemp("joining"), tiny_vae, drawn, "a", "b")


@pytest.fixture
def made(provisioned: Joining, tmp_path: Path) -> Joining:
    """Kits for a and b, and nobody enrolled."""
    return copied(provisioned, tmp_path / "j")
