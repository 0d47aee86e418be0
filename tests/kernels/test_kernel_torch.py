"""torch's flash operator for CPUs: how the keys of few queries are cut for the threads.

Results are compared with the dense reference; that the work is shared, and that nothing is copied, is read off the
operator's calls.
"""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.kernels import torch_flash as kernel_torch
from fapool_plugin.kernels.forward import attend
from tests.dense_attention import TOLERANCE, check, tensors


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def any_keys_are_cut(monkeypatch):
    monkeypatch.setattr(kernel_torch, "_LEAST_KEYS", 1)


@pytest.fixture
def operator_calls(monkeypatch):
    """Shapes of every call of torch's CPU operator, with the storages of its keys and values."""
    on_cpu, calls = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, []

    def recorder(q, k, v, dropout_p, is_causal, *, scale):
        calls.append((q.shape, k.shape, [x.untyped_storage().data_ptr() for x in (k, v)]))
        return on_cpu(q, k, v, dropout_p, is_causal, scale=scale)

    aten = SimpleNamespace(_scaled_dot_product_flash_attention_for_cpu=recorder)
    monkeypatch.setattr(torch.ops, "aten", aten)
    return calls


@pytest.mark.parametrize(("H", "K"), [(9, 3), (5, 1), (2, 2), (70, 2)])
@pytest.mark.parametrize("S", [1, 2, 5, 8, 40])
def test_few_queries_on_any_number_of_threads(S, H, K, threads, any_keys_are_cut):
    for B, T in product([1, 2, 3], [0, 1, 2, 3, 4, 5, 11, 12, 17, 64]):
        check(*tensors(B, S, T, H, K, 8), causal=True)
    check(*tensors(2, S, 19, H, K, 8, 5), causal=True, q_offset=3)
    check(*tensors(2, S, 19, H, K, 5, 8), window_size=(-1, 4), q_offset=18)
    check(*tensors(1, S, 23, H, K, 8))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_long_keys_on_any_number_of_threads(dtype, threads):
    least = kernel_torch._LEAST_KEYS
    for (B, S), T in product([(1, 1), (2, 1), (1, 4)], [2 * least - 1, 2 * least, 4 * least + 3]):
        q, k, v = tensors(B, S, T, 6, 3, 16, dtype=dtype)
        stored = torch.full((2, B, 3, T + 70, 16), math.nan, dtype=dtype)  # k and v; B, K, capacity, D
        stored[0, :, :, 5 : T + 5], stored[1, :, :, 5 : T + 5] = k.transpose(1, 2), v.transpose(1, 2)
        check(q, *(x[:, :, 5 : T + 5].transpose(1, 2) for x in stored), causal=True)


def test_chunks_of_very_different_weight(threads, any_keys_are_cut):
    q, k, v = tensors(1, 1, 13, 2, 1, 8, dtype=torch.float32)
    for loudest in (0, 6, 12):
        k[:], k[:, loudest] = -q[:, :, :1], q[:, 0, :1]
        for scale in (0.1, 100.0):
            scores = torch.einsum("h d, t d -> h t", q[0, 0].double(), k[0, :, 0].double()) * scale
            out, lse = attend(q, k, v, softmax_scale=scale)
            expected = torch.softmax(scores, -1) @ v[0, :, 0].double()
            largest = (out[0, 0].double() - expected).abs().max().item()
            assert largest < 1e-4, f"key {loudest}, scale {scale}: largest difference {largest:.3g}"
            off = (lse[0, :, 0].double() / scores.logsumexp(-1) - 1).abs().max().item()
            assert off < 1e-5, f"key {loudest}, scale {scale}: lse off by a factor of {off:.3g}"


@pytest.mark.parametrize("S", [1, 4])
def test_keys_are_read_once_and_never_copied(S, threads, any_keys_are_cut, operator_calls):
    T = 101
    stored = torch.randn(2, 1, 3, T + 9, 8)
    k, v = (x[:, :, :T].transpose(1, 2) for x in stored)
    attend(torch.randn(1, S, 9, 8), k, v, softmax_scale=0.3, causal=True)
    assert all(storages == [stored.untyped_storage().data_ptr()] * 2 for *_, storages in operator_calls)
    read = sum(shape[0] * shape[2] for _, shape, _ in operator_calls)
    assert read == T, f"{read} keys of a head read in {operator_calls}, of {T}"
    widest = max(shape[0] * shape[1] for _, shape, _ in operator_calls)
    assert widest % threads == 0, f"{widest} pieces of work for {threads} threads"


def test_a_batch_that_keeps_the_threads_busy_is_not_cut(any_keys_are_cut, operator_calls):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        attend(*tensors(8, 1, 40, 9, 3, 8), softmax_scale=0.3)
        torch.set_num_threads(1)
        attend(*tensors(1, 1, 40, 9, 3, 8), softmax_scale=0.3)
    finally:
        torch.set_num_threads(before)
    assert [tuple(shape) for _, shape, _ in operator_calls] == [(8, 3, 40, 8), (1, 3, 40, 8)]


@pytest.mark.parametrize(("S", "rows"), [(100, 300), (191, 573), (256, 768), (300, 900), (200, 200), (800, 800)])
def test_heads_of_a_group_are_rows_where_that_makes_larger_steps(S, rows, operator_calls):
    check(*tensors(2, S, 70, 6, 2, 8))
    assert [shape[2] for shape, *_ in operator_calls] == [rows], f"{operator_calls}"


@given(units=st.integers(1, 70), threads=st.integers(1, 40), most=st.integers(0, 50))
@settings(max_examples=300, deadline=None)
def test_chunks_leave_no_thread_much_longer_busy_than_need_be(units, threads, most):
    def busiest(chunks):
        """Each thread takes the same number of chunks from the front, until none are left."""
        todo, each = units * chunks, next(n for n in range(1, units * chunks + 1) if n * threads >= units * chunks)
        taken = [max(0, min(each, todo - each * thread)) for thread in range(threads)]
        assert sum(taken) == todo
        return max(taken) / chunks

    chosen = kernel_torch.chunk_count(units, threads, most)
    assert 1 <= chosen <= max(1, most)
    times = {chunks: busiest(chunks) for chunks in range(1, max(1, most) + 1)}
    shortest = min(times.values())
    assert times[chosen] <= 1.25 * shortest, f"{chosen} chunks take {times[chosen]}, the shortest {shortest}"
    assert chosen <= threads
    if threads == 1 or units % threads == 0:
        assert chosen == 1
