"""A plan: who computes which tiles of a call. Pure functions of lengths, speeds and what is resident.

Knows neither tensors nor links, nor what a plan takes: shares follow given speeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from fapool_plugin.plan.line import GRANULE, Row, Share, Tile, partition

SHORTEST_BLOCK, MOST_BLOCKS = 64, 8
"""Of a prompt in flight: shorter blocks waste the kernels, more of them only cost memory and messages."""


@dataclass(frozen=True)
class Geometry:
    """Where the real tokens of a padded batch lie. Columns count padding, positions do not.

    ``starts[b]`` and ``stops[b]`` bound row b's real keys in columns; the call's queries are the columns
    [``q_column``, ``columns``).
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    q_column: int
    columns: int

    def block(self, start: int, stop: int) -> Geometry:
        """The run of columns [start, stop) of this call as a call of its own."""
        return Geometry(self.starts, tuple(min(end, stop) for end in self.stops), start, stop)

    def row(self, index: int) -> Row:
        """Row ``index`` in lane-relative positions."""
        start, stop = self.starts[index], self.stops[index]
        keys = max(0, stop - start)
        first = min(max(self.q_column, start), max(stop, start)) - start
        return Row(q_start=first, q_stop=keys, keys=keys)

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [self.row(index) for index in range(len(self.starts))]

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence after this call."""
        return max((stop - start for start, stop in zip(self.starts, self.stops, strict=True)), default=0)

    def q_slice(self, tile: Tile) -> slice:
        """A tile's queries in the call's query tensor."""
        shift = self.starts[tile.row] - self.q_column
        return slice(tile.q_start + shift, tile.q_stop + shift)

    def k_slice(self, row: int, start: int, stop: int) -> slice:
        """Lane-relative key positions as columns."""
        return slice(self.starts[row] + start, self.starts[row] + stop)


@dataclass(frozen=True)
class Plan:
    """Shares of a call, one per pool rank, and the base's."""

    shares: tuple[Share, ...]
    base: Share
    axis: Literal["queries", "keys"]
    ranks: tuple[Any, ...] = ()
    """Whose the shares are, in their order; what names a rank is the caller's matter."""

    def positions_held(self, rank: int, capacity: int, block: int) -> int:
        """Positions of all lanes together that pool rank ``rank`` must have room for: in each lane ``capacity``, or
        whole blocks for the keys of its tiles if those are more."""
        return sum(
            (tile.head_stop - tile.head_start) * max(capacity, -(-tile.k_stop // block) * block)
            for tile in self.shares[rank]
        )


def speeds(ranks: int, base_share: float | None) -> list[float]:
    """Parts of the line for ``ranks`` pool ranks and, last, the base, which takes ``base_share`` of the whole
    (None: as much as any other)."""
    if base_share is None or not ranks:
        return [1.0 / (ranks + 1)] * (ranks + 1)
    return [(1.0 - base_share) / ranks] * ranks + [base_share]


def make_plan(
    geometry: Geometry,
    kv_heads: int,
    relative_speeds: Sequence[float],
    *,
    mode: Literal["line", "query_blocks"] = "line",
    few_queries: int = 256,
    prompt: Sequence[Row] | None = None,
) -> Plan:
    """Cuts a causal call into shares, the base's last: on the line its keys then are those at a lane's end.

    Up to ``few_queries`` new queries against a past are cut along the keys (decode), others along the queries.
    ``prompt`` has the rows of the prompt that this call belongs to: its lengths decide who works on which lanes, so
    that every block of it, and every step after it, finds the keys where they are.
    """
    rows = geometry.rows
    queries = max((row.q_stop - row.q_start for row in rows), default=0)
    by_keys = any(row.q_start for row in rows) and queries <= few_queries
    extent = max((row.keys for row in rows), default=0) if by_keys else queries
    block = granule(extent, len(relative_speeds))
    axis: Literal["queries", "keys"] = "keys" if by_keys else "queries"
    whole = prompt if _fits(prompt, rows) else None
    shares = partition(rows, kv_heads, relative_speeds, axis=axis, mode=mode, block=block, whole=whole)
    return Plan(tuple(shares[:-1]), shares[-1], axis)


def granule(extent: int, ranks: int) -> int:
    """Multiples of how many positions cuts fall on, where so many positions are cut for ``ranks`` ranks, the base one
    of them."""
    return GRANULE if extent >= 4 * GRANULE * ranks else 1


def block_edges(start: int, stop: int, blocks: int, multiple: int) -> list[tuple[int, int]]:
    """Cuts the positions [start, stop) into at most ``blocks`` runs of nearly equal length, their edges at multiples
    of ``multiple`` from ``start``."""
    if stop <= start or blocks < 1 or multiple < 1:
        raise ValueError(f"positions [{start}, {stop}) cannot be cut into {blocks} blocks of multiples of {multiple}")
    units = -(-(stop - start) // multiple)
    count = min(blocks, units)
    edges = [min(stop, start + (index * units // count) * multiple) for index in range(count)] + [stop]
    return list(pairwise(edges))


def new_columns(rows: Sequence[Row]) -> int:
    """New tokens of the row that has most: what is cut into blocks."""
    return max(row.q_stop - row.q_start for row in rows)


def cut_rows(rows: Sequence[Row], blocks: int) -> list[list[Row]]:
    """The rows' queries of each block in flight, with the keys that they see. Rows end at the same column."""
    columns = new_columns(rows)
    edges = [0, *(stop for _, stop in block_edges(0, columns, blocks, GRANULE))]
    # A row's first columns are padding if it is not the longest.
    positions = [[max(row.q_start, row.q_stop - columns + edge) for row in rows] for edge in edges]
    return [[Row(*edge, edge[1]) for edge in zip(*ends, strict=True)] for ends in pairwise(positions)]


def _fits(prompt: Sequence[Row] | None, rows: Sequence[Row]) -> bool:
    """Whether these are rows of that prompt."""
    if prompt is None or len(prompt) != len(rows):
        return False
    return all(before.q_stop > before.q_start for before, row in zip(prompt, rows, strict=True) if row.keys)


def shortened(plan: Plan, part: float, block: int) -> Plan:
    """A plan along the keys in which pool ranks keep the first ``part`` of each tile's keys, to a multiple of
    ``block``; the base, which holds all keys, takes the rest."""
    if part >= 1:
        return plan
    shares, base = [], list(plan.base)
    for share in plan.shares:
        kept = []
        for tile in share:
            stop = tile.k_start + int((tile.k_stop - tile.k_start) * part) // block * block
            kept += [tile._replace(k_stop=stop)] if stop > tile.k_start else []
            base.append(tile._replace(k_start=stop))
        shares.append(tuple(kept))
    return replace(plan, shares=tuple(shares), base=tuple(base))


def in_batches(tiles: Iterable[Tile], geometry: Geometry) -> list[tuple[Tile, int]]:
    """The same tiles, those of neighbouring rows together that one kernel call can compute: the first of them, and
    how many rows. Padding must be alike, or positions would not be columns alike."""
    batches: list[tuple[Tile, int]] = []
    open_: dict[tuple[int, ...], int] = {}
    for tile in tiles:
        key = (*tile[1:], geometry.starts[tile.row])
        at = open_.get(key)
        if at is not None and batches[at][0].row + batches[at][1] == tile.row:
            batches[at] = batches[at][0], batches[at][1] + 1
        else:
            open_[key] = len(batches)
            batches.append((tile, 1))
    return batches


class TileWithKeys(NamedTuple):
    """A tile for a pool rank, and the new keys [key_start, key_stop) that go with it; key_start is the residency
    it assumes."""

    tile: Tile
    key_start: int
    key_stop: int


def within_residency(
    share: Share, held: Callable[[Tile], int], axis: Literal["queries", "keys"], block: int
) -> tuple[list[TileWithKeys], list[Tile]]:
    """What a pool rank is asked to compute of its share, and what the base keeps.

    Along the queries every missing key is sent. Along the keys a rank works on what it holds: missing keys are sent
    only in whole blocks, so a decode step normally sends none, and what lies beyond is left to the base.
    """
    requests, left = [], []
    for tile in share:
        have = held(tile)
        if axis == "queries":
            requests.append(TileWithKeys(tile, min(have, tile.k_stop), tile.k_stop))
            continue
        missing = max(0, tile.k_stop - have)
        reach = have + missing // block * block if missing else have
        stop = min(tile.k_stop, reach)
        if stop > tile.k_start:
            start = min(have, stop)
            requests.append(TileWithKeys(tile._replace(k_stop=stop), start, max(start, stop)))
        if stop < tile.k_stop:
            left.append(tile._replace(k_start=max(stop, tile.k_start)))
    return requests, left


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
    tiles: Iterable[Tile], group: int, head_dim: int, v_head_dim: int
) -> Iterator[tuple[Tile, slice, slice, slice]]:
    """Where each tile's dq (query heads, queries, D), dk (heads, keys, D) and dv (heads, keys, E) lie in flat
    gradients, tile behind tile.

    Args:
        tiles: in the order in which their gradients were written.
        group: query heads per KV head.
        head_dim: D, of queries and keys.
        v_head_dim: E, of values.
    """
    q_at = k_at = v_at = 0
    for tile in tiles:
        heads, keys = tile.head_stop - tile.head_start, tile.k_stop - tile.k_start
        q_stop = q_at + heads * group * (tile.q_stop - tile.q_start) * head_dim
        k_stop, v_stop = k_at + heads * keys * head_dim, v_at + heads * keys * v_head_dim
        yield tile, slice(q_at, q_stop), slice(k_at, k_stop), slice(v_at, v_stop)
        q_at, k_at, v_at = q_stop, k_stop, v_stop
