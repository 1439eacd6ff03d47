"""CLIP-type cosine: a random-weight CLIP in the real format, and embeddings made to listen or not."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.cosine import (
    check_clip,
    image_embeddings,
    load_clip,
    measure_cosine,
    text_embeddings,
)
from tests.server.random_models import save_clip

PROMPTS = ["an image with a polyp", "an image with no polyp", "an instrument"]


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "random-weight-clip")


def test_embeddings_are_the_models_own(random_clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    clip = load_clip(random_clip, "random-weight-clip")
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    found, texts = image_embeddings(clip, images), text_embeddings(clip, PROMPTS)
    model, processor = CLIPModel.from_pretrained(random_clip), CLIPProcessor.from_pretrained(random_clip)
    bytes_ = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
    given = processor(text=PROMPTS, images=list(bytes_), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**given)
    # The model's own forward pass normalises and multiplies; ours must give the same products.
    expected = output.logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close((found @ texts.T).float(), expected, atol=1e-5, rtol=0)
    assert found.shape == (5, 16)
    long = text_embeddings(clip, ["a polyp " * 60])
    assert long.isfinite().all()


def _embeddings(listening: float, prompts: int, each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and texts that share a direction (a high cosine for all) and, if `listening`, their prompt's."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(16, generator=generator)
    texts = F.normalize(common + torch.randn(prompts, 16, generator=generator), dim=1)
    own = texts.repeat_interleave(each, dim=0)
    images = common + listening * 4 * own + torch.randn(prompts * each, 16, generator=generator)
    return F.normalize(images, dim=1), texts


def test_lift_tells_images_that_listen_from_those_that_do_not() -> None:
    names = [f"prompt {i}" for i in range(20)]
    prompts = [name for name in names for _ in range(6)]
    images, texts = _embeddings(1.0, 20, 6, 1)
    found = measure_cosine(images, prompts, texts, names, "constructed")
    by_hand = [float(images[i].double() @ texts[i // 6].double()) for i in range(120)]
    assert found.cosine.value == pytest.approx(sum(by_hand) / 120)
    others = [
        float(images[i].double() @ texts[j].double()) for i in range(120) for j in range(20) if j != i // 6
    ]
    assert found.shuffled.value == pytest.approx(sum(others) / len(others))
    assert found.lift.value == pytest.approx(found.cosine.value - found.shuffled.value)
    assert found.lift.low is not None
    assert found.lift.low > 0
    assert found.cosine.groups == 20
    images, texts = _embeddings(0.0, 20, 6, 2)
    deaf = measure_cosine(images, prompts, texts, names, "constructed")
    assert deaf.lift.low is not None
    assert deaf.lift.high is not None
    assert deaf.lift.low < 0 < deaf.lift.high
    # High all the same: why a cosine is never shown without the shuffled one.
    assert deaf.cosine.value > 0.3
    assert "no polyp" in found.warning


def test_the_interval_covers_when_images_of_a_prompt_are_alike() -> None:
    """Prompts are what is sampled: their means differ more than their images do."""
    generator, covered, trials = torch.Generator().manual_seed(3), 0, 200
    names = [f"{i}" for i in range(30)]
    prompts = [name for name in names for _ in range(5)]
    texts = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    for _ in range(trials):
        level = 0.3 + 0.2 * torch.randn(30, generator=generator).repeat_interleave(5)
        own = texts.repeat_interleave(5, dim=0)
        images = level[:, None] * own + 0.01 * torch.randn(150, 8, generator=generator)
        found = measure_cosine(images, prompts, texts, names, "constructed").cosine
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.3 <= found.high
    assert covered / trials >= 0.9


def test_what_is_no_clip_is_refused_in_a_sentence(random_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        check_clip(tmp_path, "nowhere")
    other = tmp_path / "vit"
    other.mkdir()
    for name in ("preprocessor_config.json", "tokenizer_config.json", "model.safetensors"):
        (other / name).write_bytes(b"{}")
    (other / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(BadInput, match="is a vit, which does not embed images and texts"):
        load_clip(other, "vit")
    (other / "config.json").write_bytes((random_clip / "config.json").read_bytes())
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_clip(other, "broken")
    with pytest.raises(BadInput, match="at least two different prompts"):
        measure_cosine(torch.ones(2, 3), ["a", "a"], torch.ones(1, 3), ["a"], "constructed")
