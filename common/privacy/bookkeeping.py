"""Exact per-patient clipping in one backward pass (book-keeping: Bu et al. 2022, 2210.00038).

Forward hooks on the layers that train put a tap behind each: an identity whose backward sees the
layer's input and the gradient of its output. Parameters ask for no gradient meanwhile, so that the
backward pass computes none of their own. As gradients arrive, each layer adds to every patient's
squared norm by the cheapest route within a memory budget; the clipped sum is then formed from what was
kept, without a second backward pass. The generator is neither wrapped nor copied, and left as it was.

Because a tap's input is saved by autograd like any other, checkpointing (of both kinds) recomputes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.common.generators.base import Family, Tensors, Views, trainable
from polyclinic.common.privacy import clipping
from polyclinic.common.privacy.layers import AddedToRows, Layer, Matrix, find_layers

# Bytes of per-patient gradients that a micro-batch may store beyond what storing them sets free.
STORED_BYTES = 24 * 2**20


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward hands over the layer's input and output gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, output: Tensor, x: Tensor, record: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.record = record
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Attention hands back permuted gradients, which every later use would copy again.
        gradient = gradient.contiguous()
        ctx.record(ctx.saved_tensors[0], gradient)
        return None, gradient, None, None


class Recorder:
    """Records the calls of a generator's trained layers and their answers, one micro-batch after another."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = trainable(module)
        self.layers = find_layers(module, self.parameters)
        self.rerunning = self.in_backward = False

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Tap the layers; hooks, attributes and `requires_grad` are put back also after an error."""
        with ExitStack() as undo:
            # Rounding to 2^-11 in the library's kernels would make sums exceed their norms.
            undo.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            torch.backends.cudnn.allow_tf32 = False
            for parameter in self.parameters.values():
                undo.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
            for layer in self.layers:
                module = layer.module
                if isinstance(layer, AddedToRows):
                    undo.enter_context(module.register_forward_pre_hook(partial(self._stand_in, layer)))
                    undo.callback(_pop, module, *layer.names)
                else:
                    # First among hooks: what the module itself returned is what its parameters made.
                    hook = partial(self._forward, layer)
                    undo.enter_context(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
            yield

    def begin(self, patients: int, views: int) -> None:
        """Forget the last micro-batch; the next has `patients` x `views` rows, patients slowest."""
        device = next(iter(self.parameters.values())).device
        self.fold, self.budget, self.in_backward = (patients, views), STORED_BYTES, False
        for layer in self.layers:
            layer.calls = layer.answers = 0
        self.stored: Tensors = {}
        self.kept: list[tuple[Matrix, Tensor, Tensor]] = []
        self.squared = torch.zeros(patients, device=device)
        # Makes every tap ask for a gradient, also behind a frozen first layer.
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def backward(self, loss: Tensor) -> None:
        """Run the one backward pass, and make sure that every call was answered exactly once.

        Raises:
            Refusal: `self-test-failed`, naming the module whose gradients are not all there.
        """
        self.in_backward = True
        if loss.requires_grad:
            # Autocast would lower the norms too; a checkpoint puts its own back while it recomputes.
            with torch.autocast(self.anchor.device.type, enabled=False):
                loss.backward()
        for layer in self.layers:
            if layer.calls == 0:
                raise layer.refusal("holds trained parameters that its own forward does not use")
            if layer.calls != layer.answers:
                raise layer.refusal(f"was called {layer.calls} times and got {layer.answers} gradients")

    @torch.no_grad()
    def add_to(self, sums: Tensors, clip: float, margin: float) -> None:
        """Add the micro-batch's clipped gradients to the sums; `margin` is tau."""
        with torch.autocast(self.anchor.device.type, enabled=False):
            factors = clipping.accumulate(sums, self.stored, clip, margin=margin, squared=self.squared)
            broken = factors == 0
            any_broken = bool(broken.any())
            while self.kept:
                layer, x, g = self.kept.pop()
                x, g = x.float(), g.float()
                if any_broken:
                    # Replaced before the product: 0 x inf is NaN.
                    x, g = (t.masked_fill(_rows(broken, t), 0.0) for t in (x, g))
                clipping.add(sums, layer.names["weight"], layer.total(x, g * _rows(factors, g)))

    def _counts(self, layer: Layer) -> bool:
        """Count a call; False where it is not one to tap."""
        if self.rerunning:
            return False
        if not self.in_backward:  # else a checkpoint recomputes a call that was counted
            layer.calls += 1
        return torch.is_grad_enabled()  # else a reentrant checkpoint calls again, with gradients

    def _tapped(self, layer: Layer, output: Tensor, x: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(self.anchor, output, x, partial(self._record, layer))  # type: ignore[no-untyped-call]
        return tapped

    def _stand_in(self, layer: Layer, module: nn.Module, args: Any) -> None:
        (name,) = layer.names
        _pop(module, name)
        if self._counts(layer):
            parameter = getattr(module, name).detach()
            rows = parameter.expand(self.fold[0] * self.fold[1], *parameter.shape)
            # An attribute of the instance hides the parameter, which stays where it is.
            vars(module)[name] = self._tapped(layer, rows, rows)

    def _forward(self, layer: Layer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._counts(layer):
            return None
        tensors = [value for value in (*args, *kwargs.values()) if value is not None]
        if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or not isinstance(output, Tensor):
            raise layer.refusal("takes or gives something else than one tensor")
        if any(t.shape[:1] != (self.fold[0] * self.fold[1],) for t in (tensors[0], output)):
            raise layer.refusal("does not have one row a view")
        return self._tapped(layer, output, tensors[0].detach())

    def _record(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        layer.answers += 1
        # Kept as they came, half the size under autocast; worked with in fp32.
        raw_x, raw_g = (t.contiguous().view(*self.fold, *t.shape[1:]) for t in (x, gradient))
        x, g = (t.float() if t.is_floating_point() else t for t in (raw_x, raw_g))
        if isinstance(layer, Matrix) and "weight" in layer.names and self._keeps(layer, x, g):
            self.kept.append((layer, raw_x, raw_g))
            gradients = layer.biases(g)
        else:
            self.rerunning = True  # the module may be run again, and is not to be recorded then
            try:
                gradients = layer.gradients(x, g)
            finally:
                self.rerunning = False
        for attribute, made in gradients.items():
            name = layer.names[attribute]
            self.stored[name] = self.stored[name] + made if name in self.stored else made

    def _keeps(self, layer: Matrix, x: Tensor, g: Tensor) -> bool:
        """Choose the route of a weight; True where input and output gradient are kept for the sum.

        Gradients of calls that share a weight add up before the norm, so those are stored.
        """
        if layer.tied or layer.calls != 1:
            return False
        if layer.prefers_gram(x, g):
            self.squared += layer.gram(x, g)
            return True
        extra = 4 * layer.weight().numel() * len(x) - x.nbytes - g.nbytes
        if extra <= self.budget:
            self.budget -= max(extra, 0)
            return False
        for i in range(len(x)):  # one patient's gradient at a time, for its norm alone
            self.squared[i] += layer.total(x[i : i + 1], g[i : i + 1]).square().sum()
        return True


def _pop(module: nn.Module, name: str) -> None:
    vars(module).pop(name, None)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """Shape `[B]` to multiply `[B, ...]`."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def bookkeeping_sum(family: Family, views: Views, clip: float, micro_batch: int) -> Tensors:
    """Clipped sum over patients in one ordinary backward pass a micro-batch.

    Args:
        family: The generator.
        views: Tensors `[B, K, ...]`; B may be 0.
        clip: C, bound on a patient's gradient norm.
        micro_batch: Patients whose activations and gradients are in memory at once.

    Returns:
        Parameter name to clipped sum, finite always.

    Raises:
        Refusal: `self-test-failed`, naming a module that cannot be clipped exactly in this way.
    """
    sums: Tensors = {} if len(views.uniform) else clipping.zeros(family)
    margin = clipping.tau("bookkeeping", clipping.compute_dtype(family))
    recorder = Recorder(family.module)
    with recorder.tapped(), torch.enable_grad():
        for part in clipping.micro_batches(views, micro_batch):
            recorder.begin(*part["uniform"].shape)
            recorder.backward(clipping.patient_losses(family, part).sum())
            recorder.add_to(sums, clip, margin)
    return sums
