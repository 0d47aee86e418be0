"""Ranks that merge each other's results: the same result as without, and fewer bytes at the base."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.plan.profile import AttentionCost, Fit, LinearCost, LinkCost, Machine, Profile, Shape
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.pool.exchange import Exchange
from fapool_plugin.wire.messages import Message
from tests.base.test_attention import D, E, H, K, Stream, check, dense
from tests.models import Pair, assert_same_tokens, greedily, one_thread, padded_batch, save_model
from tests.thread_pool import ThreadPool, closing_all

REDUCTIONS = ["direct", "tree", "two_level"]
MODES = ["line", "query_blocks"]
Make = Callable[..., ResourceManager]


class Nodes(ThreadPool):
    """Ranks 0 and 1 are on one node, 2 to 4 on another."""

    nodes = MappingProxyType({2: 1, 3: 1, 4: 1})


@pytest.fixture
def managers() -> Iterator[Make]:
    with closing_all(manager_of) as make:
        yield make


def manager_of(**keys: Any) -> ResourceManager:
    settings: dict[str, Any] = {"threshold": 0, "kv_block": 4, "memory_limit_mib": 64}
    return ResourceManager(FAPoolConfig(**settings | keys), Nodes)


def pool_of(manager: ResourceManager) -> ThreadPool:
    assert isinstance(manager.leases.pool, ThreadPool)
    return manager.leases.pool


def went_well(manager: ResourceManager) -> None:
    assert manager.counters.faults == 0
    assert not any(rank.apart for rank in manager.ranks), "something was missing"
    assert not any(rank.stale for rank in manager.counters.ranks.values())


def links_between(pool: ThreadPool) -> list[Exchange]:
    """What the pool's ranks know of each other, by number."""
    found = [exchange for worker in pool.workers.values() for exchange in worker.inbox._exchanges.values()]
    return sorted(found, key=lambda exchange: exchange.number)


@pytest.mark.parametrize("ranks", [*(pytest.param(ranks, marks=pytest.mark.full) for ranks in (1, 2, 4)), 3, 5])
@pytest.mark.parametrize("mode", MODES)
def test_every_way_gives_the_same_result(mode: str, ranks: int) -> None:
    """Prompt, decode steps, a draft of several tokens, a second chunk, and steps that move keys."""
    results: list[list[Tensor]] = []
    for reduction in REDUCTIONS:
        torch.manual_seed(ranks)
        with manager_of(pool_ranks=ranks, partition=mode, reduction=reduction) as manager:
            stream, got = Stream(manager, (0, 4)), []
            for new in (40, 1, 1, 9, 300, 1, *[1] * 8):
                out, want = stream.call(new)
                check(out, want, 2e-5)
                got.append(out)
            went_well(manager)
            assert manager.counters.decode.pooled_calls >= 10
            assert manager.counters.prefill.pooled_calls >= 1
            assert all(manager.counters.rank(rank).calls for rank in range(ranks))
            met = any(exchange._peers for exchange in links_between(pool_of(manager)))
            assert met == (ranks > 1 and reduction != "direct")
        results.append(got)
    for got in results[1:]:
        for one, first in zip(got, results[0], strict=True):
            difference = (one - first).abs().max().item()
            assert difference < 2e-5, f"largest difference {difference:.2e}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 5])
def test_any_history_of_calls_is_exact(managers: Make, ranks: int, mode: str) -> None:
    manager = managers(pool_ranks=ranks, partition=mode, reduction="tree")

    @settings(deadline=None, max_examples=25)
    @given(data=st.data())
    def any_history(data: st.DataObject) -> None:
        stream = Stream(manager, tuple(data.draw(st.lists(st.sampled_from([0, 0, 0, 7]), min_size=1, max_size=5))))
        for call in range(data.draw(st.integers(1, 5))):
            check(*stream.call(data.draw(st.sampled_from([10, 30] if not call else [1, 1, 2, 9, 25]))), 2e-5)
            if data.draw(st.booleans()):
                stream.crop(data.draw(st.integers(10, stream.k.shape[2])))
        went_well(manager)

    any_history()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 3e-2)])
def test_other_dtypes_are_merged_as_exactly_as_at_the_base(
    managers: Make, dtype: torch.dtype, tolerance: float
) -> None:
    stream = Stream(managers(pool_ranks=4, partition="query_blocks", reduction="tree"), (0,), dtype)
    for new in (40, 1, 1):
        got, want = stream.call(new)
        assert got.dtype == dtype
        check(got, want, tolerance)


def test_right_padding_softcap_and_sinks_are_exact(managers: Make) -> None:
    manager = managers(pool_ranks=3, partition="query_blocks", reduction="tree")
    for extra in ({"softcap": 0.7}, {"sinks": torch.randn(H)}, {"stops": (22, 30)}):
        stream = Stream(manager, (0, 3))
        check(*stream.call(30, **extra), 2e-5)
        if "stops" not in extra:
            check(*stream.call(1, **extra), 2e-5)
    went_well(manager)


def test_keys_that_serve_one_call_are_not_kept(managers: Make) -> None:
    manager = managers(pool_ranks=3, partition="query_blocks", reduction="tree")
    state = Stream(manager, (0,))
    q, k, v = (torch.randn(1, heads, 30, dim) for heads, dim in ((H, D), (K, D), (K, E)))
    geometry = Geometry((0,), (30,), 0, 30)
    decided = manager.begin("prefill", 30, lambda: geometry, state.state, lasting=False)
    got = state.layer(q, k, v, decided=decided, resident=True)
    manager.end(decided)
    check(got, dense(q, k, v, geometry, 1.0, 0.0, None), 2e-5)
    assert not any(worker.prefixes.nbytes for worker in pool_of(manager).workers.values() if not manager.ranks)
    went_well(manager)


