"""A large model's adapters as files that plain diffusers and PEFT load, with a card that names their base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save

from polyclinic.common.files import write_atomic
from polyclinic.common.generators.base import ADAPTER
from polyclinic.common.generators.checkpoint import hash_checkpoint, licence
from polyclinic.common.generators.lora import adapter_state

if TYPE_CHECKING:
    from polyclinic.common.generators.large import LargeModel

BINDS = "Its terms bind these adapters, too; what counts is the licence that comes with the base."


def save_adapters(family: LargeModel, folder: Path) -> None:
    """Write the adapters and `README.md`.

    Where the family's pipeline knows adapters: `pytorch_lora_weights.safetensors`, for `load_lora_weights`.
    Else PEFT's own `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`.

    Args:
        family: With the adapters to write.
        folder: An existing folder.
    """
    state, config = adapter_state(family.module), family.module.peft_config[ADAPTER]
    if in_pipeline(family):
        values = {n: sorted(v) if isinstance(v, set) else v for n, v in config.to_dict().items()}
        part = {f"{family.part}_lora_layers": state, f"{family.part}_lora_adapter_metadata": values}
        family._class_of_pipeline().save_lora_weights(folder, **part)
    else:
        config.save_pretrained(folder)
        named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        write_atomic(folder / "adapter_model.safetensors", save(named, {"format": "pt"}))
    write_atomic(folder / "README.md", card(family).encode())


def in_pipeline(family: LargeModel) -> bool:
    """Whether diffusers' pipeline loads adapters into this denoiser by itself."""
    return hasattr(family._class_of_pipeline(), "load_lora_weights") and hasattr(
        family.module, "load_lora_adapter"
    )


def card(family: LargeModel) -> str:
    """Say in Markdown what the adapters belong to, under which terms, and how they are loaded."""
    settings, kind = family.settings, family.index["_class_name"]
    revision = settings.base_revision or "none: a folder"
    named = f', revision="{settings.base_revision}"' if settings.base_revision else ""
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "tags: [lora, text-to-image]",
            f"base_model: {settings.base}",
            "---",
            f"# Adapters of {settings.base}",
            "",
            "| | |",
            "|---|---|",
            f"| Base | `{settings.base}` |",
            f"| Revision | `{revision}` |",
            f"| Base (SHA-256 of the files that were read) | `{hash_checkpoint(family.folder)}` |",
            f"| Adapters | LoRA, rank {settings.lora.rank}, alpha {settings.lora.alpha:g}, "
            f"on {', '.join(settings.lora.targets)} |",
            "",
            f"**Licence of the base.** {licence(settings, family.folder)} {BINDS}",
            "",
            "```python",
            "import torch",
            f"from diffusers import {kind}",
            *([] if in_pipeline(family) else ["from peft import PeftModel"]),
            "",
            f'pipeline = {kind}.from_pretrained("{settings.base}"{named}, dtype={family.dtype})',
            *loading(family),
            "```",
            "",
        ]
    )


def loading(family: LargeModel) -> list[str]:
    """Python lines that load this folder into `pipeline`."""
    if in_pipeline(family):
        return ['pipeline.load_lora_weights("this folder")']
    part = f"pipeline.{family.part}"
    return [f'{part} = PeftModel.from_pretrained({part}, "this folder", autocast_adapter_dtype=False)']
