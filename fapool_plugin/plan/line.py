"""One line, cut into shares: who computes which rectangle of a call's attention.

All work of a call is laid end to end on one line, lane after lane (a lane is one sequence x one KV head),
and inside a lane along its queries or its keys. Work is measured in (query, key) pairs that the mask allows,
so a causal lane is cut at equal area and not at equal length. Every rank takes one contiguous share, as long
as that rank is fast.

This module does not know tensors, links, which rank is the base, or what a pair costs in seconds: speeds are
relative.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, groupby, pairwise
from math import ceil, isfinite
from typing import Literal, NamedTuple, get_args

Axis = Literal["queries", "keys"]
Mode = Literal["line", "query_blocks"]

UNBOUNDED = -1
GRANULE = 64
"""Positions: the row block of the flash kernels, of which blocks in flight are multiples, and cuts in long prompts."""
_NOTHING, _ALL = Fraction(0), Fraction(1)


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


class _Lane(NamedTuple):
    """A lane as a piece of the line: `extent` positions from `start` on, along the axis that is cut.

    All lanes of a row are alike, so one of these stands for every KV head of the row.
    """

    row: int
    geometry: Row
    window_size: tuple[int, int]
    axis: Axis
    start: int
    extent: int

    def tile(self, head_start: int, head_stop: int, begin: int, end: int) -> Tile:
        """The tile of the lane's positions [begin, end), counted from the lane's start."""
        begin, end = self.start + begin, self.start + end
        if self.axis == "keys":
            q_start, q_stop = self.geometry.q_start, self.geometry.q_stop
            return Tile(self.row, head_start, head_stop, q_start, q_stop, begin, end)
        k_start, k_stop = _visible_keys(begin, end, self.geometry.keys, self.window_size)
        return Tile(self.row, head_start, head_stop, begin, end, k_start, k_stop)

    def work(self, end: int) -> int:
        """Allowed pairs in the lane's first `end` positions."""
        return allowed_pairs(self.tile(0, 1, 0, end), self.window_size)

    def part(self, fraction: Fraction, work: int, block: int) -> int:
        """The cut that leaves `fraction` of the lane's `work` before it."""
        if fraction in (_NOTHING, _ALL):
            return 0 if fraction == _NOTHING else self.extent
        return self.cut(fraction * work, block)

    def cut(self, target: Fraction, block: int) -> int:
        """The multiple of `block` (or the lane's end) whose work is nearest to `target`.

        Nearest in work, not in positions: a cut is then off by at most half a block's pairs, and a share by
        one block's.
        """

        def position(index: int) -> int:
            return min(index * block, self.extent)

        blocks = -(-self.extent // block)
        reaching = bisect_left(range(blocks + 1), ceil(target), key=lambda index: self.work(position(index)))
        if reaching == 0:
            return 0
        low, high = position(reaching - 1), position(reaching)
        return low if target - self.work(low) <= self.work(high) - target else high


def round_up(length: int, block: int) -> int:
    """The smallest multiple of ``block`` that is at least ``length``."""
    return -(-length // block) * block


def allowed_pairs(tile: Tile, window_size: tuple[int, int]) -> int:
    """Number of (query, key) pairs of `tile` that the mask allows, summed over its lanes.

    The query at position i sees the keys j with i - left <= j <= i + right; -1 leaves that side unbounded.
    The keys visible to one query are those below its upper edge without those below its lower edge. Each
    count, summed over the queries, is a clamped arithmetic series, so the cost does not depend on the tile's
    size.

    Causal, queries 2..4 against keys 0..3: queries 2, 3 and 4 see 3, 4 and 4 of them.

    >>> allowed_pairs(Tile(0, 0, 1, 2, 5, 0, 4), (-1, 0))
    11
    """
    left, right = window_size
    queries, width = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
    if queries <= 0 or width <= 0:
        return 0
    first = tile.q_start - tile.k_start  # the first query's position, seen from the tile's first key
    pairs = queries * width if right == UNBOUNDED else _keys_below(first + right + 1, queries, width)
    if left != UNBOUNDED:
        pairs -= _keys_below(first - left, queries, width)
    return pairs * (tile.head_stop - tile.head_start)


def _keys_below(first_edge: int, queries: int, width: int) -> int:
    """Sum of clamp(edge, 0, width) over the edges first_edge, first_edge + 1, ..., one for each query."""

    def below(edge: int) -> int:
        rising = min(max(edge, 0), width)
        return rising * (rising - 1) // 2 + max(edge - width, 0) * width

    return below(first_edge + queries) - below(first_edge)


def _visible_keys(q_start: int, q_stop: int, keys: int, window_size: tuple[int, int]) -> tuple[int, int]:
    """The range of keys that the queries [q_start, q_stop) see between them."""
    left, right = window_size
    k_start = 0 if left == UNBOUNDED else max(0, q_start - left)
    return k_start, keys if right == UNBOUNDED else min(keys, q_stop + right)


def partition(
    rows: Sequence[Row],
    kv_heads: int,
    speeds: Sequence[float],
    *,
    window_size: tuple[int, int] = (-1, 0),
    axis: Axis = "queries",
    mode: Mode = "line",
    block: int = 64,
    whole: Sequence[Row] | None = None,
) -> list[Share]:
    """Cut all attention work of one call into one share for each entry of `speeds`.

    Every allowed (row, head, query, key) lies in exactly one tile; a tile may also hold pairs that the mask
    forbids. A query that sees no key may lie in no tile: its output is zero and its LSE -inf.

    rows: the batch's sequences, lengths in tokens; a row without queries or keys gets no tile.
    kv_heads: KV heads K, so lanes per row.
    speeds: relative, >= 0 and not all 0; a rank of speed 0 gets an empty share.
    window_size: flash-attn's (left, right), -1 for unbounded: (-1, 0) is causal, (-1, -1) is no mask.
    axis: "queries" cuts a lane along its queries and trims each tile's keys to what they see (prefill);
        "keys" gives each tile all of the lane's queries and cuts along the keys that they see (decode).
    mode: "line" cuts the whole line at the cumulative fractions of `speeds`, so whole heads come first.
        "query_blocks" cuts every lane at those fractions, with K and V replicated and O = concat(O_i);
        without a mask, p ranks of equal speed get b = ceil(n / p) positions each, the last ones maybe fewer.
    block: a cut inside a lane falls on the multiple of this many positions, from the start of the lane's cut
        range, whose work is nearest to the ideal (not for the ceil(n / p) blocks).
    whole: the rows of the whole prompt that `rows` is a run of positions of. Then the line is laid out for the
        prompt, and every run cuts a lane at the same fractions: a rank works on the same lanes in all of them, and
        is sent no keys of others. None: `rows` is all there is.

    Raises ValueError for input that describes no call.

    Three heads of a causal prompt of 4 tokens on two equal ranks: a head has 1 + 2 + 3 + 4 = 10 pairs, the
    line 30, and the ideal cut is at 15, five pairs into head 1. Its first 3 queries have 6 pairs, its first 2
    have 3, so the cut falls after 3 (near 4 * sqrt(1/2) = 2.83), and the shares have 16 and 14 pairs.

    >>> first, second = partition([Row(0, 4, 4)], 3, [1.0, 1.0], block=1)
    >>> [tuple(tile) for tile in first]
    [(0, 0, 1, 0, 4, 0, 4), (0, 1, 2, 0, 3, 0, 3)]
    >>> [tuple(tile) for tile in second]
    [(0, 1, 2, 3, 4, 0, 4), (0, 2, 3, 0, 4, 0, 4)]
    """
    _check(rows, kv_heads, speeds, window_size, axis, mode, block)
    if whole is not None and len(whole) != len(rows):
        raise ValueError(f"whole has {len(whole)} rows, the call {len(rows)}; give the prompt's own rows")
    lanes = [_lane(index, row, window_size, axis) for index, row in enumerate(rows)]
    lanes = [lane for lane in lanes if lane.extent > 0]
    if not lanes:
        return [() for _ in speeds]
    if mode == "query_blocks":
        working = {speed for speed in speeds if speed > 0}
        if window_size == (UNBOUNDED, UNBOUNDED) and len(working) == 1:
            even = [_even_positions(lane, kv_heads, speeds) for lane in lanes]
            return [sum(share, ()) for share in zip(*even, strict=True)]
        everywhere = [_cumulative_fractions(speeds)] * kv_heads
        return _shares(lanes, {lane.row: everywhere for lane in lanes}, len(speeds), block)
    line = lanes if whole is None else [_lane(index, row, window_size, "queries") for index, row in enumerate(whole)]
    fractions = _line_fractions([lane for lane in line if lane.extent > 0], kv_heads, speeds)
    return _shares(lanes, fractions, len(speeds), block)


def _lane(index: int, row: Row, window_size: tuple[int, int], axis: Axis) -> _Lane:
    """A lane of `row`, from its first to its last position with an allowed pair (extent 0: there is none)."""
    left, _ = window_size
    # Queries so far past the last key that their window misses it see nothing.
    q_stop = row.q_stop if left == UNBOUNDED else min(row.q_stop, row.keys + left)
    if q_stop <= row.q_start or row.keys == 0:
        return _Lane(index, row, window_size, axis, 0, 0)
    if axis == "queries":
        return _Lane(index, row, window_size, axis, row.q_start, q_stop - row.q_start)
    k_start, k_stop = _visible_keys(row.q_start, q_stop, row.keys, window_size)
    return _Lane(index, row, window_size, axis, k_start, k_stop - k_start)


def _cumulative_fractions(speeds: Sequence[float]) -> list[Fraction]:
    """Where each rank's share ends; exact, so that equal parts meet the ends of lanes and of the line."""
    ends = list(accumulate(Fraction(float(speed)) for speed in speeds))
    return [end / ends[-1] for end in ends]


def _line_fractions(lanes: list[_Lane], kv_heads: int, speeds: Sequence[float]) -> dict[int, list[list[Fraction]]]:
    """Where the whole line is cut, lane by lane: by row and head, the part of the lane's work before each cut."""
    works = [lane.work(lane.extent) for lane in lanes]
    total, before = sum(works) * kv_heads, 0
    targets = [fraction * total for fraction in _cumulative_fractions(speeds)]
    fractions: dict[int, list[list[Fraction]]] = {}
    for lane, work in zip(lanes, works, strict=True):
        heads = []
        for _ in range(kv_heads):
            heads.append([min(max((target - before) / work, _NOTHING), _ALL) for target in targets])
            before += work
        fractions[lane.row] = heads
    return fractions


def _shares(lanes: list[_Lane], fractions: dict[int, list[list[Fraction]]], ranks: int, block: int) -> list[Share]:
    """Cuts every lane at its fractions of its own work. Neighbouring heads with the same cuts share a tile."""
    shares: list[list[Tile]] = [[] for _ in range(ranks)]
    for lane in lanes:
        work, head = lane.work(lane.extent), 0
        for same, group in groupby(fractions[lane.row]):
            stop = head + len(list(group))
            cuts = [0, *(lane.part(fraction, work, block) for fraction in same)]
            for share, (begin, end) in zip(shares, pairwise(cuts), strict=True):
                if begin < end:
                    share.append(lane.tile(head, stop, begin, end))
            head = stop
    return [_joined(share) for share in shares]


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


def _even_positions(lane: _Lane, kv_heads: int, speeds: Sequence[float]) -> list[Share]:
    """Without a mask, equal ranks get b = ceil(n / p) positions of a lane each, the last ones maybe fewer."""
    positions = -(-lane.extent // sum(speed > 0 for speed in speeds))
    ranks_so_far = accumulate(int(speed > 0) for speed in speeds)
    cuts = [0, *(min(count * positions, lane.extent) for count in ranks_so_far)]
    return [(lane.tile(0, kv_heads, begin, end),) if begin < end else () for begin, end in pairwise(cuts)]


def _check(
    rows: Sequence[Row],
    kv_heads: int,
    speeds: Sequence[float],
    window_size: tuple[int, int],
    axis: Axis,
    mode: Mode,
    block: int,
) -> None:
    """Refuse input that describes no call, with the numbers and the remedy."""
    if axis not in get_args(Axis):
        raise ValueError(f"axis is {axis!r}; give one of {get_args(Axis)}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; give one of {get_args(Mode)}")
    if kv_heads < 1:
        raise ValueError(f"kv_heads is {kv_heads}; a call has at least 1 KV head")
    if block < 1:
        raise ValueError(f"block is {block} positions; give at least 1")
    if len(window_size) != 2 or min(window_size) < UNBOUNDED:
        raise ValueError(f"window_size is {window_size}; give (left, right), each >= 0, or -1 for unbounded")
    if not all(isfinite(speed) and speed >= 0 for speed in speeds) or not any(speeds):
        raise ValueError(f"speeds are {list(speeds)}; give each rank a finite number >= 0, and at least one above 0")
    for index, row in enumerate(rows):
        if not 0 <= row.q_start <= row.q_stop or row.keys < 0:
            raise ValueError(
                f"row {index} has queries [{row.q_start}, {row.q_stop}) and {row.keys} keys; "
                "give 0 <= q_start <= q_stop and keys >= 0"
            )
        if window_size[1] == 0 and row.q_stop > row.keys:
            raise ValueError(
                f"row {index} has queries up to position {row.q_stop} but only {row.keys} keys under a "
                f"causal mask; count the new tokens' keys too (keys >= {row.q_stop}), or set the window's "
                "right side to -1"
            )
