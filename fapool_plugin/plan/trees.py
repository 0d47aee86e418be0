"""How pool ranks work together on one call: who merges whose results, who passes keys on to whom, and what each way
costs.

Pure functions of numbers, bytes and a link's cost. It does not know tensors, links or leases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.profile import LinkCost

Reduction = Literal["direct", "tree", "two_level"]
Distribution = Literal["direct", "chain"]

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

    Receiving is serial: whoever merges takes one message after the other, those that are ready first. That is what
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


class Lanes(NamedTuple):
    """Keys [start, stop) of the KV heads [head_start, head_stop) of one sequence."""

    row: int
    head_start: int
    head_stop: int
    start: int
    stop: int

    @property
    def positions(self) -> int:
        """Of all lanes together."""
        return (self.head_stop - self.head_start) * (self.stop - self.start)


class Route(NamedTuple):
    """Keys that the same ranks need: the base sends them to the first, each passes them on to the next."""

    ranks: tuple[int, ...]
    lanes: tuple[Lanes, ...]

    @property
    def positions(self) -> int:
        """Of all lanes together."""
        return sum(lanes.positions for lanes in self.lanes)


def routes(needs: Sequence[Iterable[Lanes]]) -> list[Route]:
    """Routes by which every lane's keys leave the base once, whoever needs them.

    All ranks on a route get the same keys, from the first that one of them lacks to the last that one of them needs:
    whoever is a little ahead of what it needs now lacks less in the next block.

    Args:
        needs: for each rank the keys that it lacks.
    """
    lacking: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
    for rank, lanes in enumerate(needs):
        for row, head_start, head_stop, start, stop in lanes:
            for head in range(head_start, head_stop):
                known = lacking.setdefault((row, head), {}).get(rank, (start, stop))
                lacking[row, head][rank] = min(known[0], start), max(known[1], stop)
    found: dict[tuple[int, ...], list[Lanes]] = {}
    for (row, head), ranges in sorted(lacking.items()):
        begin, end = min(start for start, _ in ranges.values()), max(stop for _, stop in ranges.values())
        alike = found.setdefault(tuple(sorted(ranges)), [])
        if alike and alike[-1][:1] + alike[-1][2:] == (row, head, begin, end):
            alike[-1] = alike[-1]._replace(head_stop=head + 1)
        else:
            alike.append(Lanes(row, head, head + 1, begin, end))
    return [Route(ranks, tuple(lanes)) for ranks, lanes in sorted(found.items())]


def distribution_s(
    link: LinkCost,
    queries: Sequence[int],
    keys: Sequence[int],
    ways: Sequence[tuple[int, int]],
    blocks: int,
) -> dict[Distribution, float]:
    """Seconds of both ways to give ranks the keys they need with their queries.

    A block costs what the base is busy with sending. What the last rank waits longer than that is paid once for all
    blocks in flight, since hops of one block pass while others are computed.

    Args:
        link: measured costs of messages; those between ranks are taken to cost the same.
        queries: bytes of each rank's queries.
        keys: bytes of the keys that the base would send to each of them.
        ways: for each route (ranks on it, bytes of its keys).
        blocks: blocks in flight, at least 1.
    """
    there = link.to_rank.at
    direct = sum(there(asked + new) for asked, new in zip(queries, keys, strict=True))
    sent, last = 0.0, 0.0
    for ranks, size in ways:
        sent += there(size)
        last = max(last, sent + (ranks - 1) * there(size))
    busy = sent + sum(there(asked) for asked in queries)
    return {"direct": direct, "chain": busy + max(0.0, last - busy) / blocks}


def choose_distribution(
    wanted: Literal["auto", "direct", "chain"],
    link: LinkCost | None,
    queries: Sequence[int],
    keys: Sequence[int],
    ways: Sequence[tuple[int, int]],
    blocks: int,
) -> tuple[Distribution, dict[Distribution, float]]:
    """The way in which keys reach ranks, and seconds of both ways (none without a ``link`` cost).

    "auto" is the faster; "direct" without costs, and where no key goes to two ranks, which then is the same. The
    other arguments are :func:`distribution_s`'s.
    """
    seconds = distribution_s(link, queries, keys, ways, blocks) if link is not None else {}
    if all(ranks < 2 for ranks, _ in ways):
        return "direct", seconds
    if wanted != "auto":
        return wanted, seconds
    return min(seconds, key=lambda name: seconds[name], default="direct"), seconds


def layout(tiles: Iterable[Tile], group: int, head_dim: int) -> Iterator[tuple[Tile, slice, slice]]:
    """Where each tile's out (queries, heads, E) and lse (heads, queries) lie in flat results, tile behind tile.

    Args:
        tiles: in the order in which their results were written.
        group: query heads per KV head.
        head_dim: E, of outputs.
    """
    out_at = lse_at = 0
    for tile in tiles:
        size = (tile.q_stop - tile.q_start) * (tile.head_stop - tile.head_start) * group
        yield tile, slice(out_at, out_at + size * head_dim), slice(lse_at, lse_at + size)
        out_at, lse_at = out_at + size * head_dim, lse_at + size


def gradient_layout(
    entries: Iterable[Sequence[int]], group: int, head_dim: int, v_head_dim: int
) -> Iterator[tuple[Tile, slice, slice, slice]]:
    """Where each entry's dq (query heads, queries, D), dk (heads, keys, D) and dv (heads, keys, E) lie in flat
    gradients, entry behind entry. The tile's keys are those that there are dk and dv of.

    Args:
        entries: rows of a tile table: dq of the queries, dk and dv of the positions from ``key_start`` to
            ``key_stop``; either may be empty.
        group: query heads per KV head.
        head_dim: D, of queries and keys.
        v_head_dim: E, of values.
    """
    q_at = k_at = v_at = 0
    for row, head_start, head_stop, q_start, q_stop, _, _, key_start, key_stop in entries:
        heads, keys = head_stop - head_start, key_stop - key_start
        q_stop_at = q_at + heads * group * (q_stop - q_start) * head_dim
        k_stop_at, v_stop_at = k_at + heads * keys * head_dim, v_at + heads * keys * v_head_dim
        tile = Tile(row, head_start, head_stop, q_start, q_stop, key_start, key_stop)
        yield tile, slice(q_at, q_stop_at), slice(k_at, k_stop_at), slice(v_at, v_stop_at)
        q_at, k_at, v_at = q_stop_at, k_stop_at, v_stop_at
