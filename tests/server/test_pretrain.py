"""What the coordinator trains on its public reference, and how a base is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from polyclinic.common.data.table import Record
from polyclinic.common.generator_settings import VaeTraining
from polyclinic.common.generators.base import load_family, trainable
from polyclinic.common.generators.public import hash_source
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study, parse_study
from polyclinic.server.adversarial import sharpen
from polyclinic.server.base import prepare_base
from polyclinic.server.pretrain import _texts, pretrain_generator, pretrain_vae
from polyclinic.server.reference import Reference, split_reference


def study(**generator: object) -> Study:
    table = {
        "size": "msdm-tiny",
        "max_tokens": 8,
        "vae_training": {"widths": [16, 16, 16, 16], "steps": 4, "batch_size": 4},
        "warm_start_training": {"steps": 3, "batch_size": 4},
    }
    values = {
        "name": "base",
        "data": {"image_size": 32},
        "generator": {**table, **generator},
        "reference": {"pretrain": 0.4, "probe": 0.3, "evaluate": 0.3},
        "evaluation": {"prompts": [{"text": "a"}]},
    }
    return parse_study(values, "test")


@pytest.fixture
def reference(drawn: list[Record]) -> Reference:
    return Reference(pretrain=drawn, probe=[], evaluate=drawn, hash="r")


def test_a_seeded_vae_is_the_same_folder_and_loads_in_diffusers(drawn: list[Record], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    psnr = [pretrain_vae(study(), drawn, tmp_path / name) for name in ("one", "two")]
    assert psnr[0] == psnr[1]
    assert hash_source(tmp_path / "one") == hash_source(tmp_path / "two")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "one", low_cpu_mem_usage=False)
    latents = vae.encode(torch.rand(4, 3, 32, 32) * 2 - 1).latent_dist.mean
    assert latents.shape == (4, 8, 4, 4)
    # The stored scaling factor brings latents of the training images to unit variance.
    assert 0 < vae.config.scaling_factor < 1e4
    assert all(
        t.dtype == torch.float16
        for t in load_file(tmp_path / "one/diffusion_pytorch_model.safetensors").values()
    )


def test_reconstruction_gets_better_with_steps(drawn: list[Record], tmp_path: Path) -> None:
    short = study(vae_training={"widths": [16, 16, 16, 16], "steps": 2, "batch_size": 4})
    long = study(vae_training={"widths": [16, 16, 16, 16], "steps": 80, "batch_size": 4})
    assert pretrain_vae(long, drawn, tmp_path / "long") > pretrain_vae(short, drawn, tmp_path / "short") + 3


SMALL_VAE = {"widths": [16, 16, 16, 16], "batch_size": 4}


def test_sharpening_moves_the_decoder_and_leaves_the_encoder(drawn: list[Record], tmp_path: Path) -> None:
    plain = study(vae_training={**SMALL_VAE, "steps": 2})
    sharp = study(vae_training={**SMALL_VAE, "steps": 2, "adversarial_steps": 3})
    pretrain_vae(plain, drawn, tmp_path / "plain")
    pretrain_vae(sharp, drawn, tmp_path / "sharp")
    one, other = (load_file(tmp_path / n / "diffusion_pytorch_model.safetensors") for n in ("plain", "sharp"))
    moved = {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert moved == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize(("weight", "low", "high"), [(0.0, 0.0, 0.05), (0.5, 0.4, 1.2)])
def test_the_discriminator_brings_back_texture_that_squared_error_averages_away(
    weight: float, low: float, high: float
) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16,) * 3,
        latent_channels=1,
        norm_num_groups=16,
        mid_block_add_attention=False,
    )

    def texture() -> torch.Tensor:
        return torch.randn(4, 1, 32, 32).clamp(-1, 1).expand(-1, 3, -1, -1)

    def decode(latent: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = vae.decode(latent).sample
        return image

    settings = VaeTraining(adversarial_steps=100, adversarial_weight=weight, adversarial_learning_rate=2e-3)
    sharpen(vae, texture, decode, torch.nn.functional.mse_loss, settings)
    with torch.no_grad():
        drawn = decode(vae.encode(texture()).latent_dist.mean)
    contrast = float(drawn.diff(dim=3).abs().mean() / texture().diff(dim=3).abs().mean())
    assert low <= contrast < high


def test_grey_images_make_a_grey_decoder(tmp_path: Path) -> None:
    records = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        records.append(Record(image=path, patient=f"p{number}", captions=("a",)))
    pretrain_vae(study(vae_training={**SMALL_VAE, "steps": 2}), records, tmp_path / "vae")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    image = vae.decode(torch.randn(2, 8, 4, 4)).sample
    assert torch.equal(image[:, 0], image[:, 1])
    assert torch.equal(image[:, 0], image[:, 2])
    assert image.std() > 0


def test_the_base_is_trained_once_and_named_by_hash(reference: Reference, tmp_path: Path) -> None:
    first = prepare_base(tmp_path, study(warm_start="reference"), reference)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "bases").rglob("*.safetensors")}
    again = prepare_base(tmp_path, study(warm_start="reference"), reference)
    assert first.resolved.hash == again.resolved.hash
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "bases").rglob("*.safetensors")}
    # What it cost is remembered, also by a run that finds it there.
    assert len(first.costs) == len(again.costs) == 2
    assert all(line["wall_s"] > 0 for line in again.costs)

    assert first.files.vae is not None
    named = hash_source(first.files.vae)
    assert prepare_base(tmp_path, study(vae=str(first.files.vae), vae_sha256=named), reference)
    with pytest.raises(BadInput, match=r"vae_sha256.*name the right part"):
        prepare_base(tmp_path, study(vae=str(first.files.vae), vae_sha256="0" * 64), reference)


def test_what_does_not_train_is_base_and_never_travels(reference: Reference, tmp_path: Path) -> None:
    whole = prepare_base(tmp_path, study(warm_start="reference"), reference)
    part = prepare_base(tmp_path, study(warm_start="reference", train="conditioning"), reference)
    assert whole.files.frozen is None
    assert part.files.frozen is not None
    assert part.resolved.base_hash != whole.resolved.base_hash
    assert set(part.start) < set(whole.start)
    assert all(torch.equal(part.start[name], whole.start[name]) for name in part.start)
    # A site that loads the base has the frozen weights of the warm start, not random ones.
    settings = study(train="conditioning", warm_start="reference")
    family = load_family(settings, part.files, encoders=False)
    weights = dict(family.module.named_parameters())
    assert set(trainable(family.module)) == set(part.start)
    assert torch.equal(weights["conv_in.weight"], whole.start["conv_in.weight"])


def test_a_warm_start_of_another_size_is_named(reference: Reference, tmp_path: Path) -> None:
    base = prepare_base(tmp_path, study(), reference)
    path = tmp_path / "start.safetensors"
    assert base.files.vae is not None
    pretrain_generator(study(), reference.pretrain, base.files.vae, path)
    with pytest.raises(BadInput, match=r"start\.safetensors: does not fit"):
        prepare_base(tmp_path, study(size="msdm-small", warm_start=str(path)), reference)


def test_a_reference_is_split_by_patient(drawn: list[Record]) -> None:
    parts = split_reference(study(), drawn)
    patients = [{r.patient for r in part} for part in (parts.pretrain, parts.probe, parts.evaluate)]
    assert sum(map(len, patients)) == len(set.union(*patients)) == len({r.patient for r in drawn})


def test_a_reference_without_an_evaluate_part_is_refused(drawn: list[Record]) -> None:
    with pytest.raises(BadInput, match="evaluate part is empty"):
        split_reference(study(), [r for r in drawn if r in split_reference(study(), drawn).pretrain])


def test_labels_can_stand_in_for_captions(drawn: list[Record]) -> None:
    settings = study(warm_start_training={"captions": "labels", "steps": 1})
    labelled = settings.model_copy(
        update={"reference": settings.reference.model_copy(update={"concepts": ("polyp", "instrument")})}
    )
    record = Record(
        "p", drawn[0].image, ("a caption",), None, {"instrument": "no", "polyp": "yes", "age": "50"}
    )
    assert _texts(record, labelled) == ["polyp: yes, instrument: no"]
    assert _texts(record, study()) == ["a caption"]


def test_three_levels_shrink_an_image_by_four(reference: Reference, tmp_path: Path) -> None:
    settings = study(vae_training={"widths": [16, 16, 16], "latent_channels": 4, "steps": 1, "batch_size": 2})
    base = prepare_base(tmp_path, settings, reference)
    family = load_family(settings, base.files)
    assert family.encode_image(torch.zeros(1, 3, 32, 32))["mean"].shape == (1, 4, 8, 8)
    assert family.synthetic_views(2).image["mean"].shape == (2, 4, 8, 8)
    # A forecast without the VAE counts the same network.
    config: Any = load_family(settings, None, encoders=False).module.config
    assert config.sample_size == 8
    pipeline = family.pipeline()
    image = pipeline("a", num_inference_steps=1, height=32, width=32, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
