"""What is said to fit against a count of every lane's positions."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import example, given, settings

from fapool_plugin.plan.line import GRANULE
from fapool_plugin.plan.memory import Room, fits, largest_batch, longest
from fapool_plugin.plan.profile import Shape

SHAPE = Shape(
    hidden=64, layers=3, heads=4, kv_heads=2, head_dim=8, v_head_dim=8, dtype="float32", parameters=1000
)  # fmt: skip
POSITION = 3 * 2 * 8 * 4
"""Bytes of a lane's key and value in all layers."""


@settings(max_examples=80, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 400), max_size=4),
    base=st.integers(0, 400),
    tokens=st.integers(1, 900),
)
@example(ranks=[1, 1], base=8, tokens=129)
@example(ranks=[400, 1], base=400, tokens=604)
@example(ranks=[10], base=1, tokens=129)
def test_the_largest_batch_fits_and_wastes_little(ranks: list[int], base: int, tokens: int) -> None:
    """Rooms in blocks of 256 positions."""
    room = Room([256 * POSITION * one for one in ranks], 256 * POSITION * base)
    rows = largest_batch(SHAPE, tokens, room)
    assert rows == 0 or fits(SHAPE, rows, tokens, room)
    total, lane = 256 * (sum(ranks) + base), tokens
    assert rows * SHAPE.kv_heads * tokens <= total, "more keys than there is room"
    # Each owner may have a lane's room left at both ends of its share; parts of lanes may be two granules more; short
    # lanes are not cut, and a share is off by up to a 64th of the mean then, which the smallest owner feels most.
    owners = [one for one in (*ranks, base) if one]
    uneven = total // 64 // len(owners) * max(owners) // min(owners) if owners else 0
    wasted = 2 * (len(ranks) + 1) * (lane + 2 * GRANULE) + uneven
    assert (rows + 1) * SHAPE.kv_heads * lane > total - wasted, f"{rows} rows of {total // lane // 2} that may fit"


def test_more_ranks_hold_longer_batches() -> None:
    rooms = [Room([2**20] * ranks, 2**20) for ranks in range(4)]
    lengths = [longest(SHAPE, 4, room) for room in rooms]
    batches = [largest_batch(SHAPE, 256, room) for room in rooms]
    assert lengths[0] == 2**20 // POSITION // 8
    # 5,461 positions each: 21 lanes of 256 and a third of one, of which two granules more may come.
    assert batches == [10, 21, 30, 42]
    assert all(fits(SHAPE, 4, length, room) for length, room in zip(lengths, rooms, strict=True))
    assert lengths == sorted(lengths)
    assert lengths[3] > 3.8 * lengths[0]


def test_nothing_fits_without_room() -> None:
    assert largest_batch(SHAPE, 100, Room([], 0)) == 0
    assert longest(SHAPE, 1, Room([], 0)) == 0
