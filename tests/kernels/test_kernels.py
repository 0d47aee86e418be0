"""Kernels against a dense fp64 reference, merging, sinks, and the choice of a kernel.

What needs CUDA is marked gpu; what surrounds the operators for it is tried in test_operators.
"""

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fapool_plugin.kernels import dense
from fapool_plugin.kernels.forward import attend, available_kernels, fold_sinks, merge_, pick_kernel
from tests.dense_attention import TOLERANCE, assert_attention, check, reference, tensors, visible_ST

# (S, T, q_offset): a square, a rectangle before it, queries past the last key, one token, a late start.
CAUSAL_SHAPES = [(40, 40, None), (17, 60, None), (30, 50, 5), (30, 25, 10), (1, 70, None), (9, 5, -3)]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# The mask, on every kernel that runs here.

LENGTHS = [(1, 1), (1, 9), (5, 5), (7, 3), (3, 11), (6, 0), (0, 4), (0, 0)]
OFFSETS = [None, 0, -2, -50, 2, 4, 50]
WINDOWS = [(3, 0), (2, 2), (0, 0), (-1, 1), (1, -1), (0, 4), (100, 100), (100, 0)]
ANY_MASK = st.fixed_dictionaries(
    {
        "causal": st.booleans(),
        "q_offset": st.none() | st.integers(-15, 15),
        "window_size": st.tuples(st.integers(-1, 14), st.integers(-1, 14)),
    }
)


