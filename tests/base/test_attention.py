"""One pooled attention call over real links, against a dense fp64 reference: whatever is resident, padded or lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.base.requests import Requests
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.wire.messages import HEADER_BYTES, TILE_FIELDS
from tests.thread_pool import ThreadPool

H, K, D, E = 6, 3, 8, 5


@pytest.fixture(scope="module")
def managers() -> Iterator[Callable[..., ResourceManager]]:
    """Managers by configuration, kept for the module: links are cheap, but not free."""
    made: dict[Any, ResourceManager] = {}

    def get(**keys: Any) -> ResourceManager:
        key = tuple(sorted(keys.items()))
        if key not in made:
            made[key] = ResourceManager(FAPoolConfig(threshold=0, kv_block=4, memory_limit_mib=64, **keys), ThreadPool)
        return made[key]

    yield get
    for manager in made.values():
        manager.close()


def dense(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """(B, S, H, E) in fp64, by the explicit mask of padding and causality; 0 where a query is padding."""
    batch, heads, queries, _ = q.shape
    q, k, v = q.double(), k.double().repeat_interleave(heads // K, 1), v.double().repeat_interleave(heads // K, 1)
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    columns = torch.arange(geometry.columns)
    out = torch.zeros(batch, queries, heads, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        real = (columns >= geometry.starts[b]) & (columns < geometry.stops[b])
        for i in range(queries):
            column = geometry.q_column + i
            if not real[column]:
                continue
            seen = real & (columns <= column)
            logits = scores[b, :, i, seen]
            if sinks is not None:
                logits = torch.cat([logits, sinks.double()[:, None]], 1)
            weights = logits.softmax(-1)[:, : int(seen.sum())]
            out[b, i] = torch.einsum("ht,htd->hd", weights, v[b][:, seen])
    return out


def check(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert got.isfinite().all()
    assert bool(got.any()) == bool(want.any()), "all zero"
    difference = (got.double() - want).abs().max().item() if got.numel() else 0.0
    assert difference < tolerance, f"largest difference {difference:.2e}"


class Stream:
    """A batch that grows, call by call, as a cache would hold it."""

    def __init__(self, manager: ResourceManager, starts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.manager, self.starts, self.dtype = manager, starts, dtype
        self.state, self.layer = SequenceState(), FAPoolAttention(manager, 0, 1, stands_for="sdpa")
        self.k = torch.zeros(len(starts), K, 0, D, dtype=dtype)
        self.v = torch.zeros(len(starts), K, 0, E, dtype=dtype)

    def call(
        self, new: int, *, stops: tuple[int, ...] | None = None, softcap: float = 0.0, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(pooled, reference) of one call with ``new`` columns."""
        batch, past = len(self.starts), self.k.shape[2]
        self.k = torch.cat([self.k, torch.randn(batch, K, new, D).to(self.dtype)], 2)
        self.v = torch.cat([self.v, torch.randn(batch, K, new, E).to(self.dtype)], 2)
        q = torch.randn(batch, new, H, D).to(self.dtype).transpose(1, 2)
        geometry = Geometry(self.starts, stops or (past + new,) * batch, past, past + new)
        phase = "decode" if past else "prefill"
        decided = self.manager.begin(phase, past + new, lambda: geometry, self.state)  # type: ignore[arg-type]
        assert decided.pooled
        scale = 1 / math.sqrt(D)
        try:
            got = self.layer(
                q, self.k, self.v, decided=decided, resident=True, softmax_scale=scale, softcap=softcap, sinks_H=sinks
            )
        finally:
            self.manager.end(decided)
        return got, dense(q, self.k, self.v, geometry, scale, softcap, sinks)

    def crop(self, columns: int) -> None:
        self.k, self.v = self.k[:, :, :columns], self.v[:, :, :columns]
        self.state.crop(0, columns)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("mode", ["line", "query_blocks"])
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(3, marks=pytest.mark.full)])
def test_any_history_of_calls_is_exact(
    managers: Callable[..., ResourceManager], ranks: int, mode: str, data: st.DataObject
) -> None:
    """Prompts, chunks, decode steps, drafts that are taken back: residency never changes the result."""
    manager = managers(pool_ranks=ranks, partition=mode)
    starts = tuple(data.draw(st.lists(st.sampled_from([0, 0, 0, 5, 9]), min_size=1, max_size=6)))
    stream = Stream(manager, starts)
    for call in range(data.draw(st.integers(1, 5))):
        got, want = stream.call(data.draw(st.sampled_from([10, 13, 30] if not call else [1, 1, 2, 9, 25])))
        check(got, want, 2e-5)
        if data.draw(st.booleans()):
            stream.crop(data.draw(st.integers(10, stream.k.shape[2])))
    assert manager.counters.faults == 0


@pytest.mark.parametrize("base_share", [0.0, 0.3, 0.9])
def test_any_share_of_the_base_is_exact(managers: Callable[..., ResourceManager], base_share: float) -> None:
    stream = Stream(managers(pool_ranks=2, base_share=base_share), (0, 5))
    for new in (40, 1, 1, 7):
        check(*stream.call(new), 2e-5)


