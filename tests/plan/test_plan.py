"""Plans: geometry against the mask it stands for, and what a rank is asked for against what it holds."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.plan.line import Row, Tile
from fapool_plugin.plan.shares import Geometry, Plan, make_plan, shortened, speeds, within_residency


def test_geometry_turns_columns_into_positions() -> None:
    # Two past columns and five new ones; row 0 has one column of padding on the left, row 1 two on the right.
    geometry = Geometry(starts=(1, 0, 4), stops=(7, 5, 7), q_column=2, columns=7)
    assert geometry.rows == [Row(1, 6, 6, 1, 1), Row(2, 5, 5), Row(0, 3, 3, 1, 4)]
    assert geometry.longest == 6
    tile = Tile(row_start=2, row_stop=3, head_start=0, head_stop=1, q_start=0, q_stop=3, k_start=0, k_stop=3)
    assert geometry.q_slice(tile) == slice(2, 5)
    assert geometry.k_slice(tile, 0, 3) == slice(4, 7)
    assert Geometry((0,), (2,), 2, 5).rows == [Row(2, 2, 2)], "a row whose new columns are all padding asks nothing"
    assert Geometry((5,), (5,), 0, 5).rows == [Row(0, 0, 0, 1, 5)]
    assert Geometry((0, 0, 1, 0), (5, 5, 5, 5), 4, 5).rows == [Row(4, 5, 5, 2), Row(3, 4, 4, 1, 1), Row(4, 5, 5)]
    assert Geometry((), (), 0, 0).rows == []


def test_shares_of_the_base() -> None:
    assert speeds(3, None) == [0.25] * 4
    assert speeds(2, 0.2) == [0.4, 0.4, 0.2]
    assert speeds(2, 0.0)[-1] == 0


@pytest.mark.parametrize("mode", ["line", "query_blocks"])
def test_prefill_is_cut_along_queries_and_decode_along_keys(mode: str) -> None:
    prefill = make_plan(Geometry((0,), (4000,), 0, 4000), 3, [1, 1, 1], mode=mode)  # type: ignore[arg-type]
    decode = make_plan(Geometry((0,), (4001,), 4000, 4001), 3, [1, 1, 1], mode=mode)  # type: ignore[arg-type]
    assert (prefill.axis, decode.axis) == ("queries", "keys")
    for share in (*prefill.shares, prefill.base):
        assert all(tile.k_start == 0 and tile.k_stop == tile.q_stop for tile in share)
    for share in (*decode.shares, decode.base):
        assert all((tile.q_start, tile.q_stop) == (4000, 4001) for tile in share)


def test_prefill_residency_covers_the_first_decode_step() -> None:
    """The same fractions of the same line: a decode step after a prompt needs no keys to move."""
    for ranks in (1, 2, 3, 5):
        for heads in (1, 3, 4):
            prefill = make_plan(Geometry((0,), (5000,), 0, 5000), heads, [1.0] * (ranks + 1))
            decode = make_plan(Geometry((0,), (5001,), 5000, 5001), heads, [1.0] * (ranks + 1))
            for before, after in zip(prefill.shares, decode.shares, strict=True):
                held = {h: t.k_stop for t in before for h in range(t.head_start, t.head_stop)}
                for tile in after:
                    for head in range(tile.head_start, tile.head_stop):
                        assert min(tile.k_stop, 5000) <= held.get(head, 0), (ranks, heads, tile, before)


@settings(deadline=None, max_examples=200)
@given(
    axis=st.sampled_from(["queries", "keys"]),
    k_start=st.integers(0, 50),
    width=st.integers(1, 50),
    have=st.integers(0, 120),
    block=st.integers(1, 16),
)
def test_every_key_of_a_share_is_asked_or_left(axis: str, k_start: int, width: int, have: int, block: int) -> None:
    tile = Tile(0, 1, 0, 1, 90, 100, k_start, k_start + width)
    requests, left = within_residency([(tile, have)], axis, block)  # type: ignore[arg-type]
    covered = [k for r in requests for k in range(r.tile.k_start, r.tile.k_stop)]
    covered += [k for t in left for k in range(t.k_start, t.k_stop)]
    assert sorted(covered) == list(range(tile.k_start, tile.k_stop))
    for tile_asked, key_start, key_stop, _ in requests:
        assert key_start <= have, "assumes more than is held"
        assert max(have, key_stop) >= tile_asked.k_stop, "asks for keys that are neither held nor sent"
        if axis == "keys":
            assert (key_stop - key_start) % block == 0, "sends less than a block"


def test_a_decode_step_sends_no_keys_until_a_block_is_full() -> None:
    sent = []
    have = 1000
    for step in range(1, 65):
        tile = Tile(0, 1, 0, 1, 1000 + step - 1, 1000 + step, 0, 1000 + step)
        requests, _ = within_residency([(tile, have)], "keys", 32)
        (request,) = requests
        sent.append(request.key_stop - request.key_start)
        have = max(have, request.key_stop)
    assert [step + 1 for step, n in enumerate(sent) if n] == [32, 64]
    assert sum(sent) == 64


@given(
    starts=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    prompt=st.integers(1, 3),
    ranks=st.integers(0, 3),
    heads=st.integers(1, 4),
    keys=st.integers(1, 40),
)
def test_a_decode_step_finds_its_prompt_whatever_rows_are_alike(
    starts: list[int], prompt: int, ranks: int, heads: int, keys: int
) -> None:
    """Rows are joined where both their prompts and their steps are alike; a whole lane stays with its rank."""
    columns = max(starts) + keys + prompt
    stops = tuple(columns - index % 2 for index in range(len(starts)))
    before = Geometry(tuple(starts), stops, 0, columns)
    step = Geometry(tuple(starts), tuple(stop + 1 for stop in stops), columns, columns + 1)
    parts = speeds(ranks, None)
    plans = [make_plan(before, heads, parts), make_plan(step, heads, parts, prompt=before.rows)]
    assert plans[1].axis == "keys" or not any(row.q_start < row.q_stop for row in step.rows)

    def ranks_of(plan: Plan) -> dict[tuple[int, int], set[int]]:
        found: dict[tuple[int, int], set[int]] = {}
        for rank, share in enumerate((*plan.shares, plan.base)):
            for lane in (lane for tile in share for lane in product(range(*tile[:2]), range(*tile[2:4]))):
                found.setdefault(lane, set()).add(rank)
        return found

    before_ranks, after_ranks = map(ranks_of, plans)
    for lane, now in after_ranks.items():
        known = before_ranks[lane]
        assert len(now) > 1 or len(known) > 1 or now == known, f"{lane} was with {known} and is with {now}"


@given(part=st.floats(0, 1), ranks=st.integers(1, 4), heads=st.integers(1, 4), keys=st.integers(1, 300))
def test_a_shortened_plan_covers_the_same_keys_and_needs_no_others(
    part: float, ranks: int, heads: int, keys: int
) -> None:
    plan = make_plan(Geometry((0,), (keys + 1,), keys, keys + 1), heads, speeds(ranks, 0.2))
    short = shortened(plan, part, 8)

    def covered(tiles: list[Tile]) -> list[tuple[int, int]]:
        return sorted(
            (h, k) for t in tiles for h in range(t.head_start, t.head_stop) for k in range(t.k_start, t.k_stop)
        )

    assert covered([t for s in (*short.shares, short.base) for t in s]) == covered(
        [t for s in (*plan.shares, plan.base) for t in s]
    )
    for before, after in zip(plan.shares, short.shares, strict=True):
        assert set(covered(list(after))) <= set(covered(list(before)))
        assert sum(t.k_stop - t.k_start for t in after) <= part * sum(t.k_stop - t.k_start for t in before) + 1e-6
