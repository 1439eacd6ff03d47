"""Operations of what surrounds training, forecast on the meta device, against counts of the real work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyclinic.common.cost import count_flops
from polyclinic.common.data.table import Record
from polyclinic.common.generators.base import BaseFiles, load_family
from polyclinic.server.plan_phases import count_phases
from polyclinic.server.pretrain import pretrain_generator, pretrain_vae
from tests.server.test_pretrain import study


def test_pretraining_takes_what_was_forecast_and_the_encoding_of_the_reference(
    drawn: list[Record], tmp_path: Path
) -> None:
    recipe = {"widths": [16, 16, 16, 16], "steps": 4, "batch_size": 4, "adversarial_steps": 3}
    tiny = study(vae_training=recipe, warm_start="reference", vae="reference")
    found = count_phases(tiny, BaseFiles())
    assert found.autoencoder is not None
    assert found.autoencoder_image is not None
    assert found.start is not None
    spent = count_flops(lambda: pretrain_vae(tiny, drawn, tmp_path / "vae"))
    # Each image of the reference is encoded, and the held-out ones decoded, once more.
    assert found.autoencoder < spent < found.autoencoder + len(drawn) * found.autoencoder_image

    spent = count_flops(
        lambda: pretrain_generator(tiny, drawn, tmp_path / "vae", tmp_path / "start.safetensors")
    )
    encode = count_phases(tiny, BaseFiles(vae=tmp_path / "vae")).encode
    assert encode is not None
    assert found.start < spent < found.start + (len(drawn) + 2) * encode


def test_encoding_an_image_and_a_caption_takes_what_was_forecast(tiny_vae: Path) -> None:
    tiny, files = study(), BaseFiles(vae=tiny_vae)
    family = load_family(tiny, files)

    def encode() -> None:
        family.encode_image(torch.zeros(1, 3, 32, 32))
        family.encode_prompt(["a polyp"])

    assert count_phases(tiny, files).encode == count_flops(encode)


@pytest.mark.parametrize(
    ("extractor", "known"),
    [({"source": "package:efficientnet-lite0"}, True), ({"source": "a/model", "revision": "main"}, False)],
)
def test_an_extractor_that_would_have_to_be_fetched_is_not_counted(
    extractor: dict[str, str], known: bool
) -> None:
    tiny = study()
    evaluation = tiny.evaluation.model_validate({**tiny.evaluation.model_dump(), "extractors": [extractor]})
    found = count_phases(tiny.model_copy(update={"evaluation": evaluation}), BaseFiles()).extract
    assert (found is not None) == known
