"""A large model's adapters as files that plain diffusers and PEFT load, with a card that names their base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save

from polyclinic.common.files import write_atomic
from polyclinic.common.generators.base import ADAPTER
from polyclinic.common.generators.checkpoint import class_of, hash_checkpoint, licence
from polyclinic.common.generators.lora import adapter_config, adapter_state

if TYPE_CHECKING:
    from polyclinic.common.generators.large import LargeModel

BINDS = "Its terms bind these adapters, too; what counts is the licence that comes with the base."


def save_adapters(family: LargeModel, folder: Path) -> None:
    """Write the adapters and `README.md`.

    Where the family's pipeline knows adapters: `pytorch_lora_weights.safetensors`, for `load_lora_weights`.
    Else PEFT's own `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`,
    in a folder for each network where there are several.

    Args:
        family: With the adapters to write.
        folder: An existing folder.
    """
    if in_pipeline(family):
        state, config = adapter_state(family.module), family.module.peft_config[ADAPTER]
        values = {n: sorted(v) if isinstance(v, set) else v for n, v in config.to_dict().items()}
        layers = {f"{family.part}_lora_layers": state, f"{family.part}_lora_adapter_metadata": values}
        class_of(family.folder).save_lora_weights(folder, **layers)
    else:
        for part, network in family.networks().items():
            place = folder / place_of(family, part)
            place.mkdir(exist_ok=True)
            adapter_config(family.module, network).save_pretrained(place)
            named = {f"base_model.model.{name}": tensor for name, tensor in adapter_state(network).items()}
            write_atomic(place / "adapter_model.safetensors", save(named, {"format": "pt"}))
    write_card(family, folder)


def place_of(family: LargeModel, part: str) -> str:
    """Folder of one network's adapters in an export: the export itself where there is but one."""
    return part if len(family.networks()) > 1 else "."


def in_pipeline(family: LargeModel) -> bool:
    """Whether diffusers' pipeline loads adapters into this denoiser by itself."""
    return hasattr(class_of(family.folder), "load_lora_weights") and hasattr(
        family.module, "load_lora_adapter"
    )


def write_card(family: LargeModel, folder: Path, *, merged: bool = False) -> None:
    """Write `README.md`: what the adapters belong to, under which terms, and how they are loaded."""
    settings = family.settings
    parts = [("Base", settings.base, settings.base_revision, family.files.pipeline)]
    if family.files.prior is not None:
        parts.append(("Prior", settings.prior, settings.prior_revision, family.files.prior))
    rows = []
    for name, source, revision, place in parts:
        rows += [
            f"| {name} | `{source}` |",
            f"| Revision | `{revision or 'none: a folder'}` |",
            f"| {name} (SHA-256 of the files that were read) | `{hash_checkpoint(place)}` |",
        ]
    kind = "The whole pipeline, adapters merged" if merged else "Adapters"
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [lora, text-to-image]",
        f"base_model: {settings.base}",
        "---",
        f"# {kind} of {settings.base}",
        "",
        "| | |",
        "|---|---|",
        *rows,
        f"| Adapters | LoRA, rank {settings.lora.rank}, alpha {settings.lora.alpha:g}, "
        f"on {', '.join(settings.lora.targets)} |",
        "",
        f"**Licence of the base.** {licence(settings, family.folder)} {BINDS}",
        "",
        "```python",
        *(_whole(family) if merged else family.usage()),
        "```",
        "",
    ]
    write_atomic(folder / "README.md", "\n".join(lines).encode())


def usage(family: LargeModel) -> list[str]:
    """Python lines that load the base, then this folder into it, as `pipeline`."""
    settings, kind = family.settings, family.index["_class_name"]
    named = f', revision="{settings.base_revision}"' if settings.base_revision else ""
    part = f"pipeline.{family.part}"
    return [
        "import torch",
        f"from diffusers import {kind}",
        *([] if in_pipeline(family) else ["from peft import PeftModel"]),
        "",
        f'pipeline = {kind}.from_pretrained("{settings.base}"{named}, dtype={family.dtype})',
        'pipeline.load_lora_weights("this folder")'
        if in_pipeline(family)
        else f'{part} = PeftModel.from_pretrained({part}, "this folder", autocast_adapter_dtype=False)',
    ]


def _whole(family: LargeModel) -> list[str]:
    return [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("this folder", dtype={family.dtype})',
    ]
