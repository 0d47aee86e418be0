"""Gradients of one rectangle against autograd through a dense fp64 softmax, and their sums over many rectangles.

Forward kernels play no part, except where gradcheck tries both. What needs CUDA is marked gpu; what surrounds the
operators for it is tried in test_operators.
"""

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fapool_plugin.kernels import dense
from fapool_plugin.kernels.backward import attend_backward, sinks_backward
from fapool_plugin.kernels.forward import attend, available_kernels, fold_sinks, merge_
from tests.dense_attention import tensors, visible_ST
from tests.dense_gradients import SCALE, TOLERANCE, Whole, assert_gradients, check

CAUSAL_SHAPES = [(40, 40, None), (17, 60, None), (30, 50, 5), (30, 25, 10), (1, 70, None), (9, 5, -3)]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# The mask, heads, head dims and dtypes.

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
HEADS = [(1, 1), (4, 2), (3, 1), (3, 3)]
DIMS = [(4, 4), (4, 7), (5, 2)]
ANY_MASK = st.fixed_dictionaries(
    {
        "causal": st.booleans(),
        "q_offset": st.none() | st.integers(-15, 15),
        "window_size": st.just((-1, -1)) | st.tuples(st.integers(-1, 14), st.integers(-1, 14)),
    }
)


@given(
    B=st.integers(0, 3),
    S=st.integers(0, 12),
    T=st.integers(0, 12),
    mask=ANY_MASK,
    heads=st.sampled_from(HEADS),
    dims=st.sampled_from(DIMS),
    softcap=st.sampled_from([0.0, 2.0]),
    dtype=st.sampled_from(DTYPES),
    kernel=st.sampled_from([None, "dense"]),
)
@settings(max_examples=250, deadline=None)
def test_any_rectangle(B, S, T, mask, heads, dims, softcap, dtype, kernel):
    q, k, v = (x.to(dtype) for x in tensors(B, S, T, *heads, *dims))
    check(q, k, v, softcap=softcap, kernel=kernel, **mask)


