"""What lora_aggregation.py trains on: phantoms, a small Stable Diffusion that knows some of them, a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.common.data.cache import Cached, build_cache, load_cache
from polyclinic.common.data.pixels import load_pixels
from polyclinic.common.data.table import Record
from polyclinic.common.drawing import sample
from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.generators.base import Tensors, Views, load_family, named
from polyclinic.common.generators.checkpoint import large_files
from polyclinic.common.generators.lora import merged_copy
from polyclinic.common.generators.public import resolve
from polyclinic.common.plain_engine import PlainEngine
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.views import draw_views
from polyclinic.common.progress import track
from polyclinic.common.settings import LoraRule
from polyclinic.common.study import Study, parse_study
from polyclinic.server.evaluation.fidelity import grouped_kid
from polyclinic.server.reference import split_reference
from polyclinic.simulation.data import make_federation

KEY = "lora-aggregation"
CONCEPTS = ("polyp", "instrument", "overlay")
NEW = CONCEPTS[1:]  # what the base has not seen
SITES = ("coast", "north", "valley")
RANK, EPSILON, BASE_RATE = 8, 8.0, 1e-3


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        patients_per_site: Drawn for each clinic, before the reference is held out.
        declared: Declared patients of a site.
        base_steps: Steps that train the base.
        rounds: Of a federation.
        steps: A site takes in a round.
        seeds: Repetitions with another A, other patients, views and noise.
        views: Held out, a patient, for the loss.
        draws: Images a prompt.
        sampling_steps: Of an image.
    """

    patients_per_site: int
    declared: int
    base_steps: int
    rounds: int
    steps: int
    seeds: int
    views: int
    draws: int
    sampling_steps: int


def study_of(base: Path, sizes: Sizes, rate: float, rule: LoraRule = "factors", **privacy: Any) -> Study:
    """Write the study of one way; all differ in what is named here alone."""
    prompts = [
        _caption(dict(zip(CONCEPTS, shown, strict=True))) for shown in product(("yes", "no"), repeat=3)
    ]
    return parse_study(
        {
            "name": KEY,
            "data": {"source": "phantoms", "image_size": 64,
                     "phantoms": {"patients_per_site": sizes.patients_per_site, "seed": 1}},
            "generator": {"family": "stable-diffusion", "base": str(base), "precision": "fp32",
                          "gradient_checkpointing": False, "lora": {"rank": RANK}},
            "privacy": {"delta": 1e-4, "clip": 0.01, "sampling_rate": 0.15, "views": 1, "micro_batch": 64,
                        "epsilon": EPSILON, "canaries": 0, **privacy},
            "training": {"rounds": sizes.rounds, "steps_per_round": sizes.steps, "learning_rate": rate,
                         "device": "cpu"},
            "federation": {"lora_aggregation": rule, "transport": "fp32"},
            "reference": {"fraction": 0.3, "pretrain": 0.5, "probe": 0.0, "evaluate": 0.5},
            "simulation": {"sites": {site: {"declared_patients": sizes.declared} for site in SITES}},
            "evaluation": {"steps": sizes.sampling_steps, "guidance": 3.0, "batch_size": 96,
                           "draws": sizes.draws, "prompts": [{"text": text} for text in prompts]},
        },
        KEY,
    )  # fmt: skip


def _caption(labels: dict[str, str]) -> str:
    return " ".join(concept if labels[concept] == "yes" else f"no {concept}" for concept in CONCEPTS)


def captioned(records: Sequence[Record]) -> list[Record]:
    """Say of each image what it shows of the concepts, and nothing else."""
    return [replace(record, captions=(_caption(record.labels),)) for record in records]


