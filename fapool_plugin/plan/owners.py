"""Who owns which keys of a batch, where every key has one owner: lanes whole while they suffice, the others dealt.

A lane that is cut has its keys dealt stretch by stretch, a block of the prompt or a step, by its owners' parts of it:
so each has work in every block, and holds its part of whatever has come. An owner keeps its keys in the order of their
positions and knows no positions: it is asked in numbers of its own keys. Of a lane dealt to a and b, a is asked this of
the queries 4 to 9, as two rectangles with a causal edge where its new keys are:

    position   0 1 2 3 | 4 5 6 7 8 9            query  4 5 6 7 8 9
    owner      a a b b | b b b a a a                   ─────┐          its keys 0, 1: seen by all
    a's key    0 1         ·     2 3 4                      └ 2 3 4    its keys 2 to 4: by the queries 7 to 9

Knows numbers only: neither ranks, nor tensors, nor what it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Any, Literal, NamedTuple

import numpy as np

from fapool_plugin.plan.box import Box
from fapool_plugin.plan.line import GRANULE, Line, Piece, Row, Tile, joined, round_up
from fapool_plugin.plan.shares import TileWithKeys

Array = np.ndarray[Any, Any]
_AHEAD = 2 * GRANULE
"""Positions that an owner may have of a cut lane above its part of it: short stretches are not divided."""


class Asked(NamedTuple):
    """What an owner is asked of some lanes."""

    place: Tile
    """Whose queries, by their positions."""
    own: TileWithKeys
    """The same in numbers of the owner's keys, and those that are new to it."""
    new: tuple[tuple[int, int], ...]
    """Positions of the new keys, as runs."""

    def moved(self, rows: int) -> Asked:
        """With the place that many rows further."""
        place = self.place
        return self._replace(place=place._replace(row_start=place.row_start + rows, row_stop=place.row_stop + rows))