@given(
    q_cuts=st.lists(st.integers(0, 16), max_size=2),
    k_cuts=st.lists(st.integers(0, 20), max_size=3),
    causal=st.booleans(),
    q_offset=st.integers(-6, 22),
    heads=st.sampled_from(HEADS),
    dims=st.sampled_from(DIMS),
    softcap=st.sampled_from([0.0, 2.0]),
    sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_key_shards_and_query_tiles_sum_to_the_whole(
    q_cuts, k_cuts, causal, q_offset, heads, dims, softcap, sinks, dtype
):
    S, T = 16, 20
    q, k, v = (x.to(dtype) for x in tensors(2, S, T, *heads, *dims))
    sinks_H = torch.randn(heads[0]) if sinks else None
    whole = Whole(q, k, v, visible_ST(S, T, causal, q_offset), softcap=softcap, sinks_H=sinks_H)
    got = [torch.zeros_like(x) for x in whole.gradients[:3]]
    for (i, i_stop), (j, j_stop) in product(pairwise([0, *sorted(q_cuts), S]), pairwise([0, *sorted(k_cuts), T])):
        queries, keys = slice(i, i_stop), slice(j, j_stop)
        parts = whole.backward(queries, keys, causal=causal, q_offset=q_offset + i - j, softcap=softcap)
        for total, part, cut in zip(got, parts, (queries, keys, keys), strict=True):
            total[:, cut] += part
    if dtype != torch.float64:
        got = [x.float() for x in got]
    assert_gradients(got, whole.gradients[:3], dtype, f"{dtype} q {q_cuts} k {k_cuts} offset {q_offset}")


# From 192 and 768 queries on the CPU operator takes more of them at a time; it takes 512 keys.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("S", "T", "q_offset"), [(800, 800, 0), (300, 1100, 800), (700, 650, -40), (200, 900, 500)])
@pytest.mark.parametrize("causal", [False, True])
def test_many_blocks(S, T, q_offset, causal, dtype):
    q, k, v = tensors(1, S, T, 3, 1, 64, dtype=dtype)
    for kernel in ("torch_flash", "dense"):
        check(q, k, v, causal=causal, q_offset=q_offset, kernel=kernel)


def test_half_precision_is_lost_in_the_output_only():
    q, k, v = tensors(2, 600, 700, 6, 2, 32, dtype=torch.bfloat16)
    whole = Whole(q, k, v, visible_ST(600, 700, True), dtype_out=torch.float32)
    for kernel in ("torch_flash", "dense"):
        got = whole.backward(causal=True, kernel=kernel)
        assert_gradients(got, whole.gradients, torch.bfloat16, kernel, tolerance=1e-5)


@pytest.mark.parametrize("kernel", ["torch_flash", "dense"])
@pytest.mark.parametrize("layout", ["heads first", "last dimension strided", "expanded"])
def test_strided_inputs(layout, kernel):
    q, k, v = tensors(2, 6, 10, 6, 2, 16)
    if layout == "expanded":
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    whole = Whole(q, k, v, visible_ST(6, 10, True, 4), expanded=layout == "expanded")
    other = 2 if layout == "heads first" else 3
    for name in ("q", "k", "v", "dout", "out", "lse") if layout != "expanded" else ():
        x = getattr(whole, name)
        dim = min(other, x.dim() - 1)
        setattr(whole, name, x.transpose(1, dim).contiguous().transpose(1, dim))
    got = whole.backward(causal=True, q_offset=4, kernel=kernel)
    assert_gradients(got, whole.gradients, torch.float64, f"{layout} {kernel}")


def test_autocast_does_not_lower_the_dense_kernel():
    q, k, v = tensors(1, 8, 8, 2, 1, 16, dtype=torch.float32)
    whole = Whole(q, k, v, visible_ST(8, 8, True), softcap=5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = whole.backward(causal=True, softcap=5.0)
    assert_gradients(got, whole.gradients, torch.float32)


# Blocks, and what is not read.


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple) else (results,):
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return results


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"causal": True, "window_size": (90, -1)}], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_dense_kernel_holds_no_more_scores_than_forward(mask, softcap, monkeypatch):
    S, T, H = 300, 350, 3
    q, k, v = tensors(1, S, T, H, 1, 8, dtype=torch.float32)
    whole = Whole(q, k, v, visible_ST(S, T, **mask), softcap=softcap)
    for limit in (dense._SCORES, H * T * 50, H * T * 9):
        monkeypatch.setattr(dense, "_SCORES", limit)
        with Largest() as largest:
            got = whole.backward(softcap=softcap, kernel="dense", **mask)
        assert_gradients(got, whole.gradients, torch.float32, f"{limit} scores")
        held = largest.elements * (3 if softcap else 2)
        assert held <= max(limit, 3 * q.numel()), f"{held} scores held, limit {limit}"


def test_the_flash_kernel_makes_no_matrix_of_scores():
    whole = Whole(*tensors(1, 600, 700, 3, 1, 8, dtype=torch.float32), visible_ST(600, 700, True))
    with Largest() as largest:
        whole.backward(causal=True)
    assert largest.elements <= 3 * 700 * 8, f"{largest.elements} elements in one tensor"


@pytest.mark.parametrize(("kernel", "left", "first"), [("torch_flash", -1, 0), ("dense", 3, 2)])
def test_keys_that_nobody_sees_are_not_read(kernel, left, first):
    q, k, v = tensors(1, 3, 10, 2, 1, 8)
    mask: dict[str, Any] = {"causal": True, "q_offset": 5, "window_size": (left, -1)}
    whole = Whole(q, k, v, visible_ST(3, 10, **mask))  # the queries stand at 5, 6 and 7
    for x in (whole.k, whole.v):
        x[:, :first], x[:, 8:] = math.nan, math.nan
    assert_gradients(whole.backward(kernel=kernel, **mask), whole.gradients, torch.float64, kernel)


