"""How pool ranks merge each other's results of one call on the way to the base, and what each way costs.

Pure functions of numbers, bytes and a link's cost. It does not know tensors, links or leases.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from fapool_plugin.plan.profile import LinkCost

Reduction = Literal["direct", "tree", "two_level"]

Parents = tuple[int | None, ...]
"""For each rank the rank that its results go to, always one before it; None: the base."""


def arrangements(ranks: int, fan_in: int, nodes: Sequence[int]) -> dict[Reduction, Parents]:
    """Every way in which results of ``ranks`` ranks may return to the base.

    - "direct": each to the base.
    - "tree": a complete tree in which each rank merges the results of up to ``fan_in`` others with its own; its root
      answers the base. With two it is the binary tree of MPI reductions (Thakur, Rabenseifner and Gropp 2005).
    - "two_level": within each node to its first rank, which answers the base.

    Args:
        ranks: how many, in the order in which they are numbered.
        fan_in: results that a rank of the tree receives at most, at least 1.
        nodes: for each rank the node it is on, by any number.

    Raises:
        ValueError: ``fan_in`` is below 1, or there is not one node for each rank.
    """
    if fan_in < 1 or len(nodes) != ranks:
        raise ValueError(
            f"fan_in is {fan_in} and {len(nodes)} nodes are given for {ranks} ranks; give a fan_in of 1 or more, and "
            "one node for each rank"
        )
    first = {node: rank for rank, node in reversed(list(enumerate(nodes)))}
    return {
        "direct": (None,) * ranks,
        "tree": tuple((rank - 1) // fan_in if rank else None for rank in range(ranks)),
        "two_level": tuple(None if first[node] == rank else first[node] for rank, node in enumerate(nodes)),
    }


def reduction_s(parents: Parents, link: LinkCost, sizes: Sequence[int], whole: int) -> float:
    """Seconds from the moment at which all ranks have their results to that at which the base has merged them.

    Receiving is serial: a rank that merges takes one message after the other, those that are ready first. That is what
    many direct results cost the base; what a tree costs is that ranks wait for each other. A link between ranks is
    taken to cost what the way to the base does, and merging to be part of it.

    Args:
        parents: who merges.
        link: measured costs of messages.
        sizes: bytes of each rank's own result.
        whole: bytes when all are merged into one: less than all sizes together where ranks share lanes.
    """
    below: dict[int | None, list[tuple[float, int]]] = {None: []}
    # Parents come before their children, so backwards everyone is complete when its turn comes.
    for rank in reversed(range(len(parents))):
        ready_s, merged = _received(below.pop(rank, []), link)
        below.setdefault(parents[rank], []).append((ready_s, min(whole, sizes[rank] + merged)))
    return _received(below[None], link)[0]


def _received(messages: Sequence[tuple[float, int]], link: LinkCost) -> tuple[float, int]:
    """(when the last of these (ready, bytes) is merged, bytes in all)."""
    now = 0.0
    for ready_s, size in sorted(messages):
        now = max(now, ready_s) + link.to_base.at(size)
    return now, sum(size for _, size in messages)


@lru_cache(maxsize=64)
def choose_reduction(
    wanted: Literal["auto", "direct", "tree", "two_level"],
    link: LinkCost | None,
    sizes: tuple[int, ...],
    whole: int,
    fan_in: int,
    nodes: tuple[int, ...],
) -> tuple[Reduction, dict[Reduction, float]]:
    """The way in which results return, and seconds of every way (none without a ``link`` cost).

    "auto" is the fastest, of equally fast ones the one with fewest messages between ranks; without costs "direct".
    The other arguments are :func:`arrangements`' and :func:`reduction_s`'s.
    """
    ways = arrangements(len(sizes), fan_in, nodes)
    seconds = {name: reduction_s(ways[name], link, sizes, whole) for name in ways} if link is not None else {}
    if wanted != "auto":
        return wanted, seconds
    return min(seconds, key=lambda name: seconds[name], default="direct"), seconds
