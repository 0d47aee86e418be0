"""One line, cut into shares: who computes which rectangle of a call's causal attention.

All work of a call is laid end to end on one line, lane after lane (a lane is one sequence x one KV head),
and inside a lane along its queries or its keys. Work is measured in (query, key) pairs that the mask allows,
so a lane is cut at equal area and not at equal length. Every rank takes one contiguous share, as long
as that rank is fast.

This module does not know tensors, links, which rank is the base, or what a pair costs in seconds: speeds are
relative.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import floor, isfinite, sqrt
from typing import Literal, NamedTuple, get_args

Axis = Literal["queries", "keys"]
Mode = Literal["line", "query_blocks"]

GRANULE = 64
"""Positions: the row block of the flash kernels, of which blocks in flight are multiples, and cuts in long prompts."""
_SLIVER = 1e-9
"""Of a lane's work: less is rounding, and a cut there falls on the lane's end."""


class Tile(NamedTuple):
    """One rectangle of the attention matrix, for a run of lanes of one sequence that share the same ranges.

    All ranges are half-open. Positions are lane-relative: 0 is the sequence's first unpadded token.
    """

    row: int  # sequence index in the batch
    head_start: int  # KV heads [head_start, head_stop): the lanes
    head_stop: int
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


Share = tuple[Tile, ...]


@dataclass(frozen=True)
class Row:
    """One sequence's geometry in this call: new queries at positions [q_start, q_stop), keys at [0, keys)."""

    q_start: int
    q_stop: int
    keys: int

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one lane: query i sees i + 1 keys."""
        return (self.q_stop * (self.q_stop + 1) - self.q_start * (self.q_start + 1)) // 2


class Piece(NamedTuple):
    """The part [start, stop) of the work of each lane of a run of heads of one sequence."""

    row: int
    head_start: int
    head_stop: int
    start: float
    stop: float

    @property
    def lanes(self) -> int:
        """How many."""
        return self.head_stop - self.head_start


_Cut = tuple[int, int, float]
"""A point on the line: row, head, and the part of that lane's work before it."""