@pytest.mark.parametrize("kernel", ["torch_flash", "dense"])
def test_queries_that_see_no_key_are_not_read(kernel):
    q, k, v = tensors(2, 9, 5, 4, 2, 8)
    whole = Whole(q, k, v, visible_ST(9, 5, True, -4))
    assert (whole.lse[:, :, :4] == -math.inf).all()
    for x in (whole.q, whole.dout, whole.out):
        x[:, :4] = math.nan
    got = whole.backward(causal=True, q_offset=-4, kernel=kernel)
    assert_gradients(got, whole.gradients, torch.float64, kernel)
    assert not got[0][:, :4].any()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kernel", ["torch_flash", "dense"])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_minus_infinity_are_left_out(causal, kernel, softcap):
    if softcap and kernel != "dense":
        pytest.skip("torch_flash has no softcap")
    mask_ST = visible_ST(9, 9, causal)
    mask_ST[[0, 4, 8]] = False
    whole = Whole(*tensors(2, 9, 9, 4, 2, 8, dtype=torch.float32), mask_ST, softcap=softcap)
    assert (whole.lse == -math.inf).sum() == 2 * 4 * 3
    got = whole.backward(causal=causal, kernel=kernel, softcap=softcap)
    assert_gradients(got, whole.gradients, torch.float32, kernel)
    assert not got[0][:, [0, 4, 8]].any()


@pytest.mark.parametrize("kernel", ["torch_flash", "dense"])
def test_scores_beyond_the_lse_do_not_overflow(kernel):
    q, k, v = tensors(1, 6, 6, 2, 1, 8, dtype=torch.float32)
    q = q.abs()
    k = torch.cumsum(k.abs(), 1)  # a later key, which a causal query may not see, scores hundreds more
    whole = Whole(q, k, v, visible_ST(6, 6, True), scale=50.0)
    got = whole.backward(causal=True, kernel=kernel, softmax_scale=50.0)
    assert_gradients(got, whole.gradients, torch.float32, kernel, tolerance=1e-4)


@pytest.mark.parametrize(("B", "S", "T"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_do(B, S, T):
    for causal, dtype, softcap in product([False, True], TOLERANCE, [0.0, 2.0]):
        q, k, v = tensors(B, S, T, 4, 2, 8, 6, dtype=dtype)
        out, lse = attend(q, k, v, softmax_scale=SCALE, causal=causal, softcap=softcap)
        got = attend_backward(out, q, k, v, out, lse, softmax_scale=SCALE, causal=causal, softcap=softcap)
        assert_gradients(got, [torch.zeros_like(x).double() for x in (q, k, v)], dtype)


# Sinks.


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_sinks(dtype):
    q, k, v = tensors(2, 7, 5, 6, 2, 16, dtype=dtype)  # the first two queries see nothing but the sink
    sinks_H = torch.randn(6).to(dtype)
    whole = Whole(q, k, v, visible_ST(7, 5, True), sinks_H=sinks_H)
    *expected, expected_H = whole.gradients
    assert_gradients(whole.backward(causal=True), expected, dtype)
    got_H = sinks_backward(whole.dout, whole.out, whole.lse, sinks_H)
    assert got_H.dtype == whole.lse.dtype
    largest = (got_H - expected_H).abs().max().item() / expected_H.abs().max().item()
    assert largest <= TOLERANCE[dtype], f"largest difference {largest:.3g}"


def test_sinks_of_no_weight():
    q, k, v = tensors(2, 7, 5, 6, 2, 16)
    sinks_H = torch.full((6,), -math.inf, dtype=torch.float64)
    out, lse = fold_sinks(*attend(q, k, v, softmax_scale=SCALE, causal=True), sinks_H)
    assert (lse == -math.inf).any()
    got_H = sinks_backward(torch.randn_like(out), out, lse, sinks_H)
    assert torch.equal(got_H, torch.zeros(6, dtype=torch.float64)), f"largest {got_H.abs().max():.3g}"


# Together with forward, in autograd.


class Attention(torch.autograd.Function):
    """Attention with sinks over keys in two shards, backward rectangle by rectangle."""

    @staticmethod
    def forward(ctx, q, k, v, sinks_H, arguments):
        cut, offset = k.shape[1] // 2, arguments["q_offset"]
        ctx.shards = [(slice(0, cut), offset), (slice(cut, None), offset - cut)]
        parts = [attend(q, k[:, j], v[:, j], **{**arguments, "q_offset": at}) for j, at in ctx.shards]
        out, lse = parts[0]
        merge_(out, lse, *parts[1])
        out, lse = fold_sinks(out, lse, sinks_H)
        ctx.save_for_backward(q, k, v, sinks_H, out, lse)
        ctx.arguments = arguments
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, sinks_H, out, lse = ctx.saved_tensors
        parts = [
            attend_backward(dout, q, k[:, j], v[:, j], out, lse, **{**ctx.arguments, "q_offset": at})
            for j, at in ctx.shards
        ]
        dqs, dks, dvs = zip(*parts, strict=True)
        return sum(dqs), torch.cat(dks, 1), torch.cat(dvs, 1), sinks_backward(dout, out, lse, sinks_H), None


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize(("causal", "q_offset"), [(False, 0), (True, 2), (True, -2)])
@pytest.mark.parametrize(("H", "K", "D", "E"), [(2, 1, 3, 2), (2, 2, 2, 3)])
def test_gradcheck(H, K, D, E, causal, q_offset, softcap):
    inputs = (*tensors(2, 4, 6, H, K, D, E), torch.randn(H, dtype=torch.float64))
    for x in inputs:
        x.requires_grad_()
    arguments = {"softmax_scale": SCALE, "causal": causal, "q_offset": q_offset, "softcap": softcap}
    assert torch.autograd.gradcheck(lambda *tensors: Attention.apply(*tensors, arguments), inputs)


# Selection and errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "magic"}, "unknown"),
        ({"kernel": "flash_attn_2"}, "does not run on cpu"),
        ({"kernel": "torch_flash", "softcap": 2.0}, "softcap"),
        ({"kernel": "torch_flash", "window_size": (1, 0)}, "window"),
    ],
)
def test_kernels_are_picked_as_in_forward(arguments, message):
    q, k, v = tensors(1, 3, 5, 4, 2, 8)
    out, lse = attend(q, k, v, softmax_scale=1.0)
    with pytest.raises(ValueError, match=message):
        attend_backward(out, q, k, v, out, lse, softmax_scale=1.0, **arguments)


