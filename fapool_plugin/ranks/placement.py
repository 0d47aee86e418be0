"""Which ranks of a launch become pool ranks, and who the base ranks are then: a pure function of ranks and nodes.

Knows numbers only; no environment, no process, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fapool_plugin.config import FAPoolConfigError


@dataclass(frozen=True)
class Placement:
    """A launch's ranks, told apart."""

    base: tuple[int, ...]
    """Launch ranks of the base ranks; the position is the rank that each has among them. Rank 0 comes first."""
    pool: tuple[int, ...]
    """Launch ranks of the pool ranks; the position is the number that each has in the pool."""
    nodes: tuple[int, ...]
    """The node of every launch rank."""

    def base_on(self, node: int) -> list[int]:
        """Launch ranks of the base ranks on a node."""
        return [rank for rank in self.base if self.nodes[rank] == node]

    def pool_on(self, node: int) -> list[int]:
        """Launch ranks of the pool ranks on a node."""
        return [rank for rank in self.pool if self.nodes[rank] == node]


def place(nodes: Sequence[int], pool_ranks: int, how: Literal["last", "per_node"]) -> Placement:
    """Tells base and pool ranks apart.

    Args:
        nodes: the node of every launch rank.
        pool_ranks: pool ranks in all.
        how: "last": the last of all ranks; "per_node": the last of each node, nodes alike or the later ones one more.

    Raises:
        FAPoolConfigError: no base rank would be left, on rank 0's node either, or a node has too few ranks.
    """
    world = len(nodes)
    if not 0 < pool_ranks < world:
        remedy = f"set pool_ranks to {world - 1} or less" if world > 1 else 'set "pool": "local"'
        raise FAPoolConfigError(
            f"pool_ranks is {pool_ranks}, and the launch has {world} rank{'s' * (world != 1)}: at least one must be a "
            f"base rank and one a pool rank; start {pool_ranks + 1} or more ranks, or {remedy}"
        )
    pool = tuple(range(world - pool_ranks, world)) if how == "last" else _last_of_each_node(nodes, pool_ranks)
    return Placement(tuple(rank for rank in range(world) if rank not in pool), pool, tuple(nodes))


def _last_of_each_node(nodes: Sequence[int], pool_ranks: int) -> tuple[int, ...]:
    members = [[rank for rank, at in enumerate(nodes) if at == node] for node in dict.fromkeys(nodes)]
    each, more = divmod(pool_ranks, len(members))
    pool: list[int] = []
    for index, ranks in enumerate(members):
        taken = each + (index >= len(members) - more)
        if taken > len(ranks) - (0 in ranks):
            raise FAPoolConfigError(
                f'pool_placement is "per_node" and pool_ranks {pool_ranks} on {len(members)} nodes: {taken} of node '
                f"{index} would be pool ranks, but it has {len(ranks)} rank{'s' * (len(ranks) != 1)}"
                f"{', rank 0 among them, which is a base rank' if 0 in ranks else ''}; set pool_ranks lower, or "
                'pool_placement to "last"'
            )
        pool += ranks[len(ranks) - taken :]
    return tuple(pool)
