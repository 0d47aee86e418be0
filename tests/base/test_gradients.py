"""Gradients of one pooled call over real links: by finite differences, and against a dense fp64 reference."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.base.gradients import Gradients
from fapool_plugin.base.requests import Requests
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.kernels.backward import attend_backward
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.pool import worker
from fapool_plugin.pool.bands import Bands
from fapool_plugin.wire.messages import Message
from tests.base.test_attention import D, E, H, K, dense, managers

__all__ = ["managers"]  # a fixture


def pooled(
    manager: ResourceManager, geometry: Geometry, softcap: float = 0.0, lost: Callable[[], object] = lambda: None
) -> Callable[..., Tensor]:
    """Attention of (q, k, v, sinks) as one training forward; ``lost`` is called between forward and backward."""
    layer = FAPoolAttention(manager, 0, 1, stands_for="sdpa")

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        decided = manager.begin("training", geometry.columns, lambda: geometry, SequenceState(), lasting=True)
        assert decided.pooled
        decided = decided.in_graph(manager.watch)
        out = layer(q, k, v, decided=decided, softmax_scale=D**-0.5, softcap=softcap, sinks_H=sinks)
        manager.end(decided)
        lost()
        return out

    return function


def inputs(batch: int, columns: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and sinks that ask for gradients."""
    torch.manual_seed(columns)
    shapes = (batch, H, columns, D), (batch, K, columns, D), (batch, K, columns, E), (H,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["line", "query_blocks"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_finite_differences(managers: Any, ranks: int, mode: str, with_sinks: bool) -> None:
    manager = managers(pool_ranks=ranks, partition=mode)
    function, given_ = pooled(manager, Geometry((0, 2), (5, 5), 0, 5)), inputs(2, 5)
    before = manager.stats()["backward"]["pooled_calls"]
    # Random directions; one case looks at every element.
    fast = (ranks, with_sinks) != (2, True)
    assert torch.autograd.gradcheck(function, given_ if with_sinks else given_[:3], nondet_tol=1e-12, fast_mode=fast)
    assert manager.stats()["backward"]["pooled_calls"] > before


ROWS = st.lists(st.one_of(st.just((0, 30)), st.tuples(st.integers(0, 20), st.integers(0, 40))), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(
    rows=ROWS,
    ranks=st.integers(1, 4),
    mode=st.sampled_from(["line", "query_blocks"]),
    softcap=st.sampled_from([0.0, 2.0]),
    with_sinks=st.booleans(),
    share=st.sampled_from([None, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_against_a_dense_reference(
    managers: Any, rows: Any, ranks: int, mode: str, softcap: float, with_sinks: bool, share: Any, dtype: torch.dtype
) -> None:
    columns = max(start + length for start, length in rows)
    if not columns or not any(length for _, length in rows):
        return
    geometry = Geometry(tuple(s for s, _ in rows), tuple(s + n for s, n in rows), 0, columns)
    manager = managers(pool_ranks=ranks, partition=mode, base_share=share)
    q, k, v, sinks = inputs(len(rows), columns, dtype)
    given_ = [q, k, v, *([sinks] if with_sinks else [])]
    out = pooled(manager, geometry, softcap)(*given_)
    dout = torch.randn(out.shape, dtype=dtype)
    for row, (start, length) in enumerate(rows):  # padding's outputs do not count
        dout[row, :start] = 0
        dout[row, start + length :] = 0
    found = torch.autograd.grad(out, given_, dout)
    twins = [x.detach().double().requires_grad_() for x in given_]
    want = dense(twins[0], twins[1], twins[2], geometry, D**-0.5, softcap, twins[3] if with_sinks else None)
    expected = torch.autograd.grad(want, twins, dout.double())
    for name, grad, exact in zip("qkvs", found, expected, strict=False):
        assert grad.dtype == dtype
        allowed = (1e-5 if dtype == torch.float32 else 1e-11) * max(1.0, exact.abs().max().item())
        worst = (grad.double() - exact).abs().max().item()
        assert worst < allowed, f"d{name}: largest difference {worst:.2e}, {allowed:.2e} allowed"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("how", ["released", "closed"])
def test_the_lease_went_back_in_between(how: str) -> None:
    """Backward takes a new one, or computes everything itself."""
    from fapool_plugin.config import FAPoolConfig
    from tests.thread_pool import ThreadPool

    geometry = Geometry((0,), (30,), 0, 30)
    with ResourceManager(FAPoolConfig(threshold=8, memory_limit_mib=64, pool_ranks=2), ThreadPool) as manager:

        def goes_back() -> None:
            if how == "closed":
                manager.close()
            else:
                manager.begin("prefill", 2, lambda: Geometry((0,), (2,), 0, 2), SequenceState())

        q, k, v, _ = inputs(1, 30)
        out = pooled(manager, geometry, lost=goes_back)(q, k, v)
        assert not manager.ranks
        dout = torch.randn(out.shape, dtype=out.dtype)
        found = torch.autograd.grad(out, (q, k, v), dout)
        twins = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        want = dense(twins[0], twins[1], twins[2], geometry, D**-0.5, 0.0, None)
        expected = torch.autograd.grad(want, twins, dout)
        for name, grad, exact in zip("qkv", found, expected, strict=True):
            assert torch.allclose(grad, exact, atol=1e-11), f"d{name}: {(grad - exact).abs().max():.2e}"
        counts = manager.stats()["backward"]
        assert (counts["pooled_calls"], counts["local_calls"]) == ((0, 1) if how == "closed" else (1, 0))


def test_threads_of_several_devices_take_turns(managers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd computes a backward in a thread for each device: here two backwards in two threads."""
    manager, geometry, together = managers(pool_ranks=2), Geometry((0,), (30,), 0, 30), threading.Barrier(2)
    inside, most, errors = [0], [0], list[BaseException]()

    def alone(real: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*args: Any) -> Any:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            try:
                return real(*args)
            finally:
                inside[0] -= 1

        return entered

    calls = [inputs(1, 30)[:3] for _ in range(2)]
    outs = [pooled(manager, geometry)(*qkv) for qkv in calls]
    for name in ("post", "wait"):
        monkeypatch.setattr(Requests, name, alone(getattr(Requests, name)))

    def backward(out: Tensor) -> None:
        together.wait(10)
        try:
            out.sum().backward()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=backward, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert most == [1], "two calls asked, or waited, at a time"
    wanted = [x.detach().clone().requires_grad_() for x in calls[0]]
    dense(wanted[0], wanted[1], wanted[2], geometry, D**-0.5, 0.0, None).sum().backward()
    for qkv in calls:
        for ours, theirs in zip(qkv, wanted, strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            difference = (ours.grad - theirs.grad).abs().max().item()
            assert difference < 1e-10, f"largest difference {difference:.3g}"


@pytest.mark.parametrize("bands", [1, 3])
def test_what_a_kernel_has_rounded_travels_rounded(managers: Any, bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels for GPUs do it: in half the bytes, as exact as they were, and summed in fp32 at both ends."""

    def rounding(dout: Tensor, q: Tensor, *rest: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
        return tuple(x.to(q.dtype) for x in attend_backward(dout, q, *rest, **arguments))

    def cut(self: Bands, queries: int, flops: int) -> Iterator[slice]:
        step = -(-queries // bands)
        return (slice(start, min(queries, start + step)) for start in range(0, queries, step))

    seen: list[Tensor] = []

    def merge(self: Gradients, answer: Message, request: Any) -> None:
        seen.extend(answer.tensors)
        merged(self, answer, request)

    merged = Gradients.merge
    monkeypatch.setattr(worker, "attend_backward", rounding)
    monkeypatch.setattr(Bands, "cut", cut)
    monkeypatch.setattr(Gradients, "merge", merge)
    geometry = Geometry((0,), (60,), 0, 60)
    q, k, v, _ = inputs(1, 60, torch.bfloat16)
    out = pooled(managers(pool_ranks=3, base_share=0.0), geometry)(q, k, v)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    assert {x.dtype for x in seen if x.numel()} == {torch.bfloat16}
    twins = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = dense(twins[0], twins[1], twins[2], geometry, D**-0.5, 0.0, None)
    for name, grad, exact in zip("qkv", found, torch.autograd.grad(want, twins, dout.double()), strict=True):
        worst, scale = (grad.double() - exact).abs().max().item(), exact.abs().max().item()
        assert worst < 2e-2 * scale, f"d{name}: largest difference {worst:.2e}, largest {scale:.2e}"
