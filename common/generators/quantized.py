"""A large model's frozen weights in 8 or 4 bits while it trains, through diffusers' own quantization.

Both ways round weights alone, so that what a row of a batch gives depends on no other row. bitsandbytes'
8-bit layers do not: they choose columns by the largest activation of the whole batch (Dettmers et al. 2022,
2208.07339), by which one patient would change another's gradient. Hence torchao's, which also run on a CPU.
NF4 is bitsandbytes' (Dettmers et al. 2023, 2305.14314), which diffusers loads on a GPU only.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.generator_settings import GeneratorSettings

# Bytes a weight, and a scale in fp32 for each output or each 64 weights.
BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
SCALE_BYTES = 4
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
NEEDS_GPU: tuple[str, ...] = ("nf4",)


def check_quantized(settings: GeneratorSettings, device: str) -> None:
    """Look whether a study's frozen weights can be had on this machine as it wants them.

    Raises:
        BadInput: A package is not installed, or no such weights are known to this device.
    """
    kind = settings.quantize
    if kind == "none":
        return
    if kind in NEEDS_GPU and device != "cuda":
        raise BadInput(
            f'`generator.quantize = "nf4"` needs an NVIDIA GPU, and this site trains on {device}: diffusers '
            'loads 4-bit weights nowhere else; the study may say "int8" or "none"'
        )
    if find_spec(PACKAGES[kind]) is None:
        raise BadInput(
            f'`generator.quantize = "{kind}"` needs the package {PACKAGES[kind]}, which is not installed; '
            'install it with `pip install "polyclinic[quantized]"`'
        )


def loading(settings: GeneratorSettings, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments by which diffusers loads a network as `generator.quantize` says; it is placed thereby.

    Args:
        settings: The study's generator table.
        dtype: What the network computes in, and what its other weights are.
        device: Where it will be.

    Raises:
        BadInput: As `check_quantized`.
    """
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    check_quantized(settings, device)
    if settings.quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
        # With a map to a CPU, diffusers takes the weights for offloaded ones and leaves them whole.
        return {"quantization_config": config} | ({} if device == "cpu" else {"device_map": {"": device}})
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def saved_bytes(module: nn.Module, settings: GeneratorSettings) -> int:
    """Bytes by which `generator.quantize` makes a network's frozen weights smaller.

    Args:
        module: The network with its adapters, not quantized; it may be on the meta device.
        settings: The study's generator table.
    """
    if settings.quantize == "none":
        return 0
    saved = 0.0
    for weight in _frozen(module):
        scales = SCALE_BYTES * len(weight) if settings.quantize == "int8" else 0
        saved += weight.nbytes - BYTES[settings.quantize] * weight.numel() - scales
    return round(saved)


def widened_bytes(module: nn.Module, settings: GeneratorSettings) -> int:
    """Most that frozen weights take at once in a step, widened again to what the network computes in.

    nf4's backward pass widens a layer once more; int8's keeps what the forward pass widened: of all layers,
    or with checkpointing of those of one block.

    Args:
        module: As in `saved_bytes`.
        settings: As there.
    """
    if settings.quantize == "none":
        return 0
    if settings.quantize == "nf4":
        return max(weight.nbytes for weight in _frozen(module))
    blocks = [module]
    if settings.gradient_checkpointing:
        blocks = [block for m in module.modules() if isinstance(m, nn.ModuleList) for block in m]
    return max(sum(weight.nbytes for weight in _frozen(block)) for block in blocks)


def _frozen(module: nn.Module) -> list[torch.Tensor]:
    """Weights of the linear layers that are no adapters."""
    layers = (m for name, m in module.named_modules() if ".lora_" not in name)
    return [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
