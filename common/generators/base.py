"""The one small interface every generator family implements; all else is written once against it.

A family knows how to load its public base, encode an image and a caption into cached tensors
(once, without gradient), compute per-view losses from cached tensors, expose its trainable
state, and assemble a diffusers pipeline for sampling and export.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from polyclinic.common.generators.families import FAMILIES
from polyclinic.common.generators.public import load_start
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.evaluation_settings import EvaluationSettings
    from polyclinic.common.study import Study

Tensors = dict[str, Tensor]

# What PEFT calls the one adapter of a network.
ADAPTER = "default"


@dataclass
class Views:
    """A batch of views: each is one draw of image, caption, noise and timestep for a patient.

    Every random number a loss needs is in here, drawn outside the model, so that a loss is a pure
    function of (weights, views) and one patient's draws never depend on another's.

    Attributes:
        image: Cached tensors of the drawn images, `[B, ...]` each.
        prompt: Cached tensors of the drawn captions (or of the empty one where dropped), `[B, ...]` each.
        normal: Standard normal numbers, `[B, draws, *latent]`; how many is `Family.normal_shape`.
        uniform: Uniform numbers in [0, 1), `[B]`; the family turns them into timesteps.
    """

    image: Tensors
    prompt: Tensors
    normal: Tensor
    uniform: Tensor

    def tensors(self) -> Tensors:
        """Flatten to one dictionary, so that torch.func can map over patients."""
        flat = {f"image.{k}": v for k, v in self.image.items()}
        flat |= {f"prompt.{k}": v for k, v in self.prompt.items()}
        return flat | {"normal": self.normal, "uniform": self.uniform}

    @staticmethod
    def of(flat: Tensors) -> Views:
        """Undo `tensors`."""
        part = lambda name: {k.removeprefix(name): v for k, v in flat.items() if k.startswith(name)}  # noqa: E731
        return Views(part("image."), part("prompt."), flat["normal"], flat["uniform"])


class Family(Protocol):
    """What the rest of Polyclinic knows of a generator."""

    base_hash: str
    module: nn.Module
    """The network that holds the trainable parameters; its forward is called through `view_losses`."""
    dtype: torch.dtype
    """What the network computes in."""

    def encode_image(self, pixels: Tensor) -> Tensors:
        """Encode `[B, 3, H, W]` pixels in [-1, 1] into cached tensors `[B, ...]`."""
        ...

    def encode_prompt(self, prompts: list[str]) -> Tensors:
        """Encode B captions into cached tensors `[B, ...]`."""
        ...

    def normal_shape(self, image: Tensors) -> tuple[int, ...]:
        """Shape of the normal numbers one view needs, from the cached tensors of images."""
        ...

    def view_losses(self, views: Views) -> Tensor:
        """Loss of each view, shape `[B]`, differentiable in the trainable parameters."""
        ...

    def synthetic_views(self, count: int) -> Views:
        """Views of the cached shapes that show nobody: for counting operations and for self-tests."""
        ...

    def pipeline(self) -> Any:
        """Assemble the diffusers pipeline around the current weights."""
        ...

    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        generators: list[torch.Generator],
        settings: EvaluationSettings,
        size: int,
    ) -> Tensor:
        """Draw one image a prompt with what `pipeline` returned, `[B, 3, size, size]` in [0, 1]."""
        ...

    def save(self, folder: Path, *, merged: bool) -> None:
        """Write what plain diffusers loads into an empty folder, safetensors only.

        Args:
            folder: Where.
            merged: The whole pipeline also where the usual export is adapters beside their base.
        """
        ...


class BaseFiles(BaseModel):
    """Where a study's frozen public parts lie on this machine.

    Attributes:
        vae: Folder of MSDM's autoencoder; None for a large model, or where it is not there yet.
        frozen: MSDM's weights of the whole network, where only a part of it trains.
        pipeline: Folder of a large model's pretrained pipeline.
        prior: Folder of its prior's, where it has one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vae: Path | None = None
    frozen: Path | None = None
    pipeline: Path | None = None
    prior: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """Every part that is there."""
        return [path for path in (self.vae, self.frozen, self.pipeline, self.prior) if path is not None]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name, in a fixed order."""
    return {name: p for name, p in sorted(named(module).items()) if p.requires_grad}


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by the name that they have in states.

    PEFT puts an adapter's own name before the last part, `to_q.lora_A.default.weight`; states and exports
    are without it, `to_q.lora_A.weight`, as PEFT's own files are.
    """
    return {name.replace(f".{ADAPTER}.weight", ".weight"): p for name, p in module.named_parameters()}


def trainable_state(module: nn.Module) -> Tensors:
    """Copy the trainable state: name to fp32 tensor on the CPU."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in trainable(module).items()}


@torch.no_grad()
def load_trainable_state(module: nn.Module, state: Tensors) -> None:
    """Write a trainable state into a module.

    Raises:
        ValueError: Other names or shapes than the module's.
    """
    parameters = trainable(module)
    if parameters.keys() != state.keys():
        odd = sorted(parameters.keys() ^ state.keys())
        raise ValueError(f"trainable state has other tensors than the generator, e.g. {odd[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise ValueError(f"{name}: shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(state[name])


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the weights of a whole network from safetensors; fp16 is widened to fp32.

    Raises:
        BadInput: The file's tensors are not the network's.
    """
    weights = load_start(path)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise BadInput(
            f"{path}: does not fit the study's generator ({first}); name another warm start"
        ) from error


def in_batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    """Cut a list into consecutive batches."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def run_pipeline(
    pipeline: Any, prompts: list[str], generators: list[torch.Generator], **arguments: Any
) -> Tensor:
    """Call a text-to-image pipeline; the images are `[B, 3, H, W]` in [0, 1] on the CPU."""
    output = pipeline(prompt=prompts, generator=generators, output_type="pt", **arguments)
    images: Tensor = output.images
    return images.float().cpu()


def load_family(
    study: Study,
    files: BaseFiles | None,
    *,
    device: str = "cpu",
    encoders: bool = True,
    network: bool = True,
    rank: int | None = None,
    quantized: bool = False,
) -> Family:
    """Load a study's generator with its public base.

    Args:
        study: Its generator, image size and, for what is frozen, its aggregation.
        files: Where the frozen parts lie; None where they are not there yet: enough to count operations.
        device: Where it lives; "meta" allocates nothing.
        encoders: False leaves VAE and text encoders on disk: training reads the cache instead.
        network: False leaves a large model's network on disk: encoding does not need it.
        rank: A site's own rank of a large model's adapters, at most the study's.
        quantized: Load a large model's network as `generator.quantize` says: to train it, not to draw.

    Raises:
        BadInput: The base or its adapters are not what the study says.
    """
    settings, size, files = study.generator, study.data.image_size, files or BaseFiles()
    if not settings.large:
        from polyclinic.common.generators.msdm import Msdm

        return Msdm(settings, size, files.vae, frozen=files.frozen, device=device, encoders=encoders)
    module, maker = FAMILIES[settings.family].maker.split(":")
    found: Family = getattr(import_module(f"polyclinic.common.generators.{module}"), maker)(
        study, files, device=device, encoders=encoders, network=network, rank=rank, quantized=quantized
    )
    return found
