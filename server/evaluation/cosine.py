"""Mean cosine between drawn images and their prompts under a CLIP-type model that the study names.

The score of Hessel et al. 2021 (CLIPScore, arXiv 2104.08718) without its factor 2.5 and its cut at 0,
computed from the model's own projected embeddings. Beside it the same images against every *other* prompt:
a cosine alone says nothing, since its level depends on model and domain.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.evaluation_settings import EvaluationSettings
from polyclinic.common.files import sha256_folder
from polyclinic.common.generators.public import resolve
from polyclinic.common.progress import track
from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.bootstrap import draw_weights, group_counts
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.features import check_finite
from polyclinic.server.evaluation.results import PromptCosine

FIELD = "evaluation.clip_model"
# Raise it whenever a number would change for the same images.
PROTOCOL = "polyclinic-cosine-1"
INTERVAL = "95 % Bayesian bootstrap over prompts"
WARNING = (
    'Such a model hardly tells "no polyp" from "a polyp": it sees what a prompt names, not that it is '
    "denied. Trust the probes' rows for negations, and read this score only against the shuffled one."
)
# Each may have one of several names: transformers 5 writes image processor and tokenizer together.
_FILES = (
    ("config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer_config.json", "tokenizer.json"),
)
_AT_ONCE = 32


class ClipModel(NamedTuple):
    """A model that embeds images and texts in one space.

    Attributes:
        name: What the study calls it.
        model: `get_image_features` and `get_text_features`, in eval mode.
        processor: Its image processor and tokenizer.
        device: Where it computes.
        weights: SHA-256 of its folder: weights, image processor and tokenizer.
    """

    name: str
    model: Any
    processor: Any
    device: str
    weights: str


def check_clip(folder: Path, name: str) -> None:
    """Refuse a folder that holds no CLIP-type model, without loading it.

    Raises:
        BadInput: Files are missing, or the configuration has no text and image part.
    """
    missing = [names[0] for names in _FILES if not any((folder / name).is_file() for name in names)]
    if not list(folder.glob("*.safetensors")):
        missing.append("a .safetensors file")
    if missing:
        raise BadInput(
            f'`{FIELD} = "{name}"` holds no {" and no ".join(missing)}; name the folder of a CLIP-type model '
            "that was saved with its processor as safetensors"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not {"text_config", "vision_config"} <= config.keys():
        raise BadInput(
            f'`{FIELD} = "{name}"` is a {config.get("model_type", "model of unknown type")}, which does not '
            "embed images and texts in one space; name a CLIP-type model"
        )


def prompt_cosine(
    images: Tensor, prompts: Sequence[str], settings: EvaluationSettings, device: str
) -> PromptCosine | None:
    """Measure what `evaluation.clip_model` asks for; None where it names no model.

    Args:
        images: [N, 3, H, W] in [0, 1].
        prompts: Prompt of each.
        settings: Names the model.
        device: Where to compute.

    Raises:
        BadInput: The model is not there, is not such a model, or gives embeddings that are not finite.
    """
    if settings.clip_model is None:
        return None
    folder = resolve(settings.clip_model, settings.clip_revision, FIELD)
    clip, names = load_clip(folder, settings.clip_model, device), list(dict.fromkeys(prompts))
    embedded, texts = image_embeddings(clip, images), text_embeddings(clip, names)
    drawn = [f"drawn image {number}" for number in range(1, len(images) + 1)]
    for rows, shown in ((embedded, drawn), (texts, [f'the prompt "{name[:60]}"' for name in names])):
        check_finite(clip.name, rows, shown, f"name another {FIELD}")
    return measure_cosine(embedded, prompts, texts, names, settings.clip_model, clip.weights)


@functools.lru_cache(maxsize=1)
def load_clip(folder: Path, name: str, device: str = "cpu") -> ClipModel:
    """Load a CLIP-type model from a folder; no code that comes with it is run.

    Raises:
        BadInput: It is not there, or is not such a model.
    """
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    check_clip(folder, name)
    logging.set_verbosity_error()  # it recommends torchvision, for which the pinned torch has no build
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor: Any = AutoProcessor.from_pretrained(folder, **where)
        model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, **where)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BadInput(
            f'`{FIELD} = "{name}"` cannot be loaded ({type(error).__name__}); name a CLIP-type model that '
            "transformers knows without code of its own"
        ) from error
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise BadInput(f'`{FIELD} = "{name}"` does not embed images and texts; name a CLIP-type model')
    weights = sha256_folder(folder)
    return ClipModel(name, model.eval().requires_grad_(False).float().to(device), processor, device, weights)


def image_embeddings(clip: ClipModel, images: Tensor) -> Tensor:
    """Embed RGB images [N, 3, H, W] in [0, 1], rounded to 8 bits; rows of length 1, [N, d], on the CPU."""
    parts = []
    with track(f"embeddings, {clip.name}", len(images)) as advance, torch.inference_mode():
        for batch in images.split(_AT_ONCE):
            whole = (255 * batch.float().clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            given = clip.processor(images=list(np.ascontiguousarray(whole)), return_tensors="pt")
            parts.append(
                _unit(clip.model.get_image_features(pixel_values=given["pixel_values"].to(clip.device)))
            )
            advance(len(batch))
    return torch.cat(parts)


def text_embeddings(clip: ClipModel, texts: Sequence[str]) -> Tensor:
    """Embed texts, cut to what the model reads; rows of length 1, [N, d], on the CPU."""
    # SigLIP was trained on texts padded to its whole length and has no mask; the others mask padding.
    masked = "attention_mask" in clip.processor.tokenizer.model_input_names
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), _AT_ONCE):
            given = clip.processor(
                text=list(texts[start : start + _AT_ONCE]),
                return_tensors="pt",
                padding=True if masked else "max_length",
                truncation=True,
                max_length=clip.model.config.text_config.max_position_embeddings,
            )
            known = {k: v.to(clip.device) for k, v in given.items() if k in ("input_ids", "attention_mask")}
            parts.append(_unit(clip.model.get_text_features(**known)))
    return torch.cat(parts)


def _unit(output: Any) -> Tensor:
    # transformers 5 returns an output object whose pooled state is the projection.
    embedded: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(embedded.double(), dim=-1).cpu()


def measure_cosine(
    images: Tensor, prompts: Sequence[str], texts: Tensor, names: Sequence[str], model: str, weights: str = ""
) -> PromptCosine:
    """Mean cosine of images with their own prompts, with all other prompts, and the difference.

    Args:
        images: Image embeddings of length 1, [n, d].
        prompts: Prompt of each image.
        texts: Text embeddings of length 1, one a prompt, [p, d], p >= 2.
        names: The p different prompts.
        model: Name of the model.
        weights: SHA-256 of its folder.

    Raises:
        BadInput: There is only one prompt, so that nothing can be shuffled.
    """
    if len(names) < 2:
        raise BadInput(f"`{FIELD}` needs at least two different prompts, to compare with others' images")
    own_column = torch.tensor([list(names).index(prompt) for prompt in prompts])
    cosines = images.double() @ texts.double().T
    own = cosines.gather(1, own_column[:, None])[:, 0]
    shuffled = (cosines.sum(dim=1) - own) / (len(names) - 1)
    return PromptCosine(
        model=model,
        cosine=_mean(own, prompts),
        shuffled=_mean(shuffled, prompts),
        lift=_mean(own - shuffled, prompts),
        warning=WARNING,
        weights=weights,
        protocol=PROTOCOL,
    )


def _mean(values: Tensor, prompts: Sequence[str]) -> Estimate:
    """Mean over images, resampled by prompt."""
    bootstrap = draw_weights(prompts, "prompts")
    images, sums = group_counts(range(len(values)), values.tolist(), bootstrap)
    draws = (bootstrap.weights @ sums) / (bootstrap.weights @ images)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(
        value=float(values.mean()),
        low=low,
        high=high,
        interval=INTERVAL,
        n=len(values),
        groups=len(set(prompts)),
        floor=None,
        ratio=None,
    )
