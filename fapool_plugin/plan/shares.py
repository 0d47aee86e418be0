"""A plan: who computes which tiles of a call. Pure functions of lengths, speeds and what is resident.

Knows neither tensors nor links, nor what a plan takes: shares follow given speeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from fapool_plugin.plan.line import GRANULE, Row, Share, Tile, paired, partition, round_up

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

    @cached_property
    def rows(self) -> list[Row]:
        """All rows in lane-relative positions, neighbours together that are alike."""
        starts, stops = np.array(self.starts, dtype=np.int64), np.array(self.stops, dtype=np.int64)
        keys = np.maximum(0, stops - starts)
        first = np.clip(self.q_column - starts, 0, keys)
        changes = np.flatnonzero((np.diff(starts) != 0) | (np.diff(keys) != 0) | (np.diff(first) != 0)) + 1
        edges = [0, *changes.tolist(), len(starts)]
        return [
            Row(int(first[at]), int(keys[at]), int(keys[at]), end - at, int(starts[at]))
            for at, end in pairwise(edges)
            if end > at
        ]

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence after this call."""
        return max((row.keys for row in self.rows), default=0)

    def q_slice(self, tile: Tile) -> slice:
        """A tile's queries in the call's query tensor."""
        shift = self.starts[tile.row_start] - self.q_column
        return slice(tile.q_start + shift, tile.q_stop + shift)

    def k_slice(self, tile: Tile, start: int, stop: int) -> slice:
        """Key positions of a tile's lanes as columns."""
        return slice(self.starts[tile.row_start] + start, self.starts[tile.row_start] + stop)


@dataclass(frozen=True)
class Plan:
    """Shares of a call, one per pool rank, and the base's."""

    shares: tuple[Share, ...]
    base: Share
    axis: Literal["queries", "keys"]
    ranks: tuple[Any, ...] = ()
    """Whose the shares are, in their order; what names a rank is the caller's to say."""
    worked_out: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What the caller has derived from it, to be found again at the next layer."""

    def positions_held(self, rank: int, capacity: int, block: int) -> int:
        """Positions of all lanes together that pool rank ``rank`` must have room for: in each lane ``capacity``, or
        whole blocks for the keys of its tiles if those are more."""
        return sum(tile.lanes * max(capacity, round_up(tile.k_stop, block)) for tile in self.shares[rank])


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


def cut_positions(rows: Sequence[Row], blocks: int) -> np.ndarray[Any, Any]:
    """Where each row's queries of each block in flight begin, and after the last where they end: (edges, rows). Rows
    end at the same column, and a row's first columns are padding if it is not the longest."""
    columns = new_columns(rows)
    edges = np.array([0, *(stop for _, stop in block_edges(0, columns, blocks, GRANULE))])
    bounds = np.array([(row.q_start, row.q_stop) for row in rows])
    return np.maximum(bounds[:, 0], bounds[:, 1] - columns + edges[:, None])


def _fits(prompt: Sequence[Row] | None, rows: Sequence[Row]) -> bool:
    """Whether these are rows of that prompt."""
    if prompt is None or sum(row.alike for row in prompt) != sum(row.alike for row in rows):
        return False
    return all(before.q_stop > before.q_start for row, before in zip(*paired(rows, prompt), strict=True) if row.keys)


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


def lane_runs(tiles: Iterable[Tile], kv_heads: int) -> list[tuple[int, int]]:
    """The lanes of tiles in the line's order, numbered row by row, as runs [start, stop)."""
    runs: list[tuple[int, int]] = []
    for tile in tiles:
        whole = tile.head_stop - tile.head_start == kv_heads
        rows = [(tile.row_start, tile.row_stop)] if whole else pairwise(range(tile.row_start, tile.row_stop + 1))
        for first, last in rows:
            start, stop = first * kv_heads + tile.head_start, (last - 1) * kv_heads + tile.head_stop
            if runs and runs[-1][1] == start:
                runs[-1] = runs[-1][0], stop
            else:
                runs.append((start, stop))
    return runs


class TileWithKeys(NamedTuple):
    """A tile for a pool rank, and the new keys [key_start, key_stop) that go with it; key_start is the residency
    it assumes."""

    tile: Tile
    key_start: int
    key_stop: int
    capacity: int = 0
    """Positions that a lane of it will have at most, if known; 0 if not."""


def within_residency(
    share: Iterable[tuple[Tile, int]], axis: Literal["queries", "keys"], block: int, capacity: int = 0
) -> tuple[list[TileWithKeys], list[Tile]]:
    """What a pool rank is asked to compute of its share, and what the base keeps.

    Along the queries every missing key is sent. Along the keys a rank works on what it holds: missing keys are sent
    only in whole blocks, so a decode step normally sends none, and what lies beyond is left to the base.

    Args:
        share: each tile with the prefix that the rank holds of its lanes.
        capacity: positions that a lane will have at most; 0 if that is not known.
    """
    requests, left = [], []
    for tile, have in share:
        if axis == "queries":
            requests.append(TileWithKeys(tile, min(have, tile.k_stop), tile.k_stop, capacity))
            continue
        missing = max(0, tile.k_stop - have)
        reach = have + missing // block * block if missing else have
        stop = min(tile.k_stop, reach)
        if stop > tile.k_start:
            start = min(have, stop)
            requests.append(TileWithKeys(tile._replace(k_stop=stop), start, max(start, stop), capacity))
        if stop < tile.k_stop:
            left.append(tile._replace(k_start=max(stop, tile.k_start)))
    return requests, left


def layout(tiles: Iterable[Tile], group: int, head_dim: int) -> Iterator[tuple[Tile, slice, slice]]:
    """Where each tile's out (rows, queries, heads, E) and lse (rows, heads, queries) lie in flat results, tile behind
    tile.

    Args:
        tiles: in the order in which their results were written.
        group: query heads per KV head.
        head_dim: E, of outputs.
    """
    out_at = lse_at = 0
    for tile in tiles:
        size = (tile.q_stop - tile.q_start) * tile.lanes * group
        yield tile, slice(out_at, out_at + size * head_dim), slice(lse_at, lse_at + size)
        out_at, lse_at = out_at + size * head_dim, lse_at + size


def gradient_layout(
    tiles: Iterable[Tile], group: int, head_dim: int, v_head_dim: int
) -> Iterator[tuple[Tile, slice, slice, slice]]:
    """Where each tile's dq (rows, query heads, queries, D), dk (rows, heads, keys, D) and dv (rows, heads, keys, E) lie
    in flat gradients, tile behind tile.

    Args:
        tiles: in the order in which their gradients were written.
        group: query heads per KV head.
        head_dim: D, of queries and keys.
        v_head_dim: E, of values.
    """
    q_at = k_at = v_at = 0
    for tile in tiles:
        keys = tile.lanes * (tile.k_stop - tile.k_start)
        q_stop = q_at + tile.lanes * group * (tile.q_stop - tile.q_start) * head_dim
        k_stop, v_stop = k_at + keys * head_dim, v_at + keys * v_head_dim
        yield tile, slice(q_at, q_stop), slice(k_at, k_stop), slice(v_at, v_stop)
        q_at, k_at, v_at = q_stop, k_stop, v_stop
