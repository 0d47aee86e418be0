"""Who becomes a pool rank, for every layout of nodes, against a plain statement of the rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.config import FAPoolConfigError
from fapool_plugin.ranks.placement import place

LAYOUTS = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def nodes_of(sizes: list[int]) -> list[int]:
    return [node for node, size in enumerate(sizes) for _ in range(size)]


@settings(max_examples=300, deadline=None)
@given(LAYOUTS, st.integers(1, 12), st.sampled_from(["last", "per_node"]))
def test_every_rank_is_one_of_both_and_rank_0_is_base(sizes, pool_ranks, how) -> None:
    nodes = nodes_of(sizes)
    each, more = divmod(pool_ranks, len(sizes))
    takes = [each + (node >= len(sizes) - more) for node in range(len(sizes))]
    crowded = takes[0] >= sizes[0] or any(take > size for take, size in zip(takes, sizes, strict=True))
    if pool_ranks >= len(nodes) or (how == "per_node" and crowded):
        with pytest.raises(FAPoolConfigError, match=f"{pool_ranks}.* set .?pool"):
            place(nodes, pool_ranks, how)
        return
    placement = place(nodes, pool_ranks, how)
    assert sorted(placement.base + placement.pool) == list(range(len(nodes)))
    assert placement.base[0] == 0
    assert len(placement.pool) == pool_ranks
    assert list(placement.base) == sorted(placement.base), "base ranks keep their order"
    if how == "last":
        assert placement.base == tuple(range(len(nodes) - pool_ranks))
        return
    given = [len(placement.pool_on(node)) for node in range(len(sizes))]
    assert max(given) - min(given) <= 1, given
    for node in range(len(sizes)):
        here = placement.base_on(node) + placement.pool_on(node)
        assert here == sorted(here), f"node {node}: pool ranks come last, {here}"


@pytest.mark.parametrize(("world", "pool_ranks"), [(1, 1), (2, 2), (3, 8)])
def test_no_base_rank_is_refused_with_the_numbers(world: int, pool_ranks: int) -> None:
    with pytest.raises(FAPoolConfigError, match=f"pool_ranks is {pool_ranks}, and the launch has {world} rank"):
        place([0] * world, pool_ranks, "last")


def test_a_node_with_too_few_ranks_is_named() -> None:
    with pytest.raises(FAPoolConfigError, match="2 of node 1 would be pool ranks, but it has 1 rank;"):
        place(nodes_of([3, 1, 3]), 6, "per_node")
    with pytest.raises(FAPoolConfigError, match="node 0 would be pool ranks, but it has 1 rank, rank 0 among them"):
        place(nodes_of([1, 3]), 2, "per_node")
