"""Ranks that sum each other's gradients: the dense reference's, fewer bytes at the base, exact whatever fails."""

from __future__ import annotations

import gc
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.base.gradients import Gradients
from fapool_plugin.base.joint import Asked, gradients
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.profile import Fit, LinkCost
from fapool_plugin.plan.shares import Geometry, Request
from fapool_plugin.plan.trees import gradient_layout
from fapool_plugin.pool.totals import GradientTotal
from fapool_plugin.wire.messages import PART_FIELDS, TILE_FIELDS, LinkLost, Message, frame_bytes
from tests.base.test_attention import D, E, H, K
from tests.base.test_gradients import inputs, pooled
from tests.base.test_joint import Nodes, links_between, pool_of, profile, went_well
from tests.dense_attention import visible_ST
from tests.dense_gradients import Whole
from tests.integrations.huggingface.test_training_residency import assert_same, counted, reference
from tests.thread_pool import closing_all

GEOMETRY = Geometry((0, 4, 1), (40, 27, 40), 0, 40)
FP64 = 8
Make = Callable[..., ResourceManager]


def manager_of(**keys: Any) -> ResourceManager:
    config: dict[str, Any] = {"threshold": 0, "memory_limit_mib": 64, "reduction": "tree", "partition": "query_blocks"}
    return ResourceManager(FAPoolConfig(**config | keys), Nodes)


@pytest.fixture
def _no_waste() -> Iterator[None]:
    """A closed link takes a while to go, and whoever collects it waits: nobody may, where seconds count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def managers() -> Iterator[Make]:
    with closing_all(manager_of) as make:
        yield make


def step(manager: ResourceManager, geometry: Geometry = GEOMETRY, sinks: bool = False) -> Tensor:
    """One call and its backward, against the dense reference. The lease lasts as long as what it returns."""
    given_ = inputs(len(geometry.starts), geometry.columns)[: 4 if sinks else 3]
    out = pooled(manager, geometry)(*given_)
    dout = torch.randn(out.shape, dtype=out.dtype)
    for row, (start, stop) in enumerate(zip(geometry.starts, geometry.stops, strict=True)):
        dout[row, :start] = 0
        dout[row, stop:] = 0
    found = torch.autograd.grad(out, given_, dout, retain_graph=True)
    assert_same(found, reference(given_, geometry, dout))
    return out


@pytest.mark.parametrize("residency", [False, True])
@pytest.mark.parametrize(
    ("reduction", "fan_in"), [("auto", 2), ("direct", 2), ("tree", 2), ("tree", 3), ("two_level", 2)]
)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_way_gives_the_dense_gradients(
    managers: Make, ranks: int, reduction: str, fan_in: int, residency: bool
) -> None:
    """Of a batch of rows of different lengths, however it is cut."""
    for mode in ("line", "query_blocks"):
        manager = managers(
            pool_ranks=ranks, reduction=reduction, reduction_fan_in=fan_in, partition=mode, training_residency=residency
        )
        graphs = [step(manager, sinks=sinks) for sinks in (False, True)]
        went_well(manager)
        assert manager.stats()["backward"]["pooled_calls"] == 2
        assert counted(manager) == ((2 * ranks, 0, 2 * ranks) if residency else (0, 0, 0))
        together = any(exchange._peers for exchange in links_between(pool_of(manager)))
        assert together == (reduction in ("tree", "two_level"))
        assert len(manager.ranks) == ranks
        del graphs


@pytest.mark.parametrize("reduction", ["direct", "tree", "two_level"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (4, 2)])
def test_a_kv_head_that_all_ranks_share(managers: Make, reduction: str, heads: int, kv_heads: int) -> None:
    manager = managers(pool_ranks=4, reduction=reduction, partition="line")
    torch.manual_seed(heads)
    shapes = (1, 150, heads, D), (1, 150, kv_heads, D), (1, 150, kv_heads, E)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    whole, geometry = Whole(q, k, v, visible_ST(150, 150, causal=True)), Geometry((0,), (150,), 0, 150)
    decided = manager.begin("training", 150, lambda: geometry, SequenceState()).in_graph(manager.watch)
    layer = FAPoolAttention(manager, 0, 1, stands_for="sdpa")
    out = layer(*(x.transpose(1, 2) for x in (q, k, v)), decided=decided, softmax_scale=0.3)
    manager.end(decided)
    assert_same(torch.autograd.grad(out, (q, k, v), whole.dout), whole.gradients)
    went_well(manager)


def brute_force(shares: list[list[Tile]]) -> tuple[int, int]:
    """(bytes of gradients that the base receives when each is summed once, when each rank sends its own)."""
    queries: set[tuple[int, ...]] = set()
    keys: list[set[tuple[int, ...]]] = []
    for share in shares:
        keys.append(set())
        for row, first, last, q_start, q_stop, k_start, k_stop in share:
            for head in range(first, last):
                queries |= {(row, head, at) for at in range(q_start, q_stop)}
                keys[-1] |= {(row, head, at) for at in range(k_start, k_stop)}
    row_bytes, key_bytes = H // K * D * FP64, (D + E) * FP64
    rows = len(queries) * row_bytes
    return rows + len(set().union(*keys)) * key_bytes, rows + sum(map(len, keys)) * key_bytes


@pytest.mark.parametrize("residency", [False, True])
@pytest.mark.parametrize("fan_in", [2, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_base_receives_each_gradient_once(
    managers: Make, monkeypatch: pytest.MonkeyPatch, ranks: int, fan_in: int, residency: bool
) -> None:
    shares: list[list[Tile]] = []
    wait = Gradients.wait

    def noted(self: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        shares[:] = [one.tiles for one in self._asked]
        return wait(self)

    monkeypatch.setattr(Gradients, "wait", noted)
    came = {}
    for reduction in ("tree", "direct"):
        manager = managers(
            pool_ranks=ranks, reduction=reduction, reduction_fan_in=fan_in, training_residency=residency, base_share=0.0
        )
        geometry = Geometry((0,), (400,), 0, 400)
        given_ = inputs(1, 400)[:3]
        out = pooled(manager, geometry)(*given_)
        before = [rank.link.bytes_received for rank in manager.ranks]
        torch.autograd.grad(out, given_, torch.randn_like(out))
        came[reduction] = [r.link.bytes_received - old for r, old in zip(manager.ranks, before, strict=True)]
        went_well(manager)
    once, each = brute_force(shares)
    first, *others = came["tree"]
    assert not any(others), f"{others} bytes came from others than the root"
    # Table: a row for each tile's queries, one for all lanes alike; each tensor begins at a multiple of 64 bytes.
    tables = 8 * (TILE_FIELDS * (sum(map(len, shares)) + 1) + PART_FIELDS * ranks)
    assert frame_bytes() + once + tables <= first <= frame_bytes() + once + tables + 5 * 63, (first, once, tables)
    assert 0 <= sum(came["direct"]) - each - ranks * frame_bytes() <= ranks * 3 * 63
    assert first < sum(came["direct"]), "a tree saves bytes at the base"


def test_by_itself_a_tree_is_for_lanes_that_are_shared(managers: Make) -> None:
    """However dear messages are; and without costs each rank answers by itself."""
    dear = LinkCost(to_rank=Fit(b=1e-9), to_base=Fit(a=1e-3))
    for shared, costs, ranks in ((True, dear, 5), (False, dear, K), (True, None, 5)):
        manager = managers(
            pool_ranks=ranks, partition="query_blocks" if shared else "line", base_share=0.0, activation="length",
            reduction="auto",
        )  # fmt: skip
        manager.advisor.profile = profile(costs) if costs is not None else None
        graph = step(manager, Geometry((0,), (40,), 0, 40))
        met = any(exchange._peers for exchange in links_between(pool_of(manager)))
        assert met == (shared and costs is not None), f"shared: {shared}, costs: {costs}"
        went_well(manager)
        del graph


def dies(manager: ResourceManager, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its next backward; all its links end, as those of a killed process do."""
    worker = pool_of(manager).workers[victim]

    def die(message: Message) -> None:
        for link in list(worker.inbox._exchanges):
            worker.inbox.leave(link)
        raise LinkLost("died")

    monkeypatch.setattr(worker, "backward", die)