@dataclass
class CutLanes:
    """Lanes of a box whose keys are dealt; their rows are alike."""

    box: Box
    parts: dict[int, float]
    """Each owner's part of them."""
    _owner_of: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int16))
    """By position; those that were given up keep their owners for what comes in their place."""

    def deal(self, stop: int) -> None:
        """Gives owners to all positions before ``stop`` that have none."""
        start = len(self._owner_of)
        if stop <= start:
            return
        owners, parts = list(self.parts), np.cumsum(list(self.parts.values()))
        if not start or stop - start >= GRANULE:
            edges = np.rint(np.concatenate([[0.0], parts / parts[-1]]) * (stop - start)).astype(np.int64)
            new = np.repeat(np.array(owners, dtype=np.int16), np.diff(edges))
        else:
            behind = {one: part * stop / parts[-1] - self.held(one, start) for one, part in self.parts.items()}
            new = np.full(stop - start, max(owners, key=behind.__getitem__), dtype=np.int16)
        self._owner_of = np.concatenate([self._owner_of, new])

    def held(self, owner: int, before: int) -> int:
        """How many of the positions before ``before`` an owner has."""
        return int(np.count_nonzero(self._owner_of[:before] == owner))

    def runs(self, owner: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Its positions in [start, stop), as runs."""
        mine = self._owner_of[start:stop] == owner
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mine, [False]]).astype(np.int8))) + start
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


class Owners:
    """The owners of a batch's keys.

    Args:
        rows: the sequences, with all the keys that they have after their prompt.
        kv_heads: lanes of a sequence.
        parts: of each owner, of all keys; relative.
        mode: "line" cuts few lanes, "query_blocks" all of them at the same fractions.
        copies: rows r // copies are copies of one prompt, and have the same owners.
    """

    def __init__(
        self, rows: Sequence[Row], kv_heads: int, parts: Sequence[float], *,
        mode: Literal["line", "query_blocks"] = "line", copies: int = 1,
    ) -> None:  # fmt: skip
        if any(row.alike % copies for row in rows):
            copies = 1
        # As a step sees them: work is as the number of keys.
        line = [Row(max(0, row.keys - 1), row.keys, row.keys, row.alike // copies) for row in rows]
        firsts = np.cumsum([0, *(row.alike for row in line)]).tolist()
        self.kv_heads = kv_heads
        self.whole: list[list[Box]] = [[] for _ in parts]
        """Of each owner, the lanes that it has alone."""
        self.cut: list[CutLanes] = []
        cuts: dict[Box, dict[int, float]] = {}
        if mode == "query_blocks":
            ends = (np.cumsum([0.0, *parts]) / sum(parts)).tolist()
            pieces: list[list[Any]] = [
                [Piece(run, 0, row.alike, 0, kv_heads, *cut) for run, row in enumerate(line) if cut[0] < cut[1]]
                for cut in pairwise(ends)
            ]
        else:
            pieces = Line(line, kv_heads).pieces(parts)
        for owner, mine in enumerate(pieces):
            for piece in mine:
                if not isinstance(piece, Piece):
                    self.whole[owner].append(Box(firsts[piece.start], firsts[piece.stop], 0, kv_heads))
                    continue
                first = firsts[piece.run]
                box = Box(first + piece.row_start, first + piece.row_stop, piece.head_start, piece.head_stop)
                if (piece.start, piece.stop) == (0.0, 1.0):
                    self.whole[owner].append(box)
                else:
                    cuts.setdefault(box, {})[owner] = piece.stop - piece.start
        for box, shares in cuts.items():
            if len(shares) == 1:
                self.whole[next(iter(shares))].append(box)
            else:
                self.cut.append(CutLanes(box, shares))
        self.whole = [
            [tile.box for tile in joined((None, Tile(*box, 0, 1, 0, 1)) for box in mine)] for mine in self.whole
        ]
        if copies > 1:
            self.whole = [[_spread(box, copies) for box in mine] for mine in self.whole]
            self.cut = [CutLanes(_spread(lanes.box, copies), lanes.parts) for lanes in self.cut]

    @property
    def disjoint(self) -> bool:
        """Whether no two owners answer for the same queries."""
        return not self.cut

    def boxes(self, owner: int) -> list[tuple[Box, float]]:
        """The lanes that an owner has anything of, with its part of them."""
        cut = [(lanes.box, lanes.parts[owner]) for lanes in self.cut if owner in lanes.parts]
        return [(box, 1.0) for box in self.whole[owner]] + cut

    def asked(self, rows: Sequence[Row], dealt: int, capacity: int = 0, first: int = 0) -> list[list[Asked]]:
        """What each owner is asked in one call.

        Args:
            rows: the call's.
            dealt: columns whose keys have gone to their owners already; all others go with this call.
            capacity: positions that a lane will have at most; 0 if that is not known.
            first: the number of the call's first row; places count from there.

        Raises:
            ValueError: keys of a row would come without a query of it.
        """
        asked: list[list[Asked]] = [[] for _ in self.whole]
        begin = first
        for row in rows:
            stop, before = first + row.alike, min(max(0, dealt - row.column), row.keys)
            lanes = Box(first, stop, 0, self.kv_heads)
            if before < row.keys and row.q_start == row.q_stop:
                raise ValueError(f"row {first} has keys that no owner has, and no query")
            if row.q_start < row.q_stop:
                for owner, boxes in enumerate(self.whole):
                    for box in boxes:
                        if (both := box.common(lanes)).lanes:
                            asked[owner].append(_whole(both, row, before, capacity))
                for cut in self.cut:
                    if (both := cut.box.common(lanes)).lanes:
                        cut.deal(row.keys)
                        for owner, part in cut.parts.items():
                            asked[owner] += _part(cut, owner, both, row, before, room_for(part, capacity))
            first = stop
        mine_in_order = (sorted(mine, key=lambda one: one.place[:5]) for mine in asked)
        return [[one.moved(-begin) for one in mine] if begin else mine for mine in mine_in_order]

    def ranges(self, owner: int, rows: Sequence[Row], columns: int) -> list[tuple[Tile, list[tuple[int, int]]]]:
        """All that an owner has of the first ``columns`` columns: keys by its own numbers, and their positions."""
        found, first = [], 0
        for row in rows:
            stop, keys = first + row.alike, min(max(0, columns - row.column), row.keys)
            lanes = Box(first, stop, 0, self.kv_heads)
            for box in self.whole[owner]:
                if keys and (both := box.common(lanes)).lanes:
                    found.append((Tile(*both, 0, 1, 0, keys), [(0, keys)]))
            for cut in self.cut:
                both = cut.box.common(lanes)
                held = cut.held(owner, keys) if both.lanes and owner in cut.parts else 0
                if held:
                    found.append((Tile(*both, 0, 1, 0, held), cut.runs(owner, 0, keys)))
            first = stop
        return found

    def needs(self, columns: int, block: int = 1) -> list[int]:
        """Positions of all lanes together that each owner must have room for when lanes have so many, in whole blocks
        of positions."""
        return [
            sum(box.lanes * round_up(room_for(part, columns), block) for box, part in self.boxes(owner))
            for owner in range(len(self.whole))
        ]

    def stay_together(self, rows: Sequence[int]) -> bool:
        """Whether all owners can make row i a copy of row ``rows[i]``, each by itself."""
        boxes, sources = [box for mine in self.whole for box in mine] + [cut.box for cut in self.cut], np.array(rows)
        if len(sources) != max(box.row_stop for box in boxes):
            return False
        parts = [(box, sources[box.row_start : box.row_stop]) for box in boxes]
        return all(box.row_start <= part.min() and part.max() < box.row_stop for box, part in parts)


def room_for(part: float, positions: int) -> int:
    """What an owner of a part of a lane holds at most when that has so many positions."""
    return min(positions, ceil(part * positions) + _AHEAD) if part < 1.0 else positions


def _whole(box: Box, row: Row, before: int, capacity: int) -> Asked:
    place = Tile(*box, row.q_start, row.q_stop, 0, row.keys)
    new = ((before, row.keys),) if before < row.keys else ()
    return Asked(place, TileWithKeys(place, before, row.keys, capacity), new)


def _part(cut: CutLanes, owner: int, box: Box, row: Row, before: int, capacity: int) -> list[Asked]:
    """What an owner is asked of a lane of which it has a part: a rectangle for the queries up to each run of its new
    keys, and from there on one with a causal edge."""
    runs, held = cut.runs(owner, before, row.keys), cut.held(owner, before)
    total = held + sum(stop - start for start, stop in runs)
    starts = [start for start, _ in runs]
    edges = [row.q_start, *(min(max(start, row.q_start), row.q_stop) for start in starts), row.q_stop]
    asked: list[Asked] = []
    seen, sent = held, total if not runs else held
    for index, (first, last) in enumerate(pairwise(edges)):
        if index:
            start, stop = runs[index - 1]
            # The query at the run's start sees the first of its keys.
            shift, seen = seen - start, seen + stop - start
        else:
            # All that is seen is seen by all; a single query keeps its position, by which results are merged.
            shift = 0
        if first == last or not seen:
            continue
        if row.q_stop - row.q_start == 1:
            shift = 0
        place = Tile(*box, first, last, 0, seen)
        tile = place._replace(q_start=first + shift, q_stop=last + shift)
        asked.append(Asked(place, TileWithKeys(tile, sent, total, capacity), tuple(runs) if sent < total else ()))
        sent = total
    return asked


def _spread(box: Box, copies: int) -> Box:
    """The box of all copies of its rows."""
    return box._replace(row_start=box.row_start * copies, row_stop=box.row_stop * copies)