def untrained(folder: Path) -> None:
    """Save a Stable Diffusion of the phantoms' own autoencoder, with random weights everywhere else."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    # Words that are one token each: byte pairs join a word's letters from the left.
    words, merges = ["<|startoftext|>", "<|endoftext|>"], []
    for word in ("no", *CONCEPTS):
        left, *rest = [*word[:-1], f"{word[-1]}</w>"]
        words += [left, *rest]
        for letter in rest:
            merges.append((left, letter))
            left += letter
            words.append(left)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=16,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(resolve("package:phantom/vae", None, "generator.vae")),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16),
        unet=UNet2DConditionModel(
            sample_size=8, in_channels=8, out_channels=8, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=64, attention_head_dim=4, norm_num_groups=16,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def train_base(folder: Path, records: Sequence[Record], sizes: Sizes, home: Path) -> None:
    """Make the base: the whole network, trained on public images without what the sites will teach it."""
    untrained(folder)
    study = study_of(folder, sizes, BASE_RATE, enabled=False)
    training = {"rounds": 1, "steps_per_round": sizes.base_steps, "schedule": "cosine"}
    study = study.model_copy(update={"training": study.training.model_copy(update=training)})
    family = load(study, encoders=True)
    data = _cached(records, family, home)
    for name, parameter in named(family.module).items():
        parameter.requires_grad_(".lora_" not in name)
    engine = PlainEngine(family, data, study, KeyedRandom.for_test(KEY, "base", 0), device="cpu")
    with track("train the base", sizes.base_steps) as bar:
        for step in range(sizes.base_steps):
            engine.step(step)
            bar()
    network: Any = merged_copy(family.module)
    network.save_pretrained(folder / "unet")


def _cached(records: Sequence[Record], family: Any, home: Path) -> Cached:
    folder = home / "cache"
    return load_cache(folder, build_cache(list(records), family, family.study.data, folder))


def load(study: Study, *, encoders: bool = False, rank: int | None = None) -> Any:
    return load_family(study, large_files(study.generator), encoders=encoders, rank=rank)


@dataclass(frozen=True)
class Judge:
    """Held-out phantoms, and how adapters are measured on them.

    Attributes:
        family: Loaded with its encoders.
        views: Held-out views, the same for everyone.
        features: Of the held-out images.
        patients: Of each of them.
    """

    family: Any
    views: Views
    features: Tensor
    patients: list[str]

    def loss(self, state: Tensors) -> float:
        """Objective on the held-out views: the same images, prompts, noise and timesteps for everyone."""
        place(self.family.module, state)
        flat = {name: tensor.flatten(0, 1) for name, tensor in self.views.tensors().items()}
        total, count = 0.0, len(flat["uniform"])
        with torch.no_grad():
            for start in range(0, count, 256):
                part = Views.of({name: tensor[start : start + 256] for name, tensor in flat.items()})
                total += float(self.family.view_losses(part).sum())
        return total / count

    def kid(self, state: Tensors) -> float:
        """KID of images drawn for every combination of concepts, by the package's public features."""
        place(self.family.module, state)
        settings = self.family.study.evaluation
        wanted = [(p.text, draw) for p in settings.prompts for draw in range(settings.draws)]
        drawn = efficientnet().extract(sample(self.family, self.family.study, wanted, "draw"))
        return float(grouped_kid(drawn, self.features, [text for text, _ in wanted], self.patients).value)


def prepare(base: Path, home: Path, sizes: Sizes) -> tuple[Judge, dict[str, Cached]]:
    """Draw the phantoms, make the base, and encode what the sites train on and what is held out, once."""
    study = study_of(base, sizes, BASE_RATE)
    federation = make_federation(study, home, None)
    reference = split_reference(study, federation.reference)
    seen = [record for record in reference.pretrain if all(record.labels[c] == "no" for c in NEW)]
    train_base(base, captioned(seen), sizes, home)
    family, held_out = load(study, encoders=True), captioned(reference.evaluate)
    data = _cached(held_out, family, home)
    views = draw_views(
        KeyedRandom.for_test(KEY, "held out", 0),
        data,
        range(len(data.patients)),
        step=0,
        views=sizes.views,
        normal_shape=family.normal_shape(data.image),
        prompt_dropout=0.0,
    )
    pixels = load_pixels(held_out, study.data.image_size, study.data.fit)
    features = efficientnet().extract((pixels + 1) / 2)
    judge = Judge(family, views, features, [record.patient for record in held_out])
    return judge, {site: _cached(captioned(federation.sites[site]), family, home) for site in SITES}


@torch.no_grad()
def place(module: Any, state: Tensors) -> None:
    """Write adapters, trained and frozen ones, into a network."""
    parameters = named(module)
    for name, tensor in state.items():
        parameters[name].copy_(tensor)
