"""What fits where keys have owners: the largest batch, and the longest, that base and pool hold together.

In lanes and parts of them, as they are really cut. Knows numbers only; what is free is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fapool_plugin.plan.line import Row
from fapool_plugin.plan.owners import Owners
from fapool_plugin.plan.profile import Shape

_MOST = 1 << 40
_NEAR = 8
"""Numbers above one that fits that are tried, too: what is cut unevenly may not fit where a little more does."""


@dataclass(frozen=True)
class Room:
    """Where keys may be.

    Args:
        ranks: bytes of each pool rank.
        base: bytes of the base.
    """

    ranks: Sequence[int]
    base: int


def fits(shape: Shape, rows: int, tokens: int, room: Room) -> bool:
    """Whether the keys of so many sequences of so many tokens fit, each with one owner, which has that room at once."""
    position = (shape.head_dim + shape.v_head_dim) * shape.element_bytes * shape.layers
    rooms = [*room.ranks, room.base]
    if sum(rooms) < rows * shape.kv_heads * tokens * position:
        return False
    owners = Owners([Row(0, tokens, tokens, rows)], shape.kv_heads, rooms)
    return all(need * position <= have for need, have in zip(owners.needs(tokens), rooms, strict=True))


def largest_batch(shape: Shape, tokens: int, room: Room) -> int:
    """How many sequences of so many tokens fit."""
    return _largest(lambda rows: fits(shape, rows, tokens, room))


def longest(shape: Shape, rows: int, room: Room) -> int:
    """How many tokens so many sequences may have each."""
    return _largest(lambda tokens: fits(shape, rows, tokens, room))


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest number for which something holds that holds for nearly all smaller ones; 0 if it does for none."""
    low, high = 0, 1
    while high < _MOST and holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    while (more := next((low + step for step in range(_NEAR, 0, -1) if holds(low + step)), 0)) > low:
        low = more
    return low
