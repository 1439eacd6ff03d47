"""What a site's training takes of GPU memory, forecast without a GPU: the real step on fake tensors.

The study's own step engine runs once over a micro-batch of synthetic views on tensors that have shapes and
types and no content, so that a model of any size fits this machine. Every living storage is counted as it
comes and goes: activations, what checkpointing recomputes, per-patient norms and gradients. What stays
from step to step is added by arithmetic. What kernels take inside themselves and what an allocator loses
between blocks is not seen: `HEADROOM` stands for the latter, `CONTEXT_BYTES` for the driver's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyclinic.common.generators.base import BaseFiles, Family, Views, load_family, trainable
from polyclinic.common.generators.quantized import saved_bytes, widened_bytes
from polyclinic.common.privacy.clipping import ENGINES
from polyclinic.common.study import Study
from polyclinic.server.report.metrics import Part

FP32, FP64 = 4, 8
MOMENTS = 2  # AdamW's
# CUDA's context and cuBLAS's workspace are there before the first tensor.
CONTEXT_BYTES = 0.8e9
# Share that kernels' own scratch and fragmentation may add; tests hold an allocator's own count within it.
HEADROOM = 0.1
# Engines that clip patient by patient or in one pass; the others are only there to compare with.
COUNTED = ("bookkeeping", "loop")


class Memory(Part):
    """GPU memory of a site's training, in bytes.

    Attributes:
        frozen: Weights that do not train, in the base's precision or as `generator.quantize` says.
        trained: Weights that train, in fp32.
        moments: AdamW's two averages, in fp32.
        sums: The running clipped sum, or gradients, in fp32.
        working: Most that one micro-batch holds beside those: activations, recomputation, per-patient work.
        noise: Most that noising one tensor in float64 holds, with the noised gradients; not at the same time.
        total: What training needs at its peak, with the driver's context and headroom.
    """

    frozen: int
    trained: int
    moments: int
    sums: int
    working: int
    noise: int
    total: int


def training_memory(study: Study, files: BaseFiles) -> Memory:
    """Forecast the memory of one site's training.

    Args:
        study: The study; its micro-batch bounds memory whoever is sampled.
        files: Its base; configuration alone is enough.
    """
    family = load_family(study, files, device="meta", encoders=False)
    own = trainable(family.module)
    numbers = [p.numel() for p in own.values()]
    trained = FP32 * sum(numbers)
    everything = sum(p.numel() * p.element_size() for p in family.module.parameters())
    everything -= saved_bytes(family.module, study.generator)
    working = widened_bytes(family.module, study.generator) + working_bytes(study, family)
    # The sum, the noise and their addition are in float64 for one tensor at a time; noised gradients stay.
    noise = trained + 3 * FP64 * max(numbers) if study.privacy.enabled else 0
    held = everything + (MOMENTS + 1) * trained
    peak = held + max(working, noise)
    return Memory(
        frozen=everything - trained,
        trained=trained,
        moments=MOMENTS * trained,
        sums=trained,
        working=working,
        noise=noise,
        total=round(CONTEXT_BYTES + (1 + HEADROOM) * peak),
    )


def working_bytes(study: Study, family: Family) -> int:
    """Count the most that a step holds at once beside weights, over one full micro-batch.

    Args:
        study: Its views, micro-batch and engine.
        family: On the meta device; it is not to be used afterwards.
    """
    with FakeTensorMode(), Living() as living:
        _become_fake(family)
        living.start(family.module.parameters())
        _step(study, family)
    return living.peak


def _step(study: Study, family: Family) -> None:
    privacy = study.privacy
    views = family.synthetic_views(privacy.micro_batch * privacy.views)
    if not privacy.enabled:
        family.view_losses(views).sum().backward()
        return
    shape = (privacy.micro_batch, privacy.views)
    shaped = Views.of({name: t.unflatten(0, shape) for name, t in views.tensors().items()})
    engine = privacy.engine if privacy.engine in COUNTED else COUNTED[0]
    ENGINES[engine](family, shaped, privacy.clip, privacy.micro_batch)


def _become_fake(family: Family) -> None:
    """Give every weight a stand-in that says it is on a CPU, where autocast works without a GPU."""
    made: dict[int, nn.Parameter] = {}
    for module in family.module.modules():
        for name, own in module._parameters.items():
            if own is not None:
                if id(own) not in made:
                    empty = torch.empty(own.shape, dtype=own.dtype)
                    made[id(own)] = nn.Parameter(empty, requires_grad=own.requires_grad)
                module._parameters[name] = made[id(own)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for name, value in vars(family).items():
        if isinstance(value, Tensor):
            setattr(family, name, torch.empty(value.shape, dtype=value.dtype))
    vars(family)["device"] = "cpu"


class Living(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak.

    Attributes:
        peak: In bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def start(self, held: Iterable[Tensor]) -> None:
        """Begin anew; what `held` stores does not count."""
        self.peak = self._now = 0
        self._known = {t.untyped_storage()._cdata for t in held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return False  # asked whether a gradient is not finite: without data, none is
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        if key in self._known:
            self._known.remove(key)
            self._now -= size