def is_silent(manager: ResourceManager, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To other pool ranks; its links stand."""
    for exchange in links_between(pool_of(manager)):
        monkeypatch.setattr(exchange, "_patience_s", 0.5)
        if exchange.number == victim:
            monkeypatch.setattr(exchange, "send", lambda *args: None)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("_no_waste")
@pytest.mark.parametrize("fault", [dies, is_silent])
@pytest.mark.parametrize(("reduction", "residency"), [("tree", False), ("two_level", True)])
@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_rank_that_fails_at_any_place_costs_time_only(
    victim: int, reduction: str, fault: Any, residency: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager_of(pool_ranks=4, reduction=reduction, training_residency=residency) as manager:
        graphs = [step(manager)]
        went_well(manager)
        fault(manager, victim, monkeypatch)
        began = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            graphs += [step(manager) for _ in range(3)]
        took = time.monotonic() - began
        assert took < 5.0, f"it took {took:.1f} s"
        assert manager.counters.faults == (fault is dies)
        heard = {"tree": {0}, "two_level": {0, 2}}[reduction]
        # The base waits for the root itself; who passes nothing on anyway is not missed.
        assert [rank.apart for rank in manager.ranks] == [fault is dies or victim not in heard] * len(manager.ranks)
        stats = manager.stats()["backward"]
        # If the only root dies, nothing of that call comes.
        assert stats["local_calls"] == (fault is dies and (reduction, victim) == ("tree", 0)), stats
        del graphs


def test_a_rank_below_another_that_lost_its_calls_is_asked_again() -> None:
    given_ = inputs(3, 40)[:3]
    with manager_of(pool_ranks=3, training_residency=True) as manager:
        out = pooled(manager, GEOMETRY)(*given_)
        pool_of(manager).workers[2].calls.clear()
        dout = torch.randn(out.shape, dtype=out.dtype)
        for row, (start, stop) in enumerate(zip(GEOMETRY.starts, GEOMETRY.stops, strict=True)):
            dout[row, :start] = 0
            dout[row, stop:] = 0
        assert_same(torch.autograd.grad(out, given_, dout), reference(given_, GEOMETRY, dout))
        assert [manager.counters.rank(rank).calls for rank in range(3)] == [2, 2, 2], "none was computed at the base"
        assert [manager.counters.rank(rank).reused_calls for rank in range(3)] == [1, 1, 0]
        went_well(manager)


GROUP, DIM, VDIM = 2, 3, 4
ranges = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted)


@settings(deadline=None)
@given(data=st.data())
def test_gradients_are_summed_position_by_position(data: st.DataObject) -> None:
    """Tiles of any runs of heads and ranges of keys, against one number for each lane and position."""
    total = GradientTotal(GROUP, DIM, VDIM)
    queries: dict[tuple[int, int, int], Tensor] = {}
    keys: dict[tuple[int, int, int], Tensor] = defaultdict(lambda: torch.zeros(DIM + VDIM, dtype=torch.float64))
    for number in range(data.draw(st.integers(1, 6))):
        row, first = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3))
        last, (start, stop), length = (
            data.draw(st.integers(first + 1, 4)),
            data.draw(ranges),
            data.draw(st.integers(0, 3)),
        )
        tile = Tile(row, first, last, 9 * number, 9 * number + length, start, stop)
        shapes = (
            ((last - first) * GROUP, length, DIM),
            (last - first, stop - start, DIM),
            (last - first, stop - start, VDIM),
        )
        dq, dk, dv = (torch.randn(1, *shape, dtype=torch.float64) for shape in shapes)
        for head in range(first, last):
            at = head - first
            for query in range(length):
                queries[row, head, 9 * number + query] = dq[0, at * GROUP : (at + 1) * GROUP, query].clone()
            for position in range(start, stop):
                keys[row, head, position] += torch.cat([dk[0, at, position - start], dv[0, at, position - start]])
        table = [[*tile, start, stop]]
        if data.draw(st.booleans()):
            total.add_own(table, ([dq], [dk], [dv]))
        else:
            total.add_part(table, [dq.flatten(), dk.flatten(), dv.flatten()])
    table, results = total.result()
    dq, dk, dv = (torch.cat([torch.zeros(0, dtype=torch.float64), *(x.flatten() for x in some)]) for some in results)
    seen = set()
    for tile, dq_at, dk_at, dv_at in gradient_layout(table, GROUP, DIM, VDIM):
        heads, count = tile.head_stop - tile.head_start, tile.k_stop - tile.k_start
        rows = dq[dq_at].view(heads, GROUP, tile.q_stop - tile.q_start, DIM)
        both = torch.cat([dk[dk_at].view(heads, count, DIM), dv[dv_at].view(heads, count, VDIM)], -1)
        for head in range(heads):
            for query in range(tile.q_stop - tile.q_start):
                assert torch.equal(
                    rows[head, :, query], queries.pop((tile.row, tile.head_start + head, tile.q_start + query))
                )
            for position in range(count):
                place = tile.row, tile.head_start + head, tile.k_start + position
                assert place not in seen, f"{place} comes twice"
                seen.add(place)
                worst = (both[head, position] - keys[place]).abs().max().item()
                assert worst < 1e-12, f"{place}: largest difference {worst:.2e}"
    assert not queries
    assert seen >= set(keys)


prefixes = st.builds(
    lambda row, first, heads, start, length: Tile(row, first, first + heads, start, start + length, 0, start + length),
    st.integers(0, 1), st.integers(0, 2), st.integers(1, 3), st.integers(0, 5), st.integers(1, 5),
)  # fmt: skip


@given(st.lists(st.lists(prefixes, min_size=1, max_size=3), min_size=1, max_size=4))
def test_what_gradients_weigh(shares: list[list[Tile]]) -> None:
    """Each rank's as it would send them alone, and all together with each key once."""

    class Rank:
        apart = False

    team = [Asked(Rank(), [Request(tile, 0, tile.k_stop) for tile in share]) for share in shares]  # type: ignore[arg-type]
    sizes, whole = gradients(100, 7)(team)
    keys = [
        {(t.row, head, at) for t in share for head in range(t.head_start, t.head_stop) for at in range(t.k_stop)}
        for share in shares
    ]
    rows = [sum((t.head_stop - t.head_start) * (t.q_stop - t.q_start) for t in share) for share in shares]
    assert sizes == tuple(100 * row + 7 * len(held) for row, held in zip(rows, keys, strict=True))
    assert whole == 100 * sum(rows) + 7 * len(set().union(*keys))
