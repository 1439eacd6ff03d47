"""int8 on the way up: a scale a row, error feedback, and numbers at the ends of what fp32 can write."""

import pytest
import torch

from polyclinic.client.residual import unpack_residual
from polyclinic.common.refusals import Refusal
from polyclinic.common.settings import Transport
from polyclinic.common.wire import pack_reply, reply_records
from polyclinic.common.wire_reading import order_records, read_order, unpack_reply
from polyclinic.server.replies import read_reply
from tests.common.test_wire import FACTS, ORDER, every_transport, state
from tests.common.wire_files import put, tensors_in


def brute_int8(tensor: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Round row by row, number by number."""
    rows = tensor.reshape(len(tensor) if tensor.dim() > 1 else 1, -1)
    out, scales = torch.zeros_like(rows), []
    for i, row in enumerate(rows):
        scale = max(abs(x) for x in row.tolist()) / 127
        scales.append(scale)
        for j, x in enumerate(row.tolist()):
            out[i, j] = round(x / scale) * scale if scale else 0.0
    return out.reshape(tensor.shape), scales


def test_int8_has_a_scale_a_row_and_keeps_what_rounding_lost() -> None:
    wide = {
        **state(),
        "zero": torch.zeros(2, 3),
        "k": torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(1)),
        "tiny": torch.full((2, 2), 1e-44),
    }
    stored = pack_reply(wide, FACTS, transport="int8")
    sent, residual = unpack_reply(stored).difference, unpack_residual(stored)
    for name, tensor in wide.items():
        want, scales = brute_int8(tensor)
        assert torch.allclose(sent[name], want, rtol=1e-6, atol=1e-44)
        rows = tensor.reshape(len(scales), -1)
        error = (sent[name] - tensor).abs().reshape(rows.shape)
        assert (error <= rows.abs().amax(1, keepdim=True) / 253 + 1e-43).all()
        assert torch.equal(residual[name], tensor - sent[name])
    scale = tensors_in(reply_records(stored), "scale")["scale/k"]
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (3,))


def test_error_feedback_lets_no_bit_of_a_small_difference_get_lost() -> None:
    """A coordinate far below one step of its row is sent as zero, until its lost parts make a step."""
    difference = {"w": torch.tensor([[1.0, 0.001]])}
    total, residual = torch.zeros(1, 2), None
    for _ in range(100):
        stored = pack_reply(difference, FACTS, transport="int8", residual=residual)
        total += unpack_reply(stored).difference["w"]
        residual = unpack_residual(stored)
    assert torch.allclose(total, torch.tensor([[100.0, 0.1]]), atol=1 / 127)
    alone = 100 * unpack_reply(pack_reply(difference, FACTS, transport="int8")).difference["w"]
    assert alone[0, 1] == 0


@every_transport
@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 3.39e38, 1e-45, 0.0])
def test_what_is_finite_arrives_finite(transport: Transport, value: float) -> None:
    like = {"w": torch.full((2, 3), value)}
    residual = {"w": torch.full((2, 3), value)}
    stored = pack_reply(like, FACTS, transport=transport, residual=residual if transport == "int8" else None)
    difference = read_reply(reply_records(stored), like, transport=transport).difference["w"]
    assert torch.isfinite(difference).all()
    assert all(torch.isfinite(tensor).all() for tensor in unpack_residual(stored).values())
    tensors = read_order(order_records(ORDER, like, transport))[1](transport)
    assert torch.isfinite(tensors["w"]).all()


@pytest.mark.parametrize("shape", [(2,), (3, 1), ()])
def test_scales_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    content = reply_records(pack_reply(state(), FACTS, transport="int8"))
    scales = {**tensors_in(content, "scale"), "scale/b": torch.ones(shape)}
    with pytest.raises(Refusal, match="bad-state"):
        read_reply(put(content, "scale", scales), state(), transport="int8")