def test_errors_say_what_is_wrong():
    q, k, v = tensors(1, 3, 5, 4, 2, 8, 6)
    out, lse = attend(q, k, v, softmax_scale=1.0)
    for dout, o, log in [(q, out, lse), (out, out[:, :2], lse), (out, out, lse.mT)]:
        with pytest.raises(ValueError, match=r"\(1, 3, 4, 6\), lse \(1, 4, 3\)"):
            attend_backward(dout, q, k, v, o, log, softmax_scale=1.0)
    with pytest.raises(ValueError, match="float dtype"):
        attend_backward(out, q, k.float(), v, out, lse, softmax_scale=1.0)
    for dout, o, log, sinks in [(q, out, lse, 4), (out, out, lse.mT, 4), (out, out, lse, 3)]:
        with pytest.raises(ValueError, match="one sink per head"):
            sinks_backward(dout, o, log, torch.zeros(sinks))


ON_CUDA = ["flash_attn_3", "flash_attn_4", "flash_attn_2", "torch_flash", "torch_efficient", "dense"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kernel", ["flash_attn_3", "flash_attn_4", "flash_attn_2", "torch_flash", "torch_efficient", "dense"]
)
def test_on_cuda(kernel, dtype):
    if kernel not in available_kernels("cuda", dtype):
        pytest.skip(f"{kernel} is not available")
    for (H, K), (D, E) in product([(9, 3), (5, 1), (7, 7)], [(64, 64), (24, 16), (5, 5)]):
        for (S, T, q_offset), causal in product(CAUSAL_SHAPES, [False, True]):
            whole = Whole(*tensors(2, S, T, H, K, D, E, dtype=dtype), visible_ST(S, T, causal, q_offset))
            for name in ("q", "k", "v", "dout", "out", "lse"):
                setattr(whole, name, getattr(whole, name).cuda())
            got = [x.float() for x in whole.backward(causal=causal, q_offset=q_offset, kernel=kernel)]
            assert_gradients(got, whole.gradients, dtype, f"{kernel} {S}x{T} {H}/{K} {D}/{E}", tolerance=2e-2)
