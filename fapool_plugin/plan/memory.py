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
_TRIES = 16
TIGHT = 0.98
"""Of an owner's room, where parts follow memory: cuts fall on whole lanes and blocks."""
_BESIDE = 4
"""An owner whose need is so many times its part is asked for nothing, if it is short."""
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

    def needs(parts: Sequence[float]) -> list[int]:
        owners = Owners([Row(0, tokens, tokens, rows)], shape.kv_heads, parts)
        return [positions * position for positions in owners.needs(tokens)]

    return parts_within(rooms, [have / sum(rooms) for have in rooms], needs)[2]


def parts_within(
    room: Sequence[int], parts: Sequence[float], needs: Callable[[Sequence[float]], list[int]]
) -> tuple[Sequence[float], list[int], bool]:
    """Parts of all keys that owners have room for, as near as may be to those that are wanted.

    Args:
        room: bytes of each owner.
        parts: that are wanted; together 1.
        needs: bytes of each owner, of such parts. Cuts fall on whole lanes, so an owner may need more than its part
            says; and what one does not take may be too much for the next.

    Returns the parts, what they need, and whether that fits. If not, they are the last that were tried.
    """
    need = needs(parts)
    for _ in range(_TRIES):
        short = {number for number, have in enumerate(room) if need[number] > have}
        fewer = _less(parts, need, room, short) if short else None
        if fewer is None:
            break
        parts, need = fewer, needs(fewer)
    return parts, need, all(mine <= have for mine, have in zip(need, room, strict=True))


def _less(parts: Sequence[float], need: Sequence[int], room: Sequence[int], short: set[int]) -> list[float] | None:
    """Parts in which those that are short have what fits, and the others the rest; None if there is no way."""
    total = sum(need)
    most = [TIGHT * have / total for have in room]
    fewer = list(parts)
    for at in short:
        fewer[at] = min(parts[at] * TIGHT * room[at] / need[at], most[at])
        if need[at] >= _BESIDE * parts[at] * total:  # next to all of it is beside its part: no smaller part spares that
            fewer[at] = most[at] = 0.0
    missing = 1.0 - sum(fewer)
    free = [max(0.0, limit - part) for limit, part in zip(most, fewer, strict=True)]
    if missing <= 1e-9 or sum(free) <= missing:
        return None
    return [part + missing * more / sum(free) for part, more in zip(fewer, free, strict=True)]


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
