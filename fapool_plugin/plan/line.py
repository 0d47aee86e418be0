"""One line, cut into shares: who computes which rectangle of a call's causal attention.

All work of a call is laid end to end on one line, lane after lane (a lane is one sequence x one KV head),
and inside a lane along its queries or its keys. Work is measured in (query, key) pairs that the mask allows,
so a lane is cut at equal area and not at equal length. Every rank takes one contiguous share, as long
as that rank is fast.

This module does not know tensors, links, which rank is the base, or what a pair costs in seconds: speeds are
relative.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import floor, isfinite
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from fapool_plugin.plan.box import Box

Array = np.ndarray[Any, Any]
Axis = Literal["queries", "keys"]
Mode = Literal["line", "query_blocks"]

GRANULE = 64
"""Positions: the row block of the flash kernels, of which blocks in flight are multiples, and cuts in long prompts."""
_SLIVER = 1e-9
"""Of a lane's work: less is rounding, and a cut there falls on the lane's end."""
_FINE = 64
"""A lane with at most one part in so many of a mean share's work is not cut."""
FINEST_PART = 0.5 / _FINE
"""Of a mean share: so much a cut is off at most where it falls between lanes."""


class Tile(NamedTuple):
    """One rectangle of the attention matrix, for all lanes of neighbouring rows and heads that share its ranges.

    All ranges are half-open. Positions are lane-relative: 0 is the sequence's first unpadded token.
    """

    row_start: int  # sequences of the batch
    row_stop: int
    head_start: int  # KV heads
    head_stop: int
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int

    @property
    def box(self) -> Box:
        """Its lanes."""
        return Box(*self[:4])

    @property
    def lanes(self) -> int:
        """How many."""
        return (self.row_stop - self.row_start) * (self.head_stop - self.head_start)


Share = tuple[Tile, ...]


class Row(NamedTuple):
    """Neighbouring sequences with new queries at positions [q_start, q_stop) and keys at [0, keys).

    ``alike`` says how many; ``column`` where position 0 of each lies in padded tensors.
    """

    q_start: int
    q_stop: int
    keys: int
    alike: int = 1
    column: int = 0

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one lane: query i sees i + 1 keys."""
        return (self.q_stop * (self.q_stop + 1) - self.q_start * (self.q_start + 1)) // 2


class Piece(NamedTuple):
    """The part [start, stop) of the work of each lane of some heads of some sequences, which are alike."""

    run: int  # of alike sequences
    row_start: int  # in that run
    row_stop: int
    head_start: int
    head_stop: int
    start: float
    stop: float

    @property
    def lanes(self) -> int:
        """How many."""
        return (self.row_stop - self.row_start) * (self.head_stop - self.head_start)


class Runs(NamedTuple):
    """All lanes of the runs of alike sequences [start, stop)."""

    start: int
    stop: int


_Cut = tuple[int, int, float]
"""A point on the line: run of sequences, lane in it, and the part of that lane's work before it."""