def test_right_padding_softcap_and_sinks_are_exact(managers: Callable[..., ResourceManager]) -> None:
    manager = managers(pool_ranks=2)
    check(*Stream(manager, (0, 3)).call(30, stops=(22, 30)), 2e-5)
    check(*Stream(manager, (0, 0, 0, 3, 3)).call(30, stops=(22, 22, 22, 30, 30)), 2e-5)
    check(*Stream(manager, (0, 3)).call(30, softcap=0.7), 2e-5)
    check(*Stream(manager, (0, 3)).call(30, sinks=torch.randn(H)), 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 3e-2)])
def test_other_dtypes_cross_the_wire(
    managers: Callable[..., ResourceManager], dtype: torch.dtype, tolerance: float
) -> None:
    stream = Stream(managers(pool_ranks=2), (0,), dtype)
    for new in (40, 1):
        got, want = stream.call(new)
        assert got.dtype == dtype
        check(got, want, tolerance)


def test_the_bytes_sent_are_those_a_call_needs(managers: Callable[..., ResourceManager]) -> None:
    """Keys to the furthest position a rank's queries see, once; then a decode step sends queries alone."""
    manager = managers(pool_ranks=3)
    Stream(manager, (0,)).call(20)  # takes the lease
    stream = Stream(manager, (0,))
    before = manager.counters.as_dict()["bytes_sent"]
    stream.call(400)
    # 3 heads and 4 ranks at equal area: the cut of lane l at area f lies at the query where f of the pairs are below.
    pairs = [(head, i) for head in range(K) for i in range(400) for _ in range(i + 1)]
    expected = 0
    for rank in range(3):
        mine = pairs[round(len(pairs) * rank / 4) : round(len(pairs) * (rank + 1) / 4)]
        for head in {h for h, _ in mine}:
            rows = {i for h, i in mine if h == head}
            expected += 4 * ((max(rows) + 1) * (D + E) + len(rows) * (H // K) * D)
    sent = manager.counters.as_dict()["bytes_sent"] - before
    overhead = 3 * (HEADER_BYTES + 8 * TILE_FIELDS * 2 + 3 * 8)
    slack = 3 * 4 * ((D + E) + (H // K) * D) * 2  # a cut may fall one query to either side
    assert expected - slack <= sent <= expected + overhead + slack, (sent, expected)
    before = manager.counters.as_dict()["bytes_sent"]
    stream.call(1)
    step = manager.counters.as_dict()["bytes_sent"] - before
    keys = 400 * K * (D + E) * 4
    # Heartbeats of a busy machine are among them, 256 bytes each.
    assert step < keys / 4, f"a decode step sent {step} bytes: keys, too?"


def test_a_rank_that_evicted_the_keys_answers_stale_and_is_sent_them_again(
    managers: Callable[..., ResourceManager],
) -> None:
    manager = managers(pool_ranks=1)
    stream = Stream(manager, (0,))
    check(*stream.call(40), 2e-5)
    pool = manager.leases.pool
    assert isinstance(pool, ThreadPool)
    pool.workers[0].prefixes.clear()
    before = manager.counters.rank(0).stale
    check(*stream.call(1), 2e-5)
    assert manager.counters.rank(0).stale == before + 1
    calls = manager.counters.rank(0).calls
    check(*stream.call(20), 2e-5)
    assert (manager.counters.rank(0).stale, manager.counters.rank(0).calls) == (before + 1, calls + 1)


def test_a_share_that_does_not_fit_a_ranks_memory_stays_with_the_base() -> None:
    config = FAPoolConfig(pool_ranks=1, threshold=0, kv_block=4, memory_limit_mib=1)
    with ResourceManager(config, ThreadPool) as manager:
        stream = Stream(manager, (0,))
        stream.layer.layers = 10_000
        check(*stream.call(40), 2e-5)
        assert manager.counters.prefill.pooled_calls == 0
        assert manager.counters.prefill.local_calls == 1
        (reason,) = manager.stats()["local_reasons"]
        assert "memory_limit_mib" in reason


def test_an_interrupted_call_leaves_nothing_that_a_later_call_could_mistake(
    managers: Callable[..., ResourceManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = managers(pool_ranks=2)
    stream = Stream(manager, (0,))
    check(*stream.call(40), 2e-5)
    with monkeypatch.context() as patched:

        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(Requests, "_gather", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream.call(1)
    for _ in range(3):
        check(*stream.call(1), 2e-5)
    assert manager.counters.faults == 0


def test_replies_that_an_earlier_lease_gave_up_are_not_taken_for_later_ones() -> None:
    """The link outlives the lease, and so do answers that were not waited for."""
    with ResourceManager(FAPoolConfig(pool_ranks=1, threshold=0, memory_limit_mib=64), ThreadPool) as manager:
        original = Requests._gather

        def fail(*args: object) -> bool:
            raise MemoryError

        for _ in range(2):
            Requests._gather = fail  # type: ignore[assignment]
            try:
                with pytest.raises(MemoryError):
                    Stream(manager, (0,)).call(40)
            finally:
                Requests._gather = original  # type: ignore[method-assign]
            manager.leases.release("test")
        check(*Stream(manager, (0,)).call(40), 2e-5)
        assert manager.ranks[0].memory_limit == 64 * 2**20
        assert manager.counters.prefill.pooled_calls == 1
