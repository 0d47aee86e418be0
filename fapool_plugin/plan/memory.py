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
TRIES = 16
"""What one owner does not take may be too much for the next."""
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
    parts: Sequence[float] = rooms
    for _ in range(TRIES):
        owners = Owners([Row(0, tokens, tokens, rows)], shape.kv_heads, parts)
        need = [positions * position for positions in owners.needs(tokens)]
        short = [number for number, have in enumerate(rooms) if need[number] > have]
        if not short:
            return True
        parts = less([part / sum(parts) for part in parts], need, rooms, short)
        if not sum(parts):
            break
    return False


def less(parts: Sequence[float], need: Sequence[int], room: Sequence[int], short: Sequence[int]) -> list[float]:
    """Parts in which those that are short have what fits, and the others the rest; all 0 if there is no way."""
    total = sum(need)
    # Cuts fall on whole lanes, so an owner may need more than its part says. What is next to all of its need is what it
    # has beside its part, which no smaller part spares.
    fits = [
        part if at not in short
        else min(part * TIGHT * have / need[at], TIGHT * have / total) if need[at] < _BESIDE * part * total
        else 0.0
        for at, (part, have) in enumerate(zip(parts, room, strict=True))
    ]  # fmt: skip
    missing = 1.0 - sum(fits)
    free = [
        max(0.0, TIGHT * have / total - part) if part or at not in short else 0.0
        for at, (part, have) in enumerate(zip(fits, room, strict=True))
    ]
    if missing <= 1e-9 or sum(free) <= missing:
        return [0.0] * len(parts)
    return [part + missing * more / sum(free) for part, more in zip(fits, free, strict=True)]


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
