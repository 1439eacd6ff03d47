"""The one-backward engine on single layers: every kind, shape and route, against one patient at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyclinic.common.generators.base import trainable
from tests.common.toys import (
    ROUTES,
    ScaleOf,
    Toy,
    check,
    clipped,
    clipped_each,
    gap,
    norm,
    normal,
    only,
    patients_of,
    toy_views,
)

ROUTE = st.sampled_from(list(ROUTES))
FEW = settings(max_examples=25, deadline=None)


@FEW
@given(
    ROUTE,
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 3),
    st.sampled_from(["all", "weight", "bias"]),
)
def test_linear_with_any_leading_dimensions(
    route: str, wide: int, high: int, lead: list[int], views: int, trained: str
) -> None:
    module = nn.Linear(wide, high)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained in ("all", name))
    with only(route):
        check(Toy(module, rising=True), toy_views(normal(3, views, *lead, wide).abs()))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, tuple[int, int]]:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 2]))
    kernel, stride, dilation, padding = pair(1, 3), pair(1, 3), pair(1, 2), pair(0, 2)
    size = (draw(st.integers(5, 8)), draw(st.integers(5, 8)))
    wide, high = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    bias = draw(st.booleans())
    return nn.Conv2d(wide, high, kernel, stride, padding, dilation, groups, bias), size


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:, :, :1].expand_as(t),
}


@settings(max_examples=60, deadline=None)
@given(ROUTE, convolutions(), st.integers(1, 3), st.sampled_from(list(LAYOUTS)))
def test_conv2d_of_any_geometry_and_layout(
    route: str, made: tuple[nn.Conv2d, tuple[int, int]], views: int, layout: str
) -> None:
    conv, size = made
    run = lambda x: conv(LAYOUTS[layout](x))  # noqa: E731
    with only(route):
        check(Toy(conv, run, rising=True), toy_views(normal(3, views, conv.in_channels, *size).abs()))


def diffusers_rms() -> nn.Module:
    from diffusers.models.normalization import RMSNorm

    made: nn.Module = RMSNorm(6, eps=1e-5, bias=True)
    return made


def llama_rms() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    made: nn.Module = LlamaRMSNorm(6)
    return made


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "group norm": (lambda: nn.GroupNorm(3, 6), (6, 4, 5)),
    "group norm of one row": (lambda: nn.GroupNorm(2, 6), (6,)),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer norm over two": (lambda: nn.LayerNorm((4, 6)), (3, 4, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (4, 6)),
    "diffusers' rms norm": (diffusers_rms, (4, 6)),
    "transformers' rms norm": (llama_rms, (4, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 4, 4)),
    "reflecting": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 5, 5)),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 5, 5)),
    "prelu": (lambda: nn.PReLU(3), (3, 5)),
    "bare parameter": (lambda: ScaleOf(6), (4, 6)),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("views", [1, 3])
def test_norms_and_whatever_is_rerun(kind: str, views: int) -> None:
    make, shape = OTHERS[kind]
    check(Toy(make()), toy_views(normal(4, views, *shape)))


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("views", [1, 3])
def test_embedding_of_repeated_tokens(padding: int | None, views: int) -> None:
    module = nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Linear(3, 2))
    family = Toy(module, lambda x: module((x * 7).long() % 5))
    check(family, toy_views(normal(4, views, 6).abs()))


class Calls(nn.Module):
    """One layer called `times` times, on outputs of itself and at other lengths."""

    def __init__(self, layer: nn.Module, times: int, plain: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.times, self.plain = layer, times, plain

    def forward(self, x: Tensor) -> Tensor:
        total = self.plain(x)
        for _ in range(self.times):
            x = self.layer(x).sin()
            total = total + self.plain(x)
            x = x[:, : max(1, x.shape[1] - 1)] if x.ndim == 3 else x
        return total


def spread(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1, keepdim=True)


@FEW
@given(ROUTE, st.integers(2, 4), st.sampled_from(["linear", "conv", "norm"]), st.integers(1, 2))
def test_gradients_of_shared_layers_add_up_before_the_norm(
    route: str, times: int, kind: str, views: int
) -> None:
    layer, shape = {
        "linear": (nn.Linear(3, 3), (4, 3)),
        "conv": (nn.Conv2d(3, 3, 3, padding=1), (3, 4, 4)),
        "norm": (nn.LayerNorm(3), (4, 3)),
    }[kind]
    with only(route):
        check(Toy(Calls(layer, times, spread)), toy_views(normal(3, views, *shape)))


def test_weights_tied_between_modules_add_up_before_the_norm() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    family = Toy(nn.Sequential(one, nn.SiLU(), other))
    other.weight = one.weight
    assert len(trainable(family.module)) == 2
    check(family, toy_views(normal(4, 2, 3, 4)))


class Block(nn.Module):
    """A residual block, checkpointed or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.how = nn.Conv2d(2, 4, 3, padding=1), how
        self.body = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.twice = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):  # the body is shared, and nested in another checkpoint the second time
            if self.how == "none":
                x = self.inner(x)
            else:
                x = checkpoint(self.inner, x, use_reentrant=self.how == "reentrant")
        return x

    def inner(self, x: Tensor) -> Tensor:
        if self.how == "none":
            x = x + self.body(x)
        else:
            x = x + checkpoint(self.body, x, use_reentrant=self.how == "reentrant")
        made: Tensor = self.twice(x.movedim(1, -1)).movedim(-1, 1)
        return made


@pytest.mark.parametrize("how", ["none", "reentrant", "non-reentrant"])
def test_checkpointed_layers_count_once(how: str) -> None:
    family, views = Toy(Block(how)), toy_views(normal(4, 2, 2, 5, 5))
    family.module.requires_grad_(True)
    plain = Toy(Block("none"))
    each = patients_of(plain, views)
    clip = 0.7 * norm(each[0])
    want = clipped_each(each, clip)
    assert gap(clipped(family, views, clip, 3), want) < 1e-5 * norm(want)
