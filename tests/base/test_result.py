"""One call's result as it comes together: what is merged, what is only written, and in which dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fapool_plugin.base.result import Result
from fapool_plugin.kernels.forward import attend
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.wire.messages import Header, Message
from tests.dense_attention import TOLERANCE, reference, visible_ST
from tests.fake_cuda import fake_cuda

H, K, D, E, N, SCALE = 4, 2, 8, 8, 12, 0.3


def tensors(queries: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries)
    shapes = (2, H, queries, D), (2, K, N, D), (2, K, N, E)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return q, k, v


def halves(queries: int) -> tuple[Tile, Tile]:
    """The base's tile and a rank's, of different queries, or of different heads where each sequence has one query."""
    first = N - queries
    if queries == 1:
        return Tile(0, 2, 0, 1, first, N, 0, N), Tile(0, 2, 1, 2, first, N, 0, N)
    middle = first + queries // 2
    return Tile(0, 2, 0, K, first, middle, 0, middle), Tile(0, 2, 0, K, middle, N, 0, N)


def together(result: Result, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both tiles' results: the base's, and the rank's as a message brings them."""
    mine, theirs = halves(result.q.shape[2])
    result.compute([mine])
    q = result.q[:, result.heads(theirs), result.geometry.q_slice(theirs)]
    k, v = (x[:, theirs.head_start : theirs.head_stop] for x in (result.k, result.v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attend(q, k, v, softmax_scale=SCALE, causal=True, q_offset=theirs.q_start)
    result.add(Message(Header(), [out.reshape(-1), lse.reshape(-1)]), result.places([theirs]))
    return result.final(sinks)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [1, 8])
def test_disjoint_parts_are_written_as_they_come(queries: int, dtype: torch.dtype, with_sinks: bool) -> None:
    """The same bits as by way of fp32, without a cast and a copy of all."""
    q, k, v = tensors(queries, dtype)
    geometry, sinks = Geometry((0, 0), (N, N), N - queries, N), torch.randn(H) if with_sinks else None
    found = []
    for disjoint in (False, True):
        result = Result(q, k, v, geometry, SCALE, 0.0)
        result.disjoint = disjoint
        found.append(together(result, sinks))
        assert result.out_BSHE.dtype == (dtype if disjoint else torch.float32)
        assert result.lse_BHS.dtype == torch.float32
        if disjoint and not with_sinks:
            assert found[-1][0].data_ptr() == result.out_BSHE.data_ptr(), "copied at the end"
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), f"largest difference {(ours - theirs).abs().max():.3g}"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = reference(q, k, v, visible_ST(queries, N, True), SCALE, sinks_H=sinks)
    for ours, theirs in zip(found[1], expected, strict=True):
        worst = (ours.double() - theirs).abs().max().item()
        assert worst < TOLERANCE[dtype], f"largest difference {worst:.3g}"


@pytest.mark.parametrize("queries", [1, 8])
def test_what_overlaps_is_merged_in_full_precision(queries: int) -> None:
    """Two parts over halves of the keys, also where the call is said to be of disjoint ones: with one query a sequence
    what two ranks computed is merged all the same."""
    q, k, v = tensors(queries, torch.bfloat16)
    result = Result(q, k, v, Geometry((0, 0), (N, N), N - queries, N), SCALE, 0.0)
    result.disjoint = queries == 1
    for keys in (slice(0, 4), slice(4, N)):
        tile = Tile(0, 2, 0, K, N - queries, N, keys.start, keys.stop)
        out, lse = attend(
            q.transpose(1, 2), k[:, :, keys].transpose(1, 2), v[:, :, keys].transpose(1, 2),
            softmax_scale=SCALE, causal=True, q_offset=N - queries - keys.start,
        )  # fmt: skip
        result.add(Message(Header(), [out.reshape(-1), lse.reshape(-1)]), result.places([tile]))
    out, lse = result.final(None)
    assert result.out_BSHE.dtype == torch.float32
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = reference(q, k, v, visible_ST(queries, N, True), SCALE)
    for ours, theirs in zip((out, lse), expected, strict=True):
        worst = (ours.double() - theirs).abs().max().item()
        assert worst < TOLERANCE[torch.bfloat16], f"largest difference {worst:.3g}"


def test_new_keys_of_a_cut_lane_are_picked_without_a_wait() -> None:
    """Several runs are an index, which is used for keys and values, in each layer."""
    where, runs = Tile(0, 2, 0, K, N - 1, N, 0, N), [(0, 3), (5, 9)]
    q, k, v = tensors(1, torch.float32)
    at = Result(q, k, v, Geometry((0, 0), (N, N), N - 1, N), SCALE, 0.0).new_keys(where, runs)
    assert torch.equal(k[at], k[:, :, [0, 1, 2, 5, 6, 7, 8]])
    with fake_cuda():
        q, k, v = tensors(1, torch.float32, "cuda")
        at = Result(q, k, v, Geometry((0, 0), (N, N), N - 1, N), SCALE, 0.0).new_keys(where, runs)
        assert (k[at].shape, k[at].is_cuda) == ((2, K, 7, D), True)


@pytest.mark.parametrize("disjoint", [False, True])
@pytest.mark.parametrize("queries", [1, 8])
def test_no_step_of_it_waits_for_a_device(queries: int, disjoint: bool) -> None:
    """Queries picked, tiles computed, parts scattered and merged, on CUDA tensors without numbers. Answers' checks do
    wait, as they must: what is not finite is to be found before it is used."""
    with fake_cuda() as called:
        result = Result(*tensors(queries, torch.bfloat16, "cuda"), Geometry((0, 0), (N, N), N - queries, N), SCALE, 0.0)
        result.disjoint = disjoint
        picked = result.queries(result.places(halves(queries)))
        assert all(x.is_cuda for x in picked)
        out, lse = together(result, torch.empty(H, device="cuda"))
        assert (out.shape, out.dtype, out.is_cuda) == ((2, queries, H, E), torch.bfloat16, True)
        assert (lse.shape, lse.dtype, lse.is_cuda) == ((2, H, queries), torch.float32, True)
    assert "aten._flash_attention_forward" in called
