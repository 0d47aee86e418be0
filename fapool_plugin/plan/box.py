"""A box: the lanes of neighbouring rows and neighbouring heads. What a rank computes, keeps and answers comes in boxes.

Knows no positions and no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Box(NamedTuple):
    """All ranges are half-open."""

    row_start: int
    row_stop: int
    head_start: int
    head_stop: int

    @property
    def lanes(self) -> int:
        """How many."""
        return max(0, self.row_stop - self.row_start) * max(0, self.head_stop - self.head_start)

    def common(self, other: Box) -> Box:
        """The lanes in both; without any, a box whose ``lanes`` is 0."""
        return Box(
            max(self.row_start, other.row_start),
            min(self.row_stop, other.row_stop),
            max(self.head_start, other.head_start),
            min(self.head_stop, other.head_stop),
        )

    def around(self, others: Iterable[Box]) -> Box:
        """The smallest that covers this one and all others."""
        row_starts, row_stops, head_starts, head_stops = zip(self, *others, strict=True)
        return Box(min(row_starts), max(row_stops), min(head_starts), max(head_stops))

    def covers(self, other: Box) -> bool:
        """Whether it has all lanes of the other."""
        return (
            self.row_start <= other.row_start
            and other.row_stop <= self.row_stop
            and self.head_start <= other.head_start
            and other.head_stop <= self.head_stop
        )

    def without(self, part: Box) -> list[Box]:
        """Boxes of the lanes that are not in a part of it."""
        rest = [
            self._replace(row_stop=part.row_start),
            self._replace(row_start=part.row_stop),
            part._replace(head_start=self.head_start, head_stop=part.head_start),
            part._replace(head_start=part.head_stop, head_stop=self.head_stop),
        ]
        return [box for box in rest if box.lanes]

    def inside(self, other: Box) -> tuple[slice, slice]:
        """Where its rows and heads are in one that covers it."""
        rows = slice(self.row_start - other.row_start, self.row_stop - other.row_start)
        return rows, slice(self.head_start - other.head_start, self.head_stop - other.head_start)
