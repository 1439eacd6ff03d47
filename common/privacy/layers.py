"""Per-patient gradients of one layer, from what it was given and what came back.

A layer's input `x` and output gradient `g` are all that its parameters' gradients need. Both come folded
as `[B, K, ...]`, fp32 and contiguous: B patients, K views each, so that a patient's gradient is a sum over
views and positions alike. The squared norm of a Linear's or Conv2d's weight gradient is also to be had
without the gradient, from Gram matrices (Goodfellow 2015, 1510.01799; Bu et al. 2022, 2205.10683).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyclinic.common.generators.base import Tensors
from polyclinic.common.refusals import Refusal

# A squared norm from Gram matrices may be too large but never too small, so it is rounded up. Where positions
# cancel, fp32 products are off by about 2^-24 of |x|^2 |g|^2; and squares below the least number vanish.
GRAM_ROUNDING, LEAST_SQUARE = 2.0**-24, 1e-37

# Entries of a convolution's weight up to which its per-patient gradients are made in one grouped call.
SMALL_KERNEL = 2**16

# Modules that add a bare parameter to every row, `[1, E]` to `[N, 1, E]`: module to parameter.
ADDED_TO_ROWS = {"AttentionPooling": "positional_embedding"}


@dataclass(eq=False)
class Layer:
    """A module with trained parameters of its own; this one reruns it under torch.func.

    Slower, but exact for every module that has one tensor in, one out, and keeps rows apart: embeddings,
    other norms, other convolutions, bare parameters beside submodules.

    Attributes:
        path: Name of the module.
        module: The module.
        names: Attribute to parameter name, of what is trained.
        tied: A parameter of it belongs to another module too.
        calls: Times it was called in this micro-batch.
        answers: Times its output's gradient came.
    """

    path: str
    module: nn.Module
    names: dict[str, str]
    tied: bool = False
    calls: int = 0
    answers: int = 0

    def refusal(self, reason: str) -> Refusal:
        """Say why the one-backward engine cannot clip this module."""
        name = f"{self.path or 'the generator'} ({type(self.module).__name__})"
        return Refusal("self-test-failed", f'{name} {reason}; privacy.engine = "vmap" may be able to')

    def gradients(self, x: Tensor, g: Tensor) -> Tensors:
        """Return one call's per-patient gradients: attribute to `[B, *shape]`."""
        if isinstance(self.module, nn.modules.batchnorm._BatchNorm):
            raise self.refusal("mixes patients")
        weights = {name: getattr(self.module, name).detach() for name in self.names}

        def pull(inputs: Tensor, gradient: Tensor) -> Tensors:
            again, back, *_ = vjp(lambda w: functional_call(self.module, w, (inputs,)), weights)
            return back(gradient.to(again.dtype))[0]

        # The fused attention kernels have no batching rule; the plain formula has.
        with sdpa_kernel(SDPBackend.MATH):
            return {name: made.float() for name, made in vmap(pull)(x, g).items()}


class AddedToRows(Layer):
    """A bare parameter that a known module adds to every row; x and g are those of a copy a row."""

    def gradients(self, x: Tensor, g: Tensor) -> Tensors:  # noqa: D102
        return {name: g.sum(1) for name in self.names}


class Norm(Layer):
    """GroupNorm or LayerNorm: the weight's gradient is that of a product with the normalised input."""

    def gradients(self, x: Tensor, g: Tensor) -> Tensors:  # noqa: D102
        module, made = self.module, {"bias": g}
        if isinstance(module, nn.GroupNorm):
            dim, flat = 2, F.group_norm(x.flatten(0, 1), module.num_groups, eps=module.eps).view_as(x)
        else:
            assert isinstance(module, nn.LayerNorm)
            dim, flat = -1, F.layer_norm(x, x.shape[-1:], eps=module.eps)
        return {name: _sum_but((made | {"weight": flat * g})[name], dim) for name in self.names}


