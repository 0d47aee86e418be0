"""All work of a call on one line, where a cut may fall anywhere: what costs are reckoned with.

Rows are causal. Real cuts fall on positions and granules, and are the partition's matter. What a pair costs is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import floor, sqrt
from typing import NamedTuple

from fapool_plugin.plan.line import GRANULE, Row
from fapool_plugin.plan.shares import block_edges


class Piece(NamedTuple):
    """The part [start, stop) of each of ``lanes`` lanes of a row, in fractions of a lane's work."""

    row: int
    lanes: int
    start: float
    stop: float


def new_columns(rows: Sequence[Row]) -> int:
    """New tokens of the row that has most: what is cut into blocks."""
    return max(row.q_stop - row.q_start for row in rows)


def cut_rows(rows: Sequence[Row], blocks: int) -> list[list[Row]]:
    """The rows' queries of each block, with the keys that they see. Blocks differ by a granule at most."""
    columns = new_columns(rows)
    edges = [0, *(stop for _, stop in block_edges(0, columns, blocks, GRANULE))]
    # A row's first columns are padding if it is not the longest.
    positions = [[max(row.q_start, row.q_stop - columns + edge) for row in rows] for edge in edges]
    return [[Row(*edge, edge[1]) for edge in zip(*ends, strict=True)] for ends in pairwise(positions)]


def pairs_of(row: Row) -> int:
    """(query, key) pairs of one causal lane."""
    return (row.q_stop * (row.q_stop + 1) - row.q_start * (row.q_start + 1)) // 2


def seconds_of(pieces: Sequence[Piece], pairs: Sequence[float], call_s: float, pair_s: float) -> float:
    """Seconds of one block's part of these pieces; ``pairs`` of each row, a part of them for each lane."""
    parts = ((pairs[piece.row], piece.lanes * (piece.stop - piece.start)) for piece in pieces)
    return sum(call_s + pair_s * row * part for row, part in parts if row)


def position_at(row: Row, fraction: float) -> float:
    """Where a lane's work reaches this fraction."""
    if fraction in (0.0, 1.0):
        return row.q_stop if fraction else row.q_start
    return sqrt(row.q_start**2 + fraction * (row.q_stop**2 - row.q_start**2))


def pieces_of(works: Sequence[float], kv_heads: int, parts: Sequence[float]) -> list[list[Piece]]:
    """The line of ``kv_heads`` lanes a row, each of the row's work, cut into these parts."""
    total = sum(works) * kv_heads
    ends = [0.0, *accumulate(parts)]
    starts = [0.0, *accumulate(work * kv_heads for work in works)]
    pieces: list[list[Piece]] = []
    for start, stop in pairwise(end / ends[-1] * total for end in ends):
        mine: list[Piece] = []
        for row, work in enumerate(works):
            if not work:
                continue
            # Rounded, so that a cut that meets the end of a lane leaves no sliver.
            first, last = (round(min(max((at - starts[row]) / work, 0.0), kv_heads), 9) for at in (start, stop))
            while first < last:
                head = floor(first)
                lanes = floor(last) - head if first == head else 0
                until = head + lanes if lanes else min(head + 1.0, last)
                mine.append(Piece(row, lanes or 1, 0.0 if lanes else first - head, 1.0 if lanes else until - head))
                first = until
        pieces.append(mine)
    return pieces