def round_up(length: int, block: int) -> int:
    """The smallest multiple of ``block`` that is at least ``length``."""
    return -(-length // block) * block


def allowed_pairs(tile: Tile) -> int:
    """Number of (query, key) pairs of ``tile`` that the mask allows, summed over its lanes.

    The query at position i sees the keys up to i. The counts of the queries are a clamped arithmetic series, so the
    cost does not depend on the tile's size.

    Queries 2..4 against keys 0..3: queries 2, 3 and 4 see 3, 4 and 4 of them.

    >>> allowed_pairs(Tile(0, 0, 1, 2, 5, 0, 4))
    11
    """
    queries, width = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
    if queries <= 0 or width <= 0:
        return 0

    def below(edge: int) -> int:
        """Pairs of a query that sees no key, one that sees one, and so on, up to ``edge`` without it."""
        rising = min(max(edge, 0), width)
        return rising * (rising - 1) // 2 + max(edge - width, 0) * width

    first = tile.q_start - tile.k_start + 1
    return (below(first + queries) - below(first)) * (tile.head_stop - tile.head_start)


def line_pieces(works: Sequence[float], kv_heads: int, speeds: Sequence[float]) -> list[list[Piece]]:
    """The line of ``kv_heads`` lanes a row, each of the row's work, cut into one run of pieces for each speed: the rest
    of a lane that was begun, whole lanes, and the beginning of one. A cut on the end of a lane leaves no sliver."""
    starts = [0, *accumulate(work * kv_heads for work in works)]
    ends = list(accumulate(map(float, speeds)))

    def cut(end: float) -> _Cut:
        at = end / ends[-1] * starts[-1]
        row = bisect_right(starts, at) - 1
        if row == len(works):
            return row, 0, 0.0
        lanes = (at - starts[row]) / works[row]
        head = floor(lanes + _SLIVER)
        part = lanes - head
        return (row, head, part if part > _SLIVER else 0.0) if head < kv_heads else (row + 1, 0, 0.0)

    cuts = [cut(0.0), *map(cut, ends)]
    return [_between(begin, end, works, kv_heads) for begin, end in pairwise(cuts)]


def _between(begin: _Cut, end: _Cut, works: Sequence[float], kv_heads: int) -> list[Piece]:
    """The pieces from one cut to another: at most the rest of a lane, the other heads of its row, whole rows, the first
    heads of the last row, the beginning of a lane."""
    (row, head, part), (last_row, last_head, last_part) = begin, end
    pieces = []
    if part and (row, head) < (last_row, last_head):
        pieces.append(Piece(row, head, head + 1, part, 1.0))
        head, part = head + 1, 0.0
    while row < last_row:
        if head < kv_heads and works[row]:
            pieces.append(Piece(row, head, kv_heads, 0.0, 1.0))
        row, head = row + 1, 0
    if head < last_head:
        pieces.append(Piece(row, head, last_head, 0.0, 1.0))
    if part < last_part:
        pieces.append(Piece(row, last_head, last_head + 1, part, last_part))
    return pieces


def partition(
    rows: Sequence[Row],
    kv_heads: int,
    speeds: Sequence[float],
    *,
    axis: Axis = "queries",
    mode: Mode = "line",
    block: int = 64,
    whole: Sequence[Row] | None = None,
) -> list[Share]:
    """Cut all attention work of one causal call into one share for each entry of `speeds`.

    Every allowed (row, head, query, key) lies in exactly one tile; a tile may also hold pairs that the mask
    forbids.

    rows: the batch's sequences, lengths in tokens; a row without queries or keys gets no tile.
    kv_heads: KV heads K, so lanes per row.
    speeds: relative, >= 0 and not all 0; a rank of speed 0 gets an empty share.
    axis: "queries" cuts a lane along its queries and trims each tile's keys to what they see (prefill);
        "keys" gives each tile all of the lane's queries and cuts along the keys that they see (decode).
    mode: "line" cuts the whole line at the cumulative fractions of `speeds`, so whole heads come first.
        "query_blocks" cuts every lane at those fractions, with K and V replicated and O = concat(O_i).
    block: a cut inside a lane falls on the multiple of this many positions, from the start of the lane's cut
        range, whose work is nearest to the ideal.
    whole: the rows of the whole prompt that `rows` is a run of positions of. Then the line is laid out for the
        prompt, and every run cuts a lane at the same fractions: a rank works on the same lanes in all of them, and
        is sent no keys of others. None: `rows` is all there is.

    Raises ValueError for input that describes no call.

    Three heads of a prompt of 4 tokens on two equal ranks: a head has 1 + 2 + 3 + 4 = 10 pairs, the
    line 30, and the ideal cut is at 15, five pairs into head 1. Its first 3 queries have 6 pairs, its first 2
    have 3, so the cut falls after 3 (near 4 * sqrt(1/2) = 2.83), and the shares have 16 and 14 pairs.

    >>> first, second = partition([Row(0, 4, 4)], 3, [1.0, 1.0], block=1)
    >>> [tuple(tile) for tile in first]
    [(0, 0, 1, 0, 4, 0, 4), (0, 1, 2, 0, 3, 0, 3)]
    >>> [tuple(tile) for tile in second]
    [(0, 1, 2, 3, 4, 0, 4), (0, 2, 3, 0, 4, 0, 4)]
    """
    _check(rows, kv_heads, speeds, axis, mode, block)
    if whole is not None and len(whole) != len(rows):
        raise ValueError(f"whole has {len(whole)} rows, the call {len(rows)}; give the prompt's own rows")
    for index, (row, prompt) in enumerate(zip(rows, whole or rows, strict=True)):
        if row.pairs and not prompt.pairs:
            raise ValueError(f"row {index} has queries here and none in whole; give the prompt that it is a run of")
    if mode == "query_blocks":
        ends = list(accumulate(map(float, speeds), initial=0.0))
        cuts = list(pairwise(end / ends[-1] for end in ends))
        pieces = [[Piece(row, 0, kv_heads, *cut) for row in range(len(rows)) if cut[0] < cut[1]] for cut in cuts]
    else:
        pieces = line_pieces([row.pairs for row in whole or rows], kv_heads, speeds)
    return [
        _joined([tile for piece in mine for tile in _tiles(piece, rows[piece.row], axis, block)]) for mine in pieces
    ]


def _tiles(piece: Piece, row: Row, axis: Axis, block: int) -> list[Tile]:
    """The tile of a piece, cut at positions; none if nothing is left of it."""
    if row.q_start == row.q_stop:
        return []
    start, stop = (position(row, part, axis, block) for part in (piece.start, piece.stop))
    if start == stop:
        return []
    if axis == "keys":
        return [Tile(*piece[:3], row.q_start, row.q_stop, start, stop)]
    return [Tile(*piece[:3], row.q_start + start, row.q_start + stop, 0, row.q_start + stop)]


def position(row: Row, part: float, axis: Axis, block: int) -> int:
    """How many of a lane's positions along ``axis`` have the first ``part`` of its work: the multiple of ``block``, or
    the lane's end, whose work is nearest.

    Nearest in work, not in positions: a cut is then off by at most half a block's pairs, and a share by one block's.
    """
    before, queries = row.q_start, row.q_stop - row.q_start
    extent = queries if axis == "queries" else row.q_stop
    if part in (0.0, 1.0):
        return extent if part else 0
    target, seen_by_all = part * row.pairs, queries * (before + 1)
    if axis == "queries":
        ideal = (sqrt((2 * before + 1) ** 2 + 8 * target) - (2 * before + 1)) / 2
    elif target <= seen_by_all:
        ideal = target / queries
    else:
        rest = (2 * queries - 1) ** 2 - 8 * (target - seen_by_all)
        ideal = before + 1 + (2 * queries - 1 - sqrt(max(0.0, rest))) / 2

    def work(first: int) -> int:
        if axis == "queries":
            return first * before + first * (first + 1) // 2
        # Each key after the first query's is seen by one query less than the key before it.
        late = max(0, first - before - 1)
        return queries * first - late * (late + 1) // 2

    low = min(int(ideal) // block * block, extent)
    high = min(low + block, extent)
    return low if 2 * target <= work(low) + work(high) + _SLIVER * row.pairs else high


def _joined(tiles: list[Tile]) -> Share:
    """The same tiles; neighbouring heads whose cuts came out alike are one."""
    joined: list[Tile] = []
    for tile in tiles:
        last = joined[-1] if joined else None
        if last and last.row == tile.row and last.head_stop == tile.head_start and last[3:] == tile[3:]:
            joined[-1] = last._replace(head_stop=tile.head_stop)
        else:
            joined.append(tile)
    return tuple(joined)


def _check(rows: Sequence[Row], kv_heads: int, speeds: Sequence[float], axis: Axis, mode: Mode, block: int) -> None:
    """Refuse input that describes no call, with the numbers and the remedy."""
    if axis not in get_args(Axis):
        raise ValueError(f"axis is {axis!r}; give one of {get_args(Axis)}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; give one of {get_args(Mode)}")
    if kv_heads < 1:
        raise ValueError(f"kv_heads is {kv_heads}; a call has at least 1 KV head")
    if block < 1:
        raise ValueError(f"block is {block} positions; give at least 1")
    if not all(isfinite(speed) and speed >= 0 for speed in speeds) or not any(speeds):
        raise ValueError(f"speeds are {list(speeds)}; give each rank a finite number >= 0, and at least one above 0")
    for index, row in enumerate(rows):
        if not 0 <= row.q_start <= row.q_stop <= row.keys:
            raise ValueError(
                f"row {index} has queries [{row.q_start}, {row.q_stop}) and {row.keys} keys; give 0 <= q_start <= "
                f"q_stop, and the new tokens' keys, too (keys >= q_stop)"
            )