class Matrix(Layer):
    """A Linear with any number of leading dimensions.

    Attributes:
        features: Dimension of the features in `[B, K, ...]`.
        work: In products of two numbers, as measured on CPUs: an entry of a per-patient gradient, which is
            written and read again; an entry of a Gram matrix beside its own product.
    """

    features = -1
    work = (30, 0)

    def prefers_gram(self, x: Tensor, g: Tensor) -> bool:
        """Say whether Gram matrices are cheaper here than the gradient."""
        wide, high = x.shape[self.features], g.shape[self.features]
        positions = max(x.numel() // wide, g.numel() // high) // len(x)
        (entry, more), entries = self.work, self.weight().numel()
        if entries <= SMALL_KERNEL:
            entry = min(entry, 30)  # of convolutions too, whose patients then share a call
        return positions**2 * (wide + high + more) <= entry * entries

    def weight(self) -> Tensor:
        """Return the weight itself."""
        found: Tensor = self.module.weight  # type: ignore[assignment]
        return found

    def gram(self, x: Tensor, g: Tensor) -> Tensor:
        """Squared norm of the weight's gradient, `[B]`, not below the true one."""
        return _contract(*(_gram(t.flatten(1, -2)) for t in (x, g)))

    def total(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradient of the weight, summed over patients."""
        return g.flatten(0, -2).mT @ x.flatten(0, -2)

    def each(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradient of the weight for each patient, `[B, *shape]`."""
        return g.flatten(1, -2).mT @ x.flatten(1, -2)

    def biases(self, g: Tensor) -> Tensors:
        """Return the bias's per-patient gradient, where it is trained."""
        return {name: _sum_but(g, self.features) for name in self.names if name == "bias"}

    def gradients(self, x: Tensor, g: Tensor) -> Tensors:  # noqa: D102
        return self.biases(g) | {name: self.each(x, g) for name in self.names if name == "weight"}


class Conv(Matrix):
    """A Conv2d with zero padding."""

    module: nn.Conv2d
    features = 2
    work = (90, 100)

    def gram(self, x: Tensor, g: Tensor) -> Tensor:
        """Slide the Gram matrix of the input over the kernel: the input itself is never unfolded."""
        conv = self.module
        grams = []
        for t in (x, g):
            # [B, K, groups x features, h, w] -> [B x groups, K x positions, features]
            t = t.flatten(3).unflatten(2, (conv.groups, -1)).transpose(1, 2)
            grams.append(_gram(t.flatten(0, 1).transpose(2, 3).flatten(1, 2)))
        whole = grams[0].unflatten(2, (x.shape[1], *x.shape[3:])).unflatten(1, (x.shape[1], *x.shape[3:]))
        for axis in (0, 1):
            steps = [int(pair[axis]) for pair in (conv.kernel_size, conv.stride, conv.dilation, conv.padding)]
            whole = _slide(whole, 2 + axis, g.shape[3 + axis], *steps)
        return _contract(whole.reshape(grams[1].shape), grams[1]).view(len(x), conv.groups).sum(1)

    def total(self, x: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        return self._kernel(x.flatten(0, 1), g.flatten(0, 1), self.weight(), self.module.groups)

    def each(self, x: Tensor, g: Tensor) -> Tensor:
        """Take patients as groups of one convolution where weights are small, else one after another."""
        weight, patients = self.weight(), len(x)
        if weight.numel() <= SMALL_KERNEL:
            x, g = (t.transpose(0, 1).flatten(1, 2) for t in (x, g))
            made = self._kernel(x, g, weight.repeat(patients, 1, 1, 1), patients * self.module.groups)
            return made.view(patients, *weight.shape)
        made = x.new_empty(patients, *weight.shape)  # a list would hold everything twice when stacked
        for patient, row in enumerate(made):
            row.copy_(self.total(x[patient : patient + 1], g[patient : patient + 1]))
        return made

    def _kernel(self, x: Tensor, g: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Ask the library's own weight-gradient kernel, of `[N, features, h, w]`."""
        conv = self.module
        steps = (conv.stride, conv.padding, conv.dilation, False, (0, 0), groups)
        wanted = (False, True, False)
        made: Tensor = torch.ops.aten.convolution_backward(g, x, weight.contiguous(), None, *steps, wanted)[1]
        return made


def _sum_but(t: Tensor, dim: int) -> Tensor:
    """Sum over all dimensions but the patients and this one."""
    return t.sum([d for d in range(1, t.ndim) if d != dim % t.ndim])


def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def _slide(
    whole: Tensor, dim: int, size: int, kernel: int, stride: int, dilation: int, padding: int
) -> Tensor:
    """Sum a Gram matrix over one axis of a kernel; the axis is dimension `dim` and, again, `dim` + 3.

    Entry (t, s) of the result, both below `size`, sums the entries (t x stride + o, s x stride + o)
    over the kernel's offsets o; what lies in the padding is zero.
    """
    length, shape = whole.shape[dim], list(whole.shape)
    shape[dim] = shape[dim + 3] = size
    total = whole.new_zeros(shape)
    for offset in range(-padding, kernel * dilation - padding, dilation):
        first, last = max(0, -(offset // stride)), min(size, (length - 1 - offset) // stride + 1)
        if first < last:
            there, here = [slice(None)] * whole.ndim, [slice(None)] * whole.ndim
            there[dim] = there[dim + 3] = slice(first, last)
            start = first * stride + offset
            here[dim] = here[dim + 3] = slice(start, start + (last - 1 - first) * stride + 1, stride)
            total[tuple(there)] += whole[tuple(here)]
    return total


def _contract(one: Tensor, other: Tensor) -> Tensor:
    """Sum of products of two Gram matrices `[B, T, T]`, rounded up: see the constants."""
    x, g = (t.diagonal(dim1=1, dim2=2).sum(1) for t in (one, other))
    squared = (one * other).flatten(1).sum(1)
    return squared + GRAM_ROUNDING * x * g + LEAST_SQUARE * one.shape[1] * (x + g)


def find_layers(module: nn.Module, trained: Mapping[str, nn.Parameter]) -> list[Layer]:
    """List the modules that own a trained parameter, each with the arithmetic that fits it."""
    named = {id(p): name for name, p in trained.items()}
    found, owners = [], dict.fromkeys(trained, 0)
    for path, owner in module.named_modules():
        names = {attribute: named[id(p)] for attribute, p in owner._parameters.items() if id(p) in named}
        if names:
            found.append(_kind(owner)(path, owner, names))
        for name in names.values():
            owners[name] += 1
    for layer in found:
        layer.tied = any(owners[name] > 1 for name in layer.names.values())
    return found


def _kind(module: nn.Module) -> type[Layer]:
    """Pick the arithmetic by the forward that really runs: a subclass may have its own."""
    kind = type(module)
    forward = kind.forward
    if forward is nn.Linear.forward:
        return Matrix
    if isinstance(module, nn.Conv2d) and forward is nn.Conv2d.forward:
        plain = type(module)._conv_forward is nn.Conv2d._conv_forward and module.padding_mode == "zeros"
        return Conv if plain and not isinstance(module.padding, str) else Layer
    if forward is nn.GroupNorm.forward or (
        isinstance(module, nn.LayerNorm)
        and forward is nn.LayerNorm.forward
        and len(module.normalized_shape) == 1
    ):
        return Norm
    if kind.__module__.startswith("diffusers.") and kind.__name__ in ADDED_TO_ROWS:
        return AddedToRows
    return Layer
