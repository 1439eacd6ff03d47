"""The standing federation that the attempts share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e.federation import DATA, SITES, Federation, at_once


@pytest.fixture(scope="module", autouse=True)
def own_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each federation is a world of its own: its patients are those of the others, and no ledger knows that.

    On one machine a site would rightly be refused patients whom another ledger there charges.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def random_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderKL with random weights, in the real format: 32 px become 8 x 4 x 4."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae") / "random-weights-vae"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 16, 16, 16),
            latent_channels=8,
            norm_num_groups=16,
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, random_vae: Path) -> Iterator[Federation]:
    """Coordinator and two enrolled sites with data; nothing is approved and nothing runs yet."""
    if not DATA.exists():
        if os.environ.get("CI") == "true":
            pytest.fail("the chest X-rays must be there in CI")
        pytest.skip("needs the chest X-rays beside the project")
    made = Federation(tmp_path_factory.mktemp("federation"), random_vae)
    made.write_data()
    kits = made.provision(made.write_study("opening"))
    at_once(lambda site: made.enrol(site, kits[site]), SITES)
    try:
        yield made
    finally:
        made.stop_all()
