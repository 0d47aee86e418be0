"""Owners of keys against brute force: every key has one owner, and every allowed (query, key) pair is asked of it once.

The owners are played: each keeps the positions it is sent, in order, and answers in its own numbers.
"""

from __future__ import annotations

from itertools import pairwise, product

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fapool_plugin.plan.box import Box
from fapool_plugin.plan.line import Row
from fapool_plugin.plan.owners import CutLanes, Owners, room_for
from fapool_plugin.plan.shares import Geometry

Lane = tuple[int, int]


class Played:
    """One owner: positions by lane, in the order in which they were sent."""

    def __init__(self) -> None:
        self.held: dict[Lane, list[int]] = {}

    def seen(self, asked: list) -> list[tuple[Lane, int, int]]:
        """(lane, query, key) of all that it computes."""
        pairs = []
        for place, (tile, start, stop, _), new in asked:
            positions = [at for run in new for at in range(*run)]
            assert len(positions) == stop - start, "keys announced and keys sent differ"
            for lane in product(range(*place[:2]), range(*place[2:4])):
                mine = self.held.setdefault(lane, [])
                if positions:
                    assert len(mine) >= start, "assumes more than it was sent"
                    mine[start:] = positions
                assert tile.k_stop <= len(mine), "asked for keys that it was not sent"
                for query, own in zip(
                    range(place.q_start, place.q_stop), range(tile.q_start, tile.q_stop), strict=True
                ):
                    pairs += [(lane, query, mine[key]) for key in range(tile.k_start, min(tile.k_stop, own + 1))]
        return pairs


def columns_of(starts: list[int], stop: int, first: int) -> Geometry:
    return Geometry(tuple(starts), (stop,) * len(starts), first, stop)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[int], int, list[tuple[str, int]]]:
    starts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    prompt = max(starts) + draw(st.integers(1, 120))
    steps = draw(
        st.lists(st.tuples(st.sampled_from(["step", "step", "block", "crop"]), st.integers(1, 90)), max_size=8)
    )
    return starts, prompt, steps


@settings(max_examples=150, deadline=None)
@given(
    sequence=sequences(),
    kv_heads=st.integers(1, 3),
    parts=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=6).filter(any),
    mode=st.sampled_from(["line", "query_blocks"]),
    blocks=st.integers(1, 3),
    moved=st.booleans(),
)
def test_every_allowed_pair_is_asked_once_of_the_keys_owner(
    sequence: tuple[list[int], int, list[tuple[str, int]]], kv_heads: int, parts: list[float], mode: str, blocks: int,
    moved: bool,
) -> None:  # fmt: skip
    starts, prompt, steps = sequence
    owners = Owners(columns_of(starts, prompt, 0).rows, kv_heads, parts, mode=mode)  # type: ignore[arg-type]
    played = [Played() for _ in parts]
    edges = [0, *sorted({prompt * number // blocks for number in range(1, blocks)} - {0}), prompt]
    # "moved": the first call has queries at its end only, and keys of before go with it.
    calls = [(edges[-2] if moved else 0, prompt)] if moved else list(pairwise(edges))
    length = prompt
    for kind, count in steps:
        if kind == "crop":
            length = max(max(starts) + 1, length - count)
            calls.append((-1, length))
        else:
            more = 1 if kind == "step" else count
            calls.append((length, length + more))
            length += more
    dealt = 0
    for first, stop in calls:
        if first < 0:
            dealt = min(dealt, stop)
            continue
        geometry = columns_of(starts, stop, first)
        if moved and any(row.q_start == row.q_stop for row in geometry.rows):
            with pytest.raises(ValueError, match="no query"):
                owners.asked(geometry.rows, dealt)
            return
        asked = owners.asked(geometry.rows, dealt)
        dealt = stop
        pairs = [pair for one, mine in zip(played, asked, strict=True) for pair in one.seen(mine)]
        wanted = {
            ((row, head), query - start, key)
            for row, start in enumerate(starts)
            for head in range(kv_heads)
            for query in range(max(first, start), stop)
            for key in range(query - start + 1)
        }
        assert len(pairs) == len(set(pairs)), "a pair is asked twice"
        assert set(pairs) == wanted, f"{len(set(pairs) ^ wanted)} pairs differ"
    for number, one in enumerate(played):
        ranges = owners.ranges(number, columns_of(starts, dealt, 0).rows, dealt)
        found = {
            lane: [at for run in runs for at in range(*run)]
            for tile, runs in ranges
            for lane in product(range(*tile[:2]), range(*tile[2:4]))
        }
        lengths = [dealt - start for start in starts]
        kept = {lane: [at for at in mine if at < lengths[lane[0]]] for lane, mine in one.held.items()}
        assert found == {lane: mine for lane, mine in kept.items() if mine}, "what it would be asked to fetch differs"


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5),
    stretches=st.lists(st.integers(1, 300), min_size=1, max_size=40),
)
def test_a_cut_lane_is_dealt_by_its_owners_parts_whatever_the_stretches(
    parts: list[float], stretches: list[int]
) -> None:
    lanes = CutLanes(Box(0, 1, 0, 1), dict(enumerate(parts)))
    stop = 0
    for stretch in stretches:
        stop += stretch
        lanes.deal(stop)
        for owner, part in lanes.parts.items():
            off = abs(lanes.held(owner, stop) - part / sum(parts) * stop)
            # Every long stretch is rounded, and a short one is one owner's.
            assert off <= 64 + len(stretches), f"owner {owner} is {off:.1f} keys off after {stop}"
            room = room_for(part / sum(parts), stop)
            assert lanes.held(owner, stop) <= room, f"owner {owner} holds more than the {room} it has room for"


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_one_prompt_have_the_same_owners(copies: int) -> None:
    rows = [Row(0, 50, 50, 2 * copies), Row(0, 80, 80, copies)]
    owners = Owners(rows, 3, [1.0, 1.0, 0.7], copies=copies)
    boxes = [box for number in range(3) for box, _ in owners.boxes(number)]
    assert all(not box.row_start % copies and not box.row_stop % copies for box in boxes), boxes
    swapped = [row // copies * copies + (row + 1) % copies for row in range(3 * copies)]
    assert owners.stay_together(swapped)
    assert not owners.stay_together(list(reversed(range(3 * copies))))
    assert not owners.stay_together(list(range(2 * copies)))


def test_lanes_are_whole_while_they_suffice() -> None:
    owners = Owners([Row(0, 4096, 4096, 16)], 8, [1.0, 1.0])
    assert owners.disjoint
    assert [sum(box.lanes for box in mine) for mine in owners.whole] == [64, 64]
