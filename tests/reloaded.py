"""A released checkpoint as others get it, and what tests know of the random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from polyclinic.simulation.random_checkpoints import prior_of


def generator_table(name: str, base: Path, **more: Any) -> dict[str, Any]:
    """A study's `generator` table that names the checkpoint."""
    prior = {"prior": str(prior_of(base))} if name == "kandinsky-2-2" else {}
    return {"family": FAMILY_OF[name], "base": str(base), "max_tokens": 8, **prior, **more}


def reloaded(base: Path, adapters: Path, dtype: torch.dtype) -> Any:
    """What a person has who follows the export's README: plain diffusers alone."""
    from diffusers import DiffusionPipeline, KandinskyV22CombinedPipeline
    from peft import PeftModel

    if prior_of(base).exists():
        decoder, prior = (
            DiffusionPipeline.from_pretrained(path, dtype=dtype) for path in (base, prior_of(base))
        )
        for owner, part, place in ((decoder, "unet", "unet"), (prior, "prior", "prior_prior")):
            network = PeftModel.from_pretrained(
                getattr(owner, part), adapters / place, autocast_adapter_dtype=False
            )
            owner.register_modules(**{part: network})
        priors = {f"prior_{name}": component for name, component in prior.components.items()}
        return KandinskyV22CombinedPipeline(**decoder.components, **priors)
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=dtype)
    if (adapters / "adapter_config.json").exists():
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, adapters, autocast_adapter_dtype=False)
    else:
        pipeline.load_lora_weights(adapters)
    return pipeline


FAMILY_OF = {
    "stable-diffusion": "stable-diffusion",
    "stable-diffusion-2-1": "stable-diffusion",
    "stable-diffusion-xl": "stable-diffusion",
    "stable-diffusion-3": "stable-diffusion-3",
    "flux": "flux",
    "flux-schnell": "flux",
    "kandinsky-2-2": "kandinsky-2-2",
    "kandinsky-3": "kandinsky-3",
}
SIZE_OF = {"kandinsky-2-2": 64, "kandinsky-3": 64}
