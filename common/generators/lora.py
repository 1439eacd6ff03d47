"""PEFT adapters in a frozen network: put in by name, started from a public seed, named as PEFT names them.

An adapter's tensors are called `<module>.lora_A.weight` and `<module>.lora_B.weight`, where `<module>` is the
adapted layer's name in the network; PEFT's name of the adapter itself (`default`) is left out.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from polyclinic.common.generators.base import ADAPTER, Tensors, named
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.generator_settings import LoraSettings


def add_adapters(
    module: nn.Module,
    settings: LoraSettings,
    seed: int,
    *,
    freeze_a: bool,
    rank: int | None = None,
    excluded: Sequence[str] = (),
) -> None:
    """Freeze a network and put adapters into it; place it on its device before.

    The start is the base itself: B is zero, and A is drawn from N(0, 1/rank^2), PEFT's "gaussian" start.

    Args:
        module: The network; its modules keep their names, none is wrapped.
        settings: Rank, alpha and targets.
        rank: A site's own, at most the study's: it holds the first components, at the study's scale.
        seed: Public seed of A; the same numbers on every machine.
        freeze_a: A does not train: the average of sites' B is then the average of their products.
        excluded: Names of layers that a target matches and that cannot move the output.

    Raises:
        BadInput: A target matches no layer, or the rank is more than a layer or the study has.
    """
    found = _matching(module, settings, excluded)
    rank = settings.rank if rank is None else rank
    if rank > settings.rank:
        raise BadInput(
            f"a rank of {rank} is over the limit of the study: generator.lora.rank = {settings.rank}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=settings.alpha * rank / settings.rank,
        target_modules=list(found),
        init_lora_weights=False,
    )
    module.requires_grad_(False)
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = True  # type: ignore[assignment]  # what diffusers' add_adapter does
    for name, parameter in named(module).items():
        part = "A" if name.endswith(".lora_A.weight") else "B" if name.endswith(".lora_B.weight") else ""
        if not part:
            continue
        # PEFT makes them in the base's type; noise and optimizer want fp32.
        parameter.data = parameter.data.float()
        parameter.requires_grad_(part == "B" or not freeze_a)
        if parameter.device.type != "meta":
            with torch.no_grad():
                parameter.zero_()
                if part == "A":
                    whole = (settings.rank, *parameter.shape[1:])
                    parameter.copy_(_start(seed, name, whole)[:rank])


def adapter_state(module: nn.Module) -> Tensors:
    """Copy all adapter tensors, trained or not: name to fp32 on the CPU."""
    return {
        name: p.detach().to("cpu", torch.float32, copy=True)
        for name, p in sorted(named(module).items())
        if ".lora_" in name
    }


def adapter_config(module: nn.Module, network: nn.Module) -> LoraConfig:
    """The configuration by which PEFT puts one network's adapters into it, as `add_adapters` put them in."""
    whole: LoraConfig = module.peft_config[ADAPTER]  # type: ignore[index]
    names = [path for path, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    return LoraConfig(r=whole.r, lora_alpha=whole.lora_alpha, target_modules=names, init_lora_weights=False)


def merged_copy(module: nn.Module) -> nn.Module:
    """Copy a network with its adapters added to its weights; what is left is the plain network."""
    whole = copy.deepcopy(module)
    for path, layer in list(whole.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            owner, _, name = path.rpartition(".")
            setattr(whole.get_submodule(owner), name, layer.get_base_layer())
    for trace in ("peft_config", "_hf_peft_config_loaded"):
        vars(whole).pop(trace, None)
    return whole.requires_grad_(True)


def adapter_layers(module: nn.Module) -> list[Any]:
    """List the layers that have an adapter."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _matching(module: nn.Module, settings: LoraSettings, excluded: Sequence[str]) -> dict[str, nn.Module]:
    """Find the layers that the targets name, as PEFT does: by whole name or end of name."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    found: dict[str, nn.Module] = {}
    for target in settings.targets:
        hits = {n: m for n, m in layers.items() if n == target or n.endswith(f".{target}")}
        if not hits:
            ends = sorted({".".join(n.split(".")[-2 if n[-1].isdigit() else -1 :]) for n in layers})
            raise BadInput(
                f'`generator.lora.targets`: "{target}" matches no layer of this model; its layers end in '
                f"{', '.join(ends)}"
            )
        found |= {n: m for n, m in hits.items() if n not in excluded}
    name, layer = min(found.items(), key=lambda item: min(_sides(item[1])))
    if settings.rank > min(_sides(layer)):
        raise BadInput(
            f"`generator.lora.rank = {settings.rank}` is over the limit of {min(_sides(layer))}, the smaller "
            f"side of {name}; lower the rank or leave that layer out of generator.lora.targets"
        )
    return dict(sorted(found.items()))


def _sides(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def _start(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw A by its name: numpy's Philox gives the same numbers everywhere, in any order of layers."""
    key = int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:16], "big")
    normal = np.random.Generator(np.random.Philox(key)).standard_normal(shape)
    return torch.from_numpy(normal / shape[0]).float()