def round_up(length: int, block: int) -> int:
    """The smallest multiple of ``block`` that is at least ``length``."""
    return -(-length // block) * block


def allowed_pairs(tile: Tile) -> int:
    """Number of (query, key) pairs of ``tile`` that the mask allows, summed over its lanes.

    The query at position i sees the keys up to i. The counts of the queries are a clamped arithmetic series, so the
    cost does not depend on the tile's size.

    Queries 2..4 against keys 0..3: queries 2, 3 and 4 see 3, 4 and 4 of them.

    >>> allowed_pairs(Tile(0, 1, 0, 1, 2, 5, 0, 4))
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
    return (below(first + queries) - below(first)) * tile.lanes


class Line:
    """All lanes' work laid end to end: ``kv_heads`` lanes a sequence, each of its row's work."""

    def __init__(self, rows: Sequence[Row], kv_heads: int) -> None:
        self.rows, self.kv_heads = rows, kv_heads
        self._works, self._lanes = [row.pairs for row in rows], [row.alike * kv_heads for row in rows]
        self._starts = [0, *accumulate(work * count for work, count in zip(self._works, self._lanes, strict=True))]

    @property
    def work(self) -> int:
        """(query, key) pairs of all lanes."""
        return self._starts[-1]

    def pieces(self, speeds: Sequence[float]) -> list[list[Piece | Runs]]:
        """One stretch of the line for each speed: the rest of a lane that was begun, whole lanes, and the beginning of
        one. Where lanes are many a cut falls between them."""
        ends, work = list(accumulate(map(float, speeds))), self.work
        cuts = [self._cut(end / ends[-1] * work, work / len(ends)) for end in (0.0, *ends)]
        return [self._between(begin, end) for begin, end in pairwise(cuts)]

    def _cut(self, at: float, mean: float) -> _Cut:
        """The point with so much work before it, where a rank has ``mean``."""
        run = bisect_right(self._starts, at) - 1
        if run == len(self._works):
            return run, 0, 0.0
        passed = (at - self._starts[run]) / self._works[run]
        fine = self._works[run] * _FINE <= mean
        lane = floor(passed + (0.5 if fine else _SLIVER))
        part = 0.0 if fine or passed - lane <= _SLIVER else passed - lane
        return (run, lane, part) if lane < self._lanes[run] else (run + 1, 0, 0.0)

    def _between(self, begin: _Cut, end: _Cut) -> list[Piece | Runs]:
        (run, lane, part), (last_run, last_lane, last_part) = begin, end
        if (run, lane) == (last_run, last_lane):
            return [_one_lane(run, lane, self.kv_heads, part, last_part)] if part < last_part else []
        pieces: list[Piece | Runs] = []
        if part and (run, lane) < (last_run, last_lane):
            pieces.append(_one_lane(run, lane, self.kv_heads, part, 1.0))
            lane, part = lane + 1, 0.0
        if run < last_run:
            pieces += _whole_lanes(run, lane, self._lanes[run], self.kv_heads) if lane else [Runs(run, run + 1)]
            pieces += [Runs(run + 1, last_run)] if run + 1 < last_run else []
            lane = 0
        pieces += _whole_lanes(last_run, lane, last_lane, self.kv_heads)
        if part < last_part:
            pieces.append(_one_lane(last_run, last_lane, self.kv_heads, part, last_part))
        return pieces


def _one_lane(run: int, lane: int, heads: int, start: float, stop: float) -> Piece:
    return Piece(run, lane // heads, lane // heads + 1, lane % heads, lane % heads + 1, start, stop)


def _whole_lanes(run: int, lane: int, stop: int, kv_heads: int) -> list[Piece]:
    """The lanes [lane, stop) of a run, row by row."""
    (row, head), (last_row, last_head) = divmod(lane, kv_heads), divmod(stop, kv_heads)
    if row == last_row:
        rectangles = [(row, row + 1, head, last_head)]
    else:
        first = row + (head > 0)
        rectangles = [
            (row, first, head, kv_heads),
            (first, last_row, 0, kv_heads),
            (last_row, last_row + 1, 0, last_head),
        ]
    return [Piece(run, *r, 0.0, 1.0) for r in rectangles if r[0] < r[1] and r[2] < r[3]]


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

    rows: the batch's sequences in order, lengths in tokens; those without queries or keys get no tile.
    kv_heads: KV heads K, so lanes per row.
    speeds: relative, >= 0 and not all 0; a rank of speed 0 gets an empty share.
    axis: "queries" cuts a lane along its queries and trims each tile's keys to what they see (prefill);
        "keys" gives each tile all of the lane's queries and cuts along the keys that they see (decode).
    mode: "line" cuts the whole line at the cumulative fractions of `speeds`, so whole heads come first; a lane with
        at most a 64th of a mean share's work is not cut.
        "query_blocks" cuts every lane at those fractions, with K and V replicated and O = concat(O_i).
    block: a cut inside a lane falls on the multiple of this many positions, from the start of the lane's cut
        range, whose work is nearest to the ideal.
    whole: the rows of the whole prompt that `rows` is a block of. Then the line is laid out for the
        prompt, and every run cuts a lane at the same fractions: a rank works on the same lanes in all of them, and
        is sent no keys of others. None: `rows` is all there is.

    Raises ValueError for input that describes no call.

    Three heads of a prompt of 4 tokens on two equal ranks: a head has 1 + 2 + 3 + 4 = 10 pairs, the
    line 30, and the ideal cut is at 15, five pairs into head 1. Its first 3 queries have 6 pairs, its first 2
    have 3, so the cut falls after 3 (near 4 * sqrt(1/2) = 2.83), and the shares have 16 and 14 pairs.

    >>> first, second = partition([Row(0, 4, 4)], 3, [1.0, 1.0], block=1)
    >>> [tuple(tile) for tile in first]
    [(0, 1, 0, 1, 0, 4, 0, 4), (0, 1, 1, 2, 0, 3, 0, 3)]
    >>> [tuple(tile) for tile in second]
    [(0, 1, 1, 2, 3, 4, 0, 4), (0, 1, 2, 3, 0, 4, 0, 4)]
    """
    _check(rows, kv_heads, speeds, axis, mode, block)
    rows, whole = paired(rows, rows if whole is None else whole)
    firsts = [0, *accumulate(row.alike for row in rows)]
    for first, row, prompt in zip(firsts, rows, whole, strict=False):
        if row.pairs and not prompt.pairs:
            raise ValueError(f"row {first} has queries here and none in whole; give the prompt that it is a block of")
    if mode == "query_blocks":
        ends = list(accumulate(map(float, speeds), initial=0.0))
        cuts = list(pairwise(end / ends[-1] for end in ends))
        pieces = [
            [Piece(run, 0, row.alike, 0, kv_heads, *cut) for run, row in enumerate(rows) if cut[0] < cut[1]]
            for cut in cuts
        ]
    else:
        pieces = [
            [one for piece in mine for one in _apart(piece, rows, kv_heads)]
            for mine in Line(whole, kv_heads).pieces(speeds)
        ]
    at = _positions_of(pieces, rows, axis, block)
    return [
        tuple(joined((p.run, tile) for p in mine for tile in _tiles(p, rows[p.run], firsts[p.run], axis, at)))
        for mine in pieces
    ]


def _positions_of(
    pieces: Sequence[Sequence[Piece]], rows: Sequence[Row], axis: Axis, block: int
) -> dict[tuple[int, float], int]:
    """Where pieces begin and end inside their lanes: by run and part of the lane's work."""
    cuts: dict[int, list[float]] = {}
    for mine in pieces:
        for piece in mine:
            cuts.setdefault(piece.run, []).extend((piece.start, piece.stop))
    found = ((run, parts, positions(rows[run], parts, axis, block)) for run, parts in cuts.items())
    return {(run, part): at for run, parts, ats in found for part, at in zip(parts, ats, strict=True)}


def paired(rows: Sequence[Row], whole: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The same sequences, neighbours together that are alike in both. Raises ValueError for different numbers."""
    ends, whole_ends = (list(accumulate(row.alike for row in some)) for some in (rows, whole))
    if ends[-1:] != whole_ends[-1:]:
        numbers = [sum(row.alike for row in some) for some in (whole, rows)]
        raise ValueError(f"whole has {numbers[0]} rows, the call {numbers[1]}; give the prompt's own rows")
    pairs: list[tuple[Row, Row]] = []
    counts: list[int] = []
    for start, stop in pairwise([0, *sorted({*ends, *whole_ends})]):
        one, other = rows[bisect_right(ends, start)], whole[bisect_right(whole_ends, start)]
        pair = one._replace(alike=1), other._replace(alike=1)
        if pairs and pairs[-1] == pair:
            counts[-1] += stop - start
        else:
            pairs.append(pair)
            counts.append(stop - start)
    both = [[pair[side]._replace(alike=count) for pair, count in zip(pairs, counts, strict=True)] for side in (0, 1)]
    return both[0], both[1]


def _apart(piece: Piece | Runs, rows: Sequence[Row], kv_heads: int) -> list[Piece]:
    """A piece of each run."""
    if isinstance(piece, Piece):
        return [piece]
    return [Piece(run, 0, rows[run].alike, 0, kv_heads, 0.0, 1.0) for run in range(*piece)]


def _tiles(piece: Piece, row: Row, first: int, axis: Axis, at: Mapping[tuple[int, float], int]) -> list[Tile]:
    """The tile of a piece, cut at positions; none if nothing is left of it. ``first`` is the first row of its run."""
    start, stop = at[piece.run, piece.start], at[piece.run, piece.stop]
    if row.q_start == row.q_stop or start == stop:
        return []
    lanes = first + piece.row_start, first + piece.row_stop, piece.head_start, piece.head_stop
    if axis == "keys":
        return [Tile(*lanes, row.q_start, row.q_stop, start, stop)]
    return [Tile(*lanes, row.q_start + start, row.q_start + stop, 0, row.q_start + stop)]


def positions(row: Row, parts: Sequence[float], axis: Axis, block: int) -> list[int]:
    """How many of a lane's positions along ``axis`` have the first of ``parts`` of its work, for each of them: the
    multiple of ``block``, or the lane's end, whose work is nearest.

    Nearest in work, not in positions: a cut is then off by at most half a block's pairs, and a share by one block's.
    """
    before, queries = row.q_start, row.q_stop - row.q_start
    extent = queries if axis == "queries" else row.q_stop
    if not queries:
        return [0] * len(parts)
    part = np.array(parts)
    target, rising = part * row.pairs, 2 * before + 1
    if axis == "queries":
        ideal = (np.sqrt(rising**2 + 8 * target) - rising) / 2
    else:
        seen_by_all = queries * (before + 1)
        rest = np.maximum(0.0, (2 * queries - 1) ** 2 - 8 * (target - seen_by_all))
        late = before + 1 + (2 * queries - 1 - np.sqrt(rest)) / 2
        ideal = np.where(target <= seen_by_all, target / queries, late)

    def work(first: Array) -> Array:
        if axis == "queries":
            return first * before + first * (first + 1) // 2
        # Each key after the first query's is seen by one query less than the key before it.
        late = np.maximum(0, first - before - 1)
        return queries * first - late * (late + 1) // 2

    low = np.minimum(ideal.astype(np.int64) // block * block, extent)
    high = np.minimum(low + block, extent)
    nearest = np.where(2 * target <= work(low) + work(high) + _SLIVER * row.pairs, low, high)
    # The ends of a lane are no cuts.
    nearest = np.where(part == 0.0, 0, np.where(part == 1.0, extent, nearest))
    return [int(at) for at in nearest]


def joined(tiles: Iterable[tuple[Any, Tile]]) -> list[Tile]:
    """The same tiles, in the line's order, neighbours together that are one rectangle. Each comes with what its rows
    must have in common to be in one."""
    kinds, found = list[Any](), list[Tile]()
    for kind, tile in tiles:
        while found and kinds[-1] == kind and (both := _both(found[-1], tile)):
            tile = both
            del found[-1], kinds[-1]
        found.append(tile)
        kinds.append(kind)
    return found


def _both(one: Tile, other: Tile) -> Tile | None:
    """Two neighbours as one, if they are a rectangle."""
    if one[4:] != other[4:]:
        return None
    if one[:2] == other[:2] and one.head_stop == other.head_start:
        return one._replace(head_stop=other.head_stop)
    if one[2:4] == other[2:4] and one.row_stop == other.row_start:
        return one._replace(row_stop=other.row_stop)
    return None


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
        if not 0 <= row.q_start <= row.q_stop <= row.keys or row.alike < 1:
            raise ValueError(
                f"row {index} has queries [{row.q_start}, {row.q_stop}) and {row.keys} keys; give 0 <= q_start <= "
                f"q_stop, and the new tokens' keys, too (keys >= q_stop), for 1 sequence or more"
            )