@pytest.mark.parametrize("kernel", [None, "torch_flash", "dense"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("S", "T"), LENGTHS)
def test_every_offset_of_every_rectangle(S, T, causal, kernel):
    q, k, v = tensors(2, S, T, 6, 2, 16)
    for q_offset in OFFSETS:
        check(q, k, v, causal=causal, q_offset=q_offset, kernel=kernel)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", WINDOWS)
def test_windows(window_size, causal):
    for (S, T), q_offset in product(LENGTHS, OFFSETS):
        q, k, v = tensors(1, S, T, 3, 1, 16)
        check(q, k, v, causal=causal, q_offset=q_offset, window_size=window_size)


@given(
    S=st.integers(0, 12),
    T=st.integers(0, 12),
    mask=ANY_MASK,
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    dims=st.sampled_from([(4, 4), (4, 7), (5, 2)]),
    softcap=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=300, deadline=None)
def test_any_mask(S, T, mask, heads, dims, softcap):
    q, k, v = tensors(1, S, T, *heads, *dims)
    check(q, k, v, softcap=softcap, **mask)


@pytest.mark.parametrize(("kernel", "left", "first"), [("torch_flash", -1, 0), ("dense", 3, 2)])
def test_keys_that_nobody_sees_are_not_read(kernel, left, first):
    q, k, v = tensors(1, 3, 10, 2, 1, 8)
    for x in (k, v):
        x[:, :first], x[:, 8:] = math.nan, math.nan  # the queries stand at 5, 6 and 7
    mask: dict[str, Any] = {"causal": True, "q_offset": 5, "window_size": (left, -1)}
    expected = reference(q, k[:, first:8], v[:, first:8], visible_ST(3, 10, **mask)[:, first:8], 0.3)
    got = attend(q, k, v, softmax_scale=0.3, kernel=kernel, **mask)
    assert_attention(got, expected, torch.float64, kernel)


# Heads, head dims, dtypes, strides, sizes.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("H", "K"), [(9, 3), (5, 1), (7, 7), (6, 2)])
@pytest.mark.parametrize(("D", "E"), [(16, 16), (64, 64), (5, 5), (24, 16), (16, 24)])
def test_heads_and_head_dims(H, K, D, E, causal):
    for (S, T), kernel in product([(4, 9), (9, 4), (1, 8)], ["torch_flash", "dense"]):
        check(*tensors(2, S, T, H, K, D, E), causal=causal, q_offset=3, kernel=kernel)


@pytest.mark.parametrize("kernel", ["torch_flash", "dense"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_dtypes(dtype, kernel):
    for S, T, q_offset in CAUSAL_SHAPES:
        q, k, v = tensors(2, S, T, 6, 2, 64, dtype=dtype)
        check(q, k, v, causal=True, q_offset=q_offset, kernel=kernel)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_softcap(dtype):
    q, k, v = tensors(2, 12, 30, 6, 2, 16, dtype=dtype)
    check(q, k, v, softcap=1.5, causal=True)
    check(q, k, v, softcap=1.5, causal=True, window_size=(7, -1))
    check(q[:, -1:], k, v, softcap=1.5)


@pytest.mark.parametrize("kernel", ["torch_flash", "dense"])
@pytest.mark.parametrize("layout", ["heads first, spare room", "last dimension strided", "expanded"])
def test_strided_inputs(layout, kernel):
    q, k, v = tensors(2, 6, 10, 6, 2, 16, 16)
    if layout == "heads first, spare room":
        stored = torch.full((2, 2, 2, 32, 16), math.nan, dtype=q.dtype)  # k and v; B, K, capacity, D
        stored[0, :, :, :10], stored[1, :, :, :10] = k.transpose(1, 2), v.transpose(1, 2)
        k, v = (x[:, :, :10].transpose(1, 2) for x in stored)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "last dimension strided":
        q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    else:
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    for S in (6, 1):
        check(q[:, :S], k, v, causal=True, q_offset=4, kernel=kernel)


@pytest.mark.parametrize(("B", "S", "T"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_do(B, S, T):
    for causal, dtype, softcap in product([False, True], TOLERANCE, [0.0, 2.0]):
        check(*tensors(B, S, T, 4, 2, 8, 6, dtype=dtype), causal=causal, softcap=softcap)


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"causal": True, "window_size": (90, -1)}], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_more_than_one_block(mask, softcap, monkeypatch):
    q, k, v = tensors(1, 600, 700, 3, 1, 8, dtype=torch.float32)
    for largest_block in (dense._SCORES, 3 * 700 * 50, 3 * 700 * 7):
        monkeypatch.setattr(dense, "_SCORES", largest_block)
        check(q, k, v, softcap=softcap, kernel="dense", **mask)


def test_large_scores_do_not_overflow():
    q, k, v = tensors(1, 6, 9, 2, 1, 8, dtype=torch.float32)
    expected = torch.softmax(q.double()[0, :, 0] @ k.double()[0, :, 0].T * 500.0, -1) @ v.double()[0, :, 0]
    for kernel in ("torch_flash", "dense"):
        out, lse = attend(q, k, v, softmax_scale=500.0, kernel=kernel)
        assert lse.isfinite().all()
        largest = (out[0, :, 0].double() - expected).abs().max().item()
        assert largest < 1e-3, f"{kernel}: largest difference {largest:.3g}"


def test_autocast_does_not_lower_the_dense_kernel():
    q, k, v = tensors(1, 8, 8, 2, 1, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(q, k, v, softcap=5.0, causal=True)


# Merging and sinks.


def empty_part(B, S, H, E, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    return torch.zeros(B, S, H, E, dtype=dtype), torch.full((B, H, S), -math.inf, dtype=dtype)


@given(
    cuts=st.lists(st.integers(0, 20), min_size=0, max_size=3),
    order=st.randoms(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    causal=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_parts_merge_to_the_whole_in_any_order(cuts, order, dtype, causal):
    S, T, scale = 8, 20, 0.25
    q, k, v = tensors(1, S, T, 4, 2, 16, dtype=dtype)
    ranges = list(pairwise([0, *sorted(cuts), T]))
    order.shuffle(ranges)
    total = empty_part(1, S, 4, 16, torch.float64 if dtype == torch.float64 else torch.float32)
    for first, last in ranges:
        cut = slice(first, last)
        part = attend(q, k[:, cut], v[:, cut], softmax_scale=scale, causal=causal, q_offset=4 - first)
        merge_(*total, *part)
    expected = reference(q, k, v, visible_ST(S, T, causal, 4), scale)
    assert_attention((total[0].to(dtype), total[1]), expected, dtype, f"{dtype} ranges {ranges}")


def test_empty_parts_weigh_nothing():
    part = attend(*tensors(1, 3, 5, 2, 1, 8), softmax_scale=0.3)
    empty = empty_part(1, 3, 2, 8)
    for first, second, both in [(part, empty, part), (empty, part, part), (empty, empty, empty)]:
        out, lse = first[0].clone(), first[1].clone()
        merge_(out, lse, *second)
        assert_attention((out, lse), both, torch.float64)


def test_merge_ignores_what_an_empty_part_holds_but_hides_no_nan():
    out, lse = attend(*tensors(1, 3, 5, 2, 1, 8), softmax_scale=0.3)
    before = out.clone()
    merge_(out, lse, torch.full_like(out, 1e30), torch.full_like(lse, -math.inf))
    assert torch.equal(out, before), f"largest difference {(out - before).abs().max():.3g}"
    merge_(out, lse, torch.zeros_like(out), torch.full_like(lse, math.nan))
    assert lse.isnan().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_sinks(dtype):
    q, k, v = tensors(2, 7, 5, 6, 2, 16, dtype=dtype)
    sinks_H = torch.randn(6).to(dtype)
    out, lse = attend(q, k, v, softmax_scale=0.25, causal=True)  # the first two queries see nothing
    mask = visible_ST(7, 5, True)
    expected = reference(q, k, v, mask, 0.25, sinks_H=sinks_H)
    assert_attention(fold_sinks(out, lse, sinks_H), expected, dtype, "sinks")
    assert_attention(fold_sinks(out, lse, torch.full((6,), -math.inf)), reference(q, k, v, mask, 0.25), dtype)


# Selection and errors.


def test_the_fast_kernel_is_offered_and_picked_where_it_can():
    for dtype in TOLERANCE:
        assert available_kernels("cpu", dtype) == ("torch_flash", "dense")
    assert available_kernels("cuda", torch.float64) == ("dense",)
    assert available_kernels("cuda", torch.bfloat16, 512) == ("dense",)
    assert pick_kernel("cpu", torch.float32, 64) == "torch_flash"
    assert pick_kernel("cpu", torch.float32, 64, left_window=True) == "dense"
    assert pick_kernel("cpu", torch.float32, 64, softcap=True) == "dense"


def test_a_window_that_hides_nothing_keeps_the_fast_kernel():
    q, k, v = tensors(1, 6, 9, 4, 2, 8)
    check(q, k, v, causal=True, window_size=(8, -1), kernel="torch_flash")
    check(q[:, -1:], k, v, causal=True, window_size=(4, -1), kernel="torch_flash")  # keys cut, no mask
    with pytest.raises(ValueError, match="window"):
        attend(q, k, v, softmax_scale=1.0, causal=True, window_size=(7, -1), kernel="torch_flash")


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        (((1, 3, 4, 8), (1, 5, 3, 8), (1, 5, 3, 8)), {}, "multiple"),
        (((1, 3, 0, 8), (1, 5, 1, 8), (1, 5, 1, 8)), {}, "multiple"),
        (((2, 3, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8)), {}, r"\(2, 3, 4, 8\)"),
        (((1, 3, 4, 8), (1, 5, 2, 8), (1, 4, 2, 8)), {}, "in common"),
        (((1, 3, 4, 8), (1, 5, 2, 6), (1, 5, 2, 8)), {}, "in common"),
        (((3, 4, 8), (5, 2, 8), (5, 2, 8)), {}, "four dimensions"),
        (None, {"softcap": -1.0}, "softcap"),
        (None, {"softcap": math.nan}, "softcap"),
        (None, {"window_size": (-2, 0)}, "window_size"),
        (None, {"kernel": "magic"}, "unknown"),
        (None, {"kernel": "flash_attn_2"}, "does not run on cpu"),
        (None, {"kernel": "torch_efficient"}, "does not run on cpu"),
        (None, {"kernel": "torch_flash", "softcap": 2.0}, "softcap"),
        (None, {"kernel": "torch_flash", "window_size": (1, 0)}, "window"),
    ],
)
def test_errors_say_what_is_wrong(shapes, arguments, message):
    q, k, v = (torch.zeros(s) for s in shapes or ((1, 3, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8)))
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, softmax_scale=1.0, **arguments)


def test_errors_of_dtype():
    q, k, v = tensors(1, 3, 5, 2, 1, 8, dtype=torch.float32)
    for inputs in [(q, k.double(), v), (q.long(), k.long(), v.long())]:
        with pytest.raises(ValueError, match="float dtype"):
            attend(*inputs, softmax_scale=1.0)
    half = empty_part(1, 3, 2, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="accumulators"):
        merge_(*half, *half)
    with pytest.raises(ValueError, match="cut both"):
        merge_(*empty_part(1, 3, 2, 8), *empty_part(1, 2, 2, 8))
    with pytest.raises(ValueError, match="one sink per head"):
        fold_sinks(*empty_part(1, 3, 2, 8), torch.zeros(3))


ON_CUDA = ["flash_attn_3", "flash_attn_4", "flash_attn_2", "torch_flash", "torch_efficient", "dense"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ON_CUDA)
def test_on_cuda(kernel, dtype):
    if kernel not in available_kernels("cuda", dtype):
        pytest.skip(f"{kernel} is not available")
    for (H, K), (D, E) in product([(9, 3), (5, 1), (7, 7)], [(64, 64), (24, 16), (5, 5)]):
        for S, T, q_offset in CAUSAL_SHAPES:
            q, k, v = (x.cuda() for x in tensors(2, S, T, H, K, D, E, dtype=dtype))
            for causal in (False, True):
                got = attend(q, k, v, softmax_scale=0.2, causal=causal, q_offset=q_offset, kernel=kernel)
                expected = reference(q.cpu(), k.cpu(), v.cpu(), visible_ST(S, T, causal, q_offset), 0.2)
                assert_attention(got, expected, dtype, f"{kernel} {S}x{T} {H}/{K} {D}/{E}")