@pytest.mark.parametrize("fan_in", [2, 3])
def test_a_tree_brings_the_base_one_result(managers: Make, fan_in: int) -> None:
    manager = managers(pool_ranks=5, partition="query_blocks", reduction="tree", reduction_fan_in=fan_in)
    stream = Stream(manager, (0,))
    stream.call(400)
    stream.call(1)
    before = [rank.link.bytes_received for rank in manager.ranks]
    check(*stream.call(1), 2e-5)
    came = [rank.link.bytes_received - old for rank, old in zip(manager.ranks, before, strict=True)]
    assert came[0] < 1024
    assert came[1:] == [0, 0, 0, 0]
    known = [len(exchange._peers) for exchange in links_between(pool_of(manager))]
    assert known == ([2, 3, 1, 1, 1] if fan_in == 2 else [3, 2, 1, 1, 1])


def test_two_levels_bring_the_base_one_result_of_each_node(managers: Make) -> None:
    manager = managers(pool_ranks=5, partition="query_blocks", reduction="two_level")
    stream = Stream(manager, (0,))
    stream.call(400)
    before = [rank.link.bytes_received for rank in manager.ranks]
    check(*stream.call(1), 2e-5)
    came = [rank.link.bytes_received - old for rank, old in zip(manager.ranks, before, strict=True)]
    assert 0 < came[0] < 1024
    assert 0 < came[2] < 1024
    assert came[1] == came[3] == came[4] == 0


def test_a_decode_step_without_help_is_one_message_each_way(managers: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = managers(pool_ranks=3)
    stream = Stream(manager, (0,))
    stream.call(400)
    sent, ask, answers = list[int](), PoolRank.ask, list[int]()
    answer = PoolRank.answer

    def asked(rank: PoolRank, *rest: Any) -> int:
        sent.append(rank.number)
        return ask(rank, *rest)

    def answered(rank: PoolRank, call: int) -> Message:
        answers.append(rank.number)
        return answer(rank, call)

    monkeypatch.setattr(PoolRank, "ask", asked)
    monkeypatch.setattr(PoolRank, "answer", answered)
    stream.call(1)
    assert sent == answers == [0, 1, 2]
    assert not links_between(pool_of(manager)), "ranks were introduced that need not know each other"


def test_a_lease_that_was_given_back_leaves_no_links(managers: Make) -> None:
    manager = managers(pool_ranks=3, partition="query_blocks", reduction="tree")
    for _ in range(3):
        stream = Stream(manager, (0,))
        for new in (40, 1):
            check(*stream.call(new), 2e-5)
        pool = pool_of(manager)
        between = [peer._link for exchange in links_between(pool) for peer in exchange._peers.values()]
        assert len(between) == 4, "0-1 and 0-2 of the tree, two ends each"
        went_well(manager)
        manager.leases.release("test")
        for end in between:
            assert end is not None
            deadline = time.monotonic() + 5
            while not end.lost:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        deadline = time.monotonic() + 5
        while links_between(pool):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_two_sequences_take_turns(managers: Make) -> None:
    manager = managers(pool_ranks=4, partition="query_blocks", reduction="tree")
    one, two = Stream(manager, (0,)), Stream(manager, (0, 3))
    for new in (40, 1, 25, 1):
        check(*one.call(new), 2e-5)
        check(*two.call(new), 2e-5)
    went_well(manager)


def test_by_itself_the_cheapest_way_is_taken() -> None:
    """Without costs each rank works alone; dear messages make hops worth their while."""
    with manager_of(pool_ranks=5, partition="query_blocks", activation="length") as manager:
        stream = Stream(manager, (0,))
        for new in (40, 1):
            check(*stream.call(new), 2e-5)
        assert not links_between(pool_of(manager))
        manager.advisor.profile = profile(LinkCost(to_rank=Fit(b=1e-9), to_base=Fit(a=1e-6)))
        check(*stream.call(1), 2e-5)
        met = [sorted(exchange._peers) for exchange in links_between(pool_of(manager))]
        assert met == [[1], [0], [3, 4], [2], [2]], "two levels"
        went_well(manager)


def profile(link: LinkCost) -> Profile:
    nothing, much = Fit(), Fit(c=1e3)
    return Profile(
        date="",
        quick=False,
        machine=Machine(processor="", cores=64, torch="", fapool=""),
        shape=Shape(hidden=1, layers=1, heads=H, kv_heads=K, head_dim=D, v_head_dim=E, dtype="float32", parameters=1),
        attention=(AttentionCost(kernel="", dtype="float32", threads=1, prefill=much, decode=much),),
        linear=(LinearCost(threads=1, prefill=nothing, decode=nothing),),
        link=link,
        activation_s=0.0,
    )


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_model_generates_the_same_with_a_tree(strategy: dict[str, Any], tmp_path: Path) -> None:
    """Four blocks in flight, then decode steps, over real processes."""
    settings = {"pool_ranks": 3, "partition": "query_blocks", "reduction": "tree"}
    with one_thread(), Pair.of(save_model("llama", tmp_path), **settings, blocks=4) as pair:
        ids, mask = padded_batch([256, 230])
        tokens, expected = pair.generate(ids, prefill=4, decode=7, **greedily(8, mask) | strategy)
        assert_same_tokens(tokens, expected)
        manager = pair.model.fa_pool
        assert manager.stats()["prefill"]["overlapped_forwards"] == 1
        ranks = [manager.counters.rank(rank) for rank in range(3)]
        assert ranks[0].bytes_received > ranks[1].bytes_received, "results did not come by way of the first rank"
