"""Any vision transformer or network in Hugging Face form as an extractor: a local folder, or a named id.

RAD-DINO and DINOv2 (CLS token), BiomedCLIP's ViT (CLS token of the last hidden state, as the MedVQA-GI
scorer takes it), or a convolutional network (mean over positions). Weights are safetensors; no code that
comes with them is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyclinic.common.features.extractor import Extractor
from polyclinic.common.files import sha256_folder
from polyclinic.common.refusals import BadInput

Pooling = Literal["cls", "mean"]
FILES = ("config.json", "preprocessor_config.json")


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that holds no vision model in Hugging Face form.

    Raises:
        BadInput: Configuration, preprocessing or safetensors are missing.
    """
    missing = [file for file in FILES if not (folder / file).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("a .safetensors file")
    if missing:
        raise BadInput(
            f'`evaluation.extractors`: "{name}" holds no {" and no ".join(missing)}; name the folder of a '
            "vision model that was saved with its image processor as safetensors"
        )


def hub_extractor(folder: Path, name: str, pooling: Pooling, device: str = "cpu") -> Extractor:
    """Build the extractor.

    Args:
        folder: Where the files are.
        name: What the study calls it: an id, or the folder.
        pooling: Which part of the last hidden state: the first token, or the mean over the others.
        device: Where to compute.

    Raises:
        BadInput: Files are missing, or the model has no image features of a known form.
    """
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    check_folder(folder, name)
    logging.set_verbosity_error()  # it recommends torchvision, for which the pinned torch has no build
    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        model: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BadInput(
            f'`evaluation.extractors`: "{name}" cannot be loaded ({type(error).__name__}); '
            "name a vision model that transformers knows without code of its own"
        ) from error
    model = getattr(model, "vision_model", model).eval().requires_grad_(False).float().to(device)
    # Tokens before the patches: CLS, and the registers of some DINOv2 models.
    extra = 1 + int(getattr(model.config, "num_register_tokens", 0) or 0)

    def forward(images: Tensor) -> Tensor:
        broken = ~images.isfinite().flatten(1).all(dim=1)
        whole = (255 * images.nan_to_num(0.0).clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pixels = processor(images=list(np.ascontiguousarray(whole)), return_tensors="pt")["pixel_values"]
        features = pooled(model(pixel_values=pixels.to(device)).last_hidden_state, pooling, extra)
        features[broken] = torch.nan
        return features

    with torch.inference_mode():
        try:
            width = forward(torch.zeros(1, 3, 64, 64)).shape[1]
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput(
                f'`evaluation.extractors`: "{name}" gives no features for an image '
                f"({type(error).__name__}: {str(error)[:100]}); name a vision model"
            ) from error
    settings = {
        key: value for key, value in sorted(processor.to_dict().items()) if not key.startswith(("_", "data"))
    }
    which = "first token" if pooling == "cls" else "mean over patches"
    return Extractor(
        name=f"{name} ({which})",
        width=width,
        preprocessing=f"RGB rounded to 8 bits; its own image processor {settings}; {which} of the last state",
        weights=sha256_folder(folder),
        forward=forward,
        device=device,
    )


def pooled(state: Tensor, pooling: Pooling, extra: int) -> Tensor:
    """One row an image from a last hidden state.

    Args:
        state: [B, tokens, d] of a transformer, or [B, d, h, w] of a convolutional network, which is
            always averaged.
        pooling: First token, or mean over the patches.
        extra: Tokens before the patches.
    """
    if state.ndim == 4:
        return state.mean(dim=(2, 3))
    if state.ndim != 3:
        raise ValueError(f"expected a last hidden state of 3 or 4 dimensions, got {state.ndim}")
    return state[:, 0] if pooling == "cls" else state[:, extra:].mean(dim=1)
