"""The large models that a study may name as `generator.family`: facts only, for settings to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyclinic.common.study import Study

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BOTH_STREAMS = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Facts:
    """What is known of a family before anything is loaded.

    Attributes:
        maker: `module:class` under `common.generators`.
        pipelines: diffusers' pipelines that its checkpoints say they are.
        example: A Hugging Face id of it.
        licence: Terms of its published bases, in a sentence.
        targets: Layers that get adapters unless the study says otherwise.
        snr_gamma: Min-SNR weighting of its released fine-tuning.
        prompt_dropout: Share of views without a prompt; 0 where drawing has no other guidance.
        tokenizer: Folder of the tokenizer that cuts a prompt.
        tokens: Where it cuts; None where `generator.max_tokens` says.
        priors: Pipelines that the checkpoint of its prior may say it is, where it has one.
        distilled: Terms of a base that takes guidance as an input, where they are others.
    """

    maker: str
    pipelines: tuple[str, ...]
    example: str
    licence: str
    targets: tuple[str, ...] = ATTENTION
    snr_gamma: float | None = None
    prompt_dropout: float = 0.1
    tokenizer: str = "tokenizer"
    tokens: int | None = None
    distilled: str = ""
    priors: tuple[str, ...] = ()


FAMILIES: dict[str, Facts] = {
    "stable-diffusion": Facts(
        "stable_diffusion:StableDiffusion",
        ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Stable Diffusion 1 is published under CreativeML Open RAIL-M, 2 and XL under Open RAIL++-M: "
        "commercial use is allowed, the uses it lists (medical advice among them) are not.",
        tokens=77,
    ),
    "stable-diffusion-3": Facts(
        "stable_diffusion_3:StableDiffusion3",
        ("StableDiffusion3Pipeline",),
        "stabilityai/stable-diffusion-3.5-medium",
        "Stable Diffusion 3 and 3.5 are published under the Stability AI Community License: free for "
        "research and for those who earn less a year than it says; others need a licence of Stability AI.",
        BOTH_STREAMS,
        tokenizer="tokenizer_3",
    ),
    "kandinsky-2-2": Facts(
        "kandinsky_2_2:Kandinsky22",
        ("KandinskyV22Pipeline",),
        "kandinsky-community/kandinsky-2-2-decoder",
        "Kandinsky 2.2 is published under Apache-2.0.",
        snr_gamma=5.0,
        tokens=77,
        priors=("KandinskyV22PriorPipeline",),
    ),
    "kandinsky-3": Facts(
        "kandinsky_3:Kandinsky3",
        ("Kandinsky3Pipeline",),
        "kandinsky-community/kandinsky-3",
        "Kandinsky 3 is published under Apache-2.0.",
        snr_gamma=5.0,
        tokens=128,
    ),
    "flux": Facts(
        "flux:Flux",
        ("FluxPipeline",),
        "black-forest-labs/FLUX.1-schnell",
        "FLUX.1 [schnell] is published under Apache-2.0.",
        BOTH_STREAMS,
        prompt_dropout=0.0,
        tokenizer="tokenizer_2",
        distilled="FLUX.1 [dev] is published under the FLUX.1 [dev] Non-Commercial License: the model and "
        "what is derived from it, these adapters among it, may be used for non-commercial and research "
        "purposes only; any other use, in a clinic's service too, needs a licence of Black Forest Labs.",
    ),
}

# Families that people ask for and that cannot be had here: why, and what to take.
ABSENT = {
    "kandinsky-5": "the image pipeline of the installed diffusers reads prompts through Qwen2VLProcessor, "
    "which needs torchvision, of which there is no CPU build for the pinned torch; take kandinsky-3",
}


def freezes_a(study: Study) -> bool:
    """Whether the adapters' A is frozen: drawn once from the public seed, part of the base."""
    return study.generator.large and getattr(study.federation, "lora_aggregation", "") == "freeze-a"
