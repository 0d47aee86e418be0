"""Trees and routes: everyone's result reaches the base once, every key leaves it once, and costs are what they say."""

from __future__ import annotations

import heapq
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.profile import Fit, LinkCost
from fapool_plugin.plan.shares import layout
from fapool_plugin.plan.trees import (
    Parents,
    arrangements,
    choose_reduction,
    reduction_s,
)

nodes_of = st.lists(st.integers(0, 3), max_size=40)


def link(a: float, b: float) -> LinkCost:
    return LinkCost(to_rank=Fit(a=a, b=b), to_base=Fit(a=a, b=b))


def path(parents: Parents, rank: int) -> list[int]:
    """The ranks that a result passes on its way to the base."""
    passed = [rank]
    while (above := parents[passed[-1]]) is not None:
        passed.append(above)
        assert len(passed) <= len(parents), f"{parents}: rank {rank}'s result never arrives"
    return passed


@given(nodes_of, st.integers(1, 5))
def test_every_result_reaches_the_base_once(nodes: list[int], fan_in: int) -> None:
    for name, parents in arrangements(len(nodes), fan_in, nodes).items():
        assert len(parents) == len(nodes), name
        for rank in range(len(nodes)):
            way = path(parents, rank)
            assert all(above < below for below, above in pairwise(way)), f"{name}: waiting would go in circles"


@given(st.integers(1, 200), st.integers(1, 6))
def test_a_tree_has_one_root_keeps_its_fan_in_and_is_as_flat_as_it_can_be(ranks: int, fan_in: int) -> None:
    parents = arrangements(ranks, fan_in, [0] * ranks)["tree"]
    assert [rank for rank, above in enumerate(parents) if above is None] == [0]
    assert max(Counter(parents).values()) <= fan_in
    levels, room = 1, 1
    while room < ranks:
        room += fan_in**levels
        levels += 1
    assert max(len(path(parents, rank)) for rank in range(ranks)) == levels


@given(nodes_of)
def test_two_levels_meet_at_each_nodes_first_rank(nodes: list[int]) -> None:
    parents = arrangements(len(nodes), 2, nodes)["two_level"]
    for rank, node in enumerate(nodes):
        first = nodes.index(node)
        assert parents[rank] == (None if rank == first else first)


def test_what_is_no_arrangement_is_refused() -> None:
    with pytest.raises(ValueError, match="fan_in of 1"):
        arrangements(2, 0, [0, 0])
    with pytest.raises(ValueError, match="1 nodes are given for 2 ranks"):
        arrangements(2, 2, [0])


def simulated(parents: Parents, a: Fraction, b: Fraction, sizes: list[int], whole: int) -> Fraction:
    """The same by events: a message is ready, its receiver is busy with one at a time."""
    waiting = Counter(parents)
    merged, busy = list(sizes), dict.fromkeys([None, *range(len(parents))], Fraction(0))
    ready = [(Fraction(0), size, rank) for rank, size in enumerate(sizes) if not waiting[rank]]
    heapq.heapify(ready)
    while ready:
        at, size, rank = heapq.heappop(ready)
        to = parents[rank]
        busy[to] = max(busy[to], at) + a + b * size
        waiting[to] -= 1
        if to is not None:
            merged[to] += size
            if not waiting[to]:
                heapq.heappush(ready, (busy[to], min(whole, merged[to]), to))
    return busy[None]


@given(st.data())
def test_the_cost_of_a_reduction_is_that_of_playing_it(data: st.DataObject) -> None:
    nodes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=len(nodes), max_size=len(nodes)))
    whole = data.draw(st.integers(max(sizes), sum(sizes)))
    for name, parents in arrangements(len(nodes), data.draw(st.integers(1, 4)), nodes).items():
        got = reduction_s(parents, link(3.0, 0.25), sizes, whole)
        want = float(simulated(parents, Fraction(3), Fraction(1, 4), sizes, whole))
        assert got == pytest.approx(want), f"{name}: {got - want:.2e} off"


def test_direct_results_cost_the_base_and_trees_cost_hops() -> None:
    def seconds(ranks: int, sizes: int, whole: int) -> dict[str, float]:
        _, costs = choose_reduction("auto", link(1.0, 0.0), (sizes,) * ranks, whole, 2, (0,) * ranks)
        return {str(way): cost for way, cost in costs.items()}

    assert seconds(7, 8, 8) == {"direct": 7, "tree": 5, "two_level": 7}
    assert choose_reduction("auto", link(1.0, 0.0), (8,) * 7, 8, 2, (0,) * 7)[0] == "tree"
    two = choose_reduction("auto", link(1.0, 0.0), (8,) * 2, 8, 2, (0,) * 2)
    assert two[0] == "direct", "a tree of two is not faster"
    # Lanes that are not shared travel one by one: all of them, and several times.
    assert choose_reduction("auto", link(0.0, 1.0), (8,) * 4, 32, 2, (0,) * 4)[0] == "direct"
    nine = choose_reduction("auto", link(1.0, 0.0), (8,) * 9, 8, 8, (0, 0, 0, 1, 1, 1, 2, 2, 2))
    assert nine == ("two_level", {"direct": 9, "tree": 9, "two_level": 5})


def test_without_costs_or_when_told_nothing_is_compared() -> None:
    assert choose_reduction("auto", None, (8,) * 7, 8, 2, (0,) * 7) == ("direct", {})
    assert choose_reduction("tree", link(0.0, 1.0), (8,) * 4, 32, 2, (0,) * 4)[0] == "tree"


def test_flat_results_lie_tile_behind_tile() -> None:
    tiles = [Tile(0, 1, 0, 2, 5, 8, 0, 9), Tile(1, 2, 2, 3, 0, 4, 0, 4)]
    (first, outs, lses), (second, more_outs, more_lses) = layout(tiles, 3, 5)
    assert (first, second) == tuple(tiles)
    assert (outs, lses) == (slice(0, 90), slice(0, 18))
    assert (more_outs, more_lses) == (slice(90, 150), slice(18, 30))
