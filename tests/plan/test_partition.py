"""Every allowed pair belongs to exactly one share, and the shares are as even as blocks allow.

The reference is the mask written out pair by pair, for sizes where that is possible.
"""

import doctest
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise, product
from math import sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.plan import line as partition_module
from fapool_plugin.plan.line import Axis, Row, Share, Tile, allowed_pairs, partition, positions

AXES: list[Axis] = ["queries", "keys"]
MODES = ["line", "query_blocks"]


def pairs_of_row(row: Row) -> set[tuple[int, int]]:
    return {(query, key) for query in range(row.q_start, row.q_stop) for key in range(row.keys) if key <= query}


def apart(rows: Sequence[Row]) -> list[Row]:
    """One entry for each sequence."""
    return [row._replace(alike=1) for row in rows for _ in range(row.alike)]


def pairs_of_tile(tile: Tile) -> list[tuple[int, int, int, int]]:
    return [
        (row, head, query, key)
        for row in range(tile.row_start, tile.row_stop)
        for head in range(tile.head_start, tile.head_stop)
        for query in range(tile.q_start, tile.q_stop)
        for key in range(tile.k_start, tile.k_stop)
        if key <= query
    ]


def share_work(share: Share) -> int:
    return sum(allowed_pairs(tile) for tile in share)


def longest_counter_axis(rows: list[Row], axis: str) -> int:
    return max((row.keys if axis == "queries" else row.q_stop - row.q_start for row in rows), default=0)


@st.composite
def calls(draw, max_length=24, max_block=64):
    """The arguments of one call, as partition() takes them."""
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        past, new, future = draw(st.tuples(*[st.integers(0, max_length)] * 3))
        alike, column = draw(st.sampled_from([1, 1, 2, 5])), draw(st.sampled_from([0, 0, 3]))
        rows.append(Row(past, past + new, past + new + draw(st.sampled_from([0, future])), alike, column))
        rows += [rows[-1]] * draw(st.sampled_from([0, 0, 1]))
    speed = st.sampled_from([0, 1, 1, 1, 0.1, 0.3, 2.5, 7])
    speeds = draw(st.lists(speed, min_size=1, max_size=7).filter(any))
    if draw(st.booleans()):
        speeds = [1.0] * len(speeds)
    options = {
        "axis": draw(st.sampled_from(AXES)),
        "mode": draw(st.sampled_from(MODES)),
        "block": draw(st.one_of(st.integers(1, 5), st.integers(1, max_block))),
    }
    return rows, draw(st.integers(1, 3)), speeds, options


@settings(deadline=None, max_examples=600)
@given(calls())
def test_every_allowed_pair_is_covered_exactly_once(call):
    rows, kv_heads, speeds, options = call
    shares = partition(rows, kv_heads, speeds, **options)
    assert len(shares) == len(speeds)
    covered = Counter(pair for share in shares for tile in share for pair in pairs_of_tile(tile))
    expected = Counter(
        (index, head, query, key)
        for index, row in enumerate(apart(rows))
        for head in range(kv_heads)
        for query, key in pairs_of_row(row)
    )
    wrong = {pair: (covered[pair], expected[pair]) for pair in covered | expected}
    wrong = {pair: times for pair, times in wrong.items() if times[0] != times[1]}
    assert not wrong, f"{len(wrong)} pairs are wrong, by (times covered, times expected): {wrong}"
    for speed, share in zip(speeds, shares, strict=True):
        assert speed > 0 or share == (), f"a rank of speed 0 got {share}"


@settings(deadline=None, max_examples=150)
@given(calls())
def test_tiles_are_trimmed_to_what_their_queries_see(call):
    rows, kv_heads, speeds, options = call
    for tile in (tile for share in partition(rows, kv_heads, speeds, **options) for tile in share):
        seen = pairs_of_tile(tile)
        assert seen, f"{tile} holds no allowed pair"
        keys = [key for _, _, _, key in seen]
        needed = (min(keys), max(keys) + 1)
        assert needed == (tile.k_start, tile.k_stop), f"{tile} needs only the keys {needed}"
        if options["axis"] == "keys":
            row = apart(rows)[tile.row_start]
            assert (tile.q_start, tile.q_stop) == (row.q_start, row.q_stop), f"{tile} lacks queries of {row}"
        else:
            queries = {query for _, _, query, _ in seen}
            blind = set(range(tile.q_start, tile.q_stop)) - queries
            assert not blind, f"{tile}: the queries {blind} see no key"


@settings(deadline=None, max_examples=150)
@given(calls())
def test_line_shares_are_contiguous_and_in_line_order(call):
    rows, kv_heads, speeds, options = call
    options["mode"] = "line"
    line: list[tuple[int, ...]] = []
    columns = [row.column for row in apart(rows)]
    for share in partition(rows, kv_heads, speeds, **options):
        for tile in share:
            start, stop = tile[4:6] if options["axis"] == "queries" else tile[6:8]
            sequences, heads = range(tile.row_start, tile.row_stop), range(tile.head_start, tile.head_stop)
            line += product(sequences, heads, range(start, stop))
            assert len({columns[row] for row in sequences}) == 1, f"{tile} has rows at {columns}"
        for before, after in pairwise(share):
            neighbours = before[:2] == after[:2] and before.head_stop == after.head_start
            assert not (neighbours and before[4:] == after[4:]), f"{before} and {after} should be one tile"
    for point, following in pairwise(line):
        assert point < following, f"(row, head, position) {following} comes after {point} on the line"


@settings(deadline=None, max_examples=150)
@given(calls())
def test_a_share_of_equal_rows_is_five_tiles_at_most(call):
    rows, kv_heads, speeds, options = call
    for share in partition(rows[:1], kv_heads, speeds, **options | {"mode": "line"}):
        assert len(share) <= 5, f"{share}"


@pytest.mark.parametrize("speeds", [[1, 1, 1], [1, 2, 0.5]])
def test_lanes_of_a_large_batch_are_not_cut(speeds):
    row = Row(99, 100, 100, alike=200)
    shares = partition([row], 1, speeds, axis="keys", block=1)
    assert {(tile.k_start, tile.k_stop) for share in shares for tile in share} == {(0, 100)}, f"{shares}"
    off = [sum(t.lanes for t in share) - 200 * x / sum(speeds) for share, x in zip(shares, speeds, strict=True)]
    assert max(map(abs, off)) <= 1, f"shares are off by {off} lanes"
    few = partition([row._replace(alike=100)], 1, speeds, axis="keys", block=1)
    assert len({tile[6:] for share in few for tile in share}) > 1, "lanes of a small batch are cut"


@settings(deadline=None, max_examples=300)
@given(calls(max_length=5000))
def test_no_share_exceeds_its_fair_part_by_more_than_a_block(call):
    rows, kv_heads, speeds, options = call
    works = [share_work(share) for share in partition(rows, kv_heads, speeds, **options)]
    total = sum(works)
    lanes = kv_heads * len(apart(rows)) if options["mode"] == "query_blocks" else 1
    fine = [row.pairs for row in rows if row.pairs * 64 * len(speeds) <= total]
    slack = max([options["block"] * longest_counter_axis(rows, options["axis"]) * lanes, *fine])
    excess = [work - speed / sum(speeds) * total for work, speed in zip(works, speeds, strict=True)]
    # Half a block, or half a lane that is not cut, for each of a share's two ends: no percentage on top.
    assert max(excess) <= slack + 1e-9 * total, f"largest excess {max(excess)} of {total} pairs, allowed {slack}"


@settings(deadline=None, max_examples=300)
@given(
    sequences=st.integers(1, 3),
    head_start=st.integers(0, 2),
    lanes=st.integers(1, 3),
    ranges=st.tuples(*[st.integers(0, 20)] * 4),
)
def test_allowed_pairs_counts_what_the_mask_allows(sequences, head_start, lanes, ranges):
    q_start, queries, k_start, keys = ranges
    tile = Tile(3, 3 + sequences, head_start, head_start + lanes, q_start, q_start + queries, k_start, k_start + keys)
    expected = len(pairs_of_tile(tile))
    actual = allowed_pairs(tile)
    assert actual == expected, f"{tile}: {actual} pairs, by counting {expected}"


def test_allowed_pairs_is_exact_for_a_million_tokens():
    n = 1_000_003
    assert allowed_pairs(Tile(0, 1, 0, 5, 0, n, 0, n)) == 5 * n * (n + 1) // 2


@pytest.mark.parametrize("axis", AXES)
def test_query_blocks_cut_every_lane_at_the_same_fractions(axis):
    rows, speeds, block = [Row(0, 1000, 1000), Row(300, 500, 500), Row(0, 70, 70)], [1, 3, 2], 8
    shares = partition(rows, 4, speeds, axis=axis, mode="query_blocks", block=block)
    for index, row in enumerate(rows):
        works = [share_work(tuple(t for t in share if t.row_start == index)) for share in shares]
        slack = 4 * block * longest_counter_axis([row], axis)
        excess = [work - sum(works) * speed / sum(speeds) for work, speed in zip(works, speeds, strict=True)]
        largest = max(map(abs, excess))
        assert largest <= slack, f"row {index}: {largest} pairs off the fractions, allowed {slack}"
    merged = all(tile[:4] == (tile.row_start, tile.row_start + 1, 0, 4) for share in shares for tile in share)
    assert merged, f"each share should have one tile of all heads for a row: {shares}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("speeds", [[1, 1, 1, 1, 1], [0.2, 0.5, 0.3]])
def test_cuts_inside_a_lane_fall_on_multiples_of_block(mode, axis, block, speeds):
    rows = [Row(17, 1234, 1234), Row(0, 333, 333), Row(900, 1001, 1001)]
    for share in partition(rows, 1, speeds, axis=axis, mode=mode, block=block):
        for tile in share:
            row = rows[tile.row_start]
            begin = tile.q_start - row.q_start if axis == "queries" else tile.k_start
            assert begin % block == 0, f"{tile} of {row} begins at {begin}, no multiple of {block}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("percent", "cut"), [(4, 0), (34, 30), (36, 40), (94, 90), (96, 100)])
def test_a_cut_goes_to_the_nearest_multiple_of_block(mode, percent, cut):
    shares = partition([Row(99, 100, 100)], 1, [percent, 100 - percent], axis="keys", mode=mode, block=10)
    parts = [(0, cut), (cut, 100)]
    assert shares == [(Tile(0, 1, 0, 1, 99, 100, *part),) if part[0] < part[1] else () for part in parts]


def test_a_causal_lane_is_cut_at_equal_area():
    n, p = 100_000, 5
    shares = partition([Row(0, n, n)], 1, [1] * p, block=1)
    ends = [share[-1].q_stop for share in shares]
    off = [abs(end - n * sqrt((i + 1) / p)) for i, end in enumerate(ends)]
    assert max(off) <= 1.5, f"cuts {ends} are up to {max(off)} positions off n * sqrt(f)"
    keys = [share[-1].k_stop for share in shares]
    assert keys == ends, f"causal tiles that end at queries {ends} need that many keys, not {keys}"


@pytest.mark.parametrize("mode", MODES)
def test_decode_cuts_the_keys(mode):
    shares = partition([Row(999, 1000, 1000)], 1, [1, 1, 2], axis="keys", mode=mode, block=10)
    assert shares == [
        (Tile(0, 1, 0, 1, 999, 1000, 0, 250),),
        (Tile(0, 1, 0, 1, 999, 1000, 250, 500),),
        (Tile(0, 1, 0, 1, 999, 1000, 500, 1000),),
    ]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("speeds", [[1, 1, 1], [0.1, 0.1, 0.1], [1 / 3, 1 / 3, 1 / 3]])
def test_whole_heads_first(axis, speeds):
    shares = partition([Row(0, 777, 777)], 3, speeds, axis=axis)
    assert shares == [(Tile(0, 1, head, head + 1, 0, 777, 0, 777),) for head in range(3)]


def test_adjacent_whole_heads_are_one_tile():
    shares = partition([Row(0, 100, 100), Row(0, 50, 50)], 8, [1], block=16)
    assert shares == [(Tile(0, 1, 0, 8, 0, 100, 0, 100), Tile(1, 2, 0, 8, 0, 50, 0, 50))]


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 40), st.integers(1, 40), st.floats(0.001, 0.999), st.sampled_from(AXES), st.integers(1, 9))
def test_a_cut_is_the_nearest_of_all(past, new, part, axis, block):
    """Against every multiple of the block, its pairs counted one by one."""
    row = Row(past, past + new, past + new)
    pairs, first = pairs_of_row(row), row.q_start if axis == "queries" else 0
    extent = new if axis == "queries" else past + new
    before = {
        cut: sum((query if axis == "queries" else key) - first < cut for query, key in pairs)
        for cut in {*range(0, extent, block), extent}
    }
    least = min(abs(work - part * len(pairs)) for work in before.values())
    off = abs(before[positions(row, [part], axis, block)[0]] - part * len(pairs))
    assert off <= least + 1e-6, f"{off} pairs off the ideal, the nearest cut is {least} off"


@st.composite
def prompts(draw, max_length=30, max_block=6):
    """A causal prompt of uneven sequences, padded on either side, its runs of columns, and how it is shared out."""
    edges = list(pairwise([0, *accumulate(draw(st.lists(st.integers(1, max_length), min_size=1, max_size=4)))]))
    bounds = [sorted(draw(st.tuples(*[st.integers(0, edges[-1][1])] * 2))) for _ in range(draw(st.integers(1, 4)))]
    runs = [[row_in(run, row) for row in bounds] for run in edges]
    speeds = draw(st.lists(st.sampled_from([0, 1, 1, 0.3, 2.5]), min_size=1, max_size=4).filter(any))
    whole = [Row(0, stop - start, stop - start) for start, stop in bounds]
    return whole, runs, draw(st.integers(1, 3)), speeds, draw(st.integers(1, max_block))


def row_in(columns: tuple[int, int], bounds: Sequence[int]) -> Row:
    """A run of columns of a row with these bounds."""
    first, last = (min(max(column, bounds[0]), bounds[1]) - bounds[0] for column in columns)
    return Row(first, last, last)


def by_lane(shares: list[Share]) -> dict[tuple[int, int, int], Tile]:
    """Every tile by (rank, row, head)."""
    tiles = [(rank, tile) for rank, share in enumerate(shares) for tile in share]
    return {(rank, *lane): tile for rank, tile in tiles for lane in product(range(*tile[:2]), range(*tile[2:4]))}


def fractions_by_hand(whole: list[Row], kv_heads: int, speeds: list[float]) -> dict[tuple[int, int, int], tuple]:
    """By (rank, row, head): from and to which part of the lane's pairs the rank's share of the line goes."""
    heads = range(kv_heads)
    lanes = {(i, head): row.keys * (row.keys + 1) // 2 for i, row in enumerate(whole) if row.keys for head in heads}
    exact = [Fraction(speed) / sum(map(Fraction, speeds)) * sum(lanes.values()) for speed in speeds]
    ends = [sum(exact[:count], Fraction(0)) for count in range(len(speeds) + 1)]
    found: dict[tuple[int, int, int], tuple] = {}
    for lane, count in lanes.items():
        cuts = [min(max(end / count, Fraction(0)), Fraction(1)) for end in ends]
        found |= {(rank, *lane): cut for rank, cut in enumerate(pairwise(cuts)) if cut[0] < cut[1]}
        ends = [end - count for end in ends]
    return found


@settings(deadline=None, max_examples=120)
@given(prompts())
def test_every_run_of_a_prompt_is_covered_exactly_once(prompt):
    whole, runs, kv_heads, speeds, block = prompt
    for rows, axis in product(runs, AXES):
        shares = partition(rows, kv_heads, speeds, axis=axis, block=block, whole=whole)
        covered = Counter(pair for share in shares for tile in share for pair in pairs_of_tile(tile))
        lanes = product(enumerate(rows), range(kv_heads))
        expected = Counter((i, head, *pair) for (i, row), head in lanes for pair in pairs_of_row(row))
        assert covered == expected, f"{rows}: {covered - expected} too much, {expected - covered} missing"


@settings(deadline=None, max_examples=120)
@given(prompts())
def test_a_rank_has_the_lanes_of_the_whole_line_in_every_run(prompt):
    """Whole lanes in every run, no tile in a lane of others, and parts of a shared one at equal area."""
    whole, runs, kv_heads, speeds, block = prompt
    owned = fractions_by_hand(whole, kv_heads, speeds)
    for rows in runs:
        tiles = by_lane(partition(rows, kv_heads, speeds, block=block, whole=whole))
        assert not tiles.keys() - owned.keys(), f"{tiles} in other lanes than in the whole prompt, {owned}"
        for lane, fractions in owned.items():
            # The positions below c have c (c + 1) / 2 pairs, less those before the run.
            before, after = (edge * (edge + 1) / 2 for edge in (rows[lane[1]].q_start, rows[lane[1]].q_stop))
            ideal = [(sqrt(1 + 8 * (before + float(part) * (after - before))) - 1) / 2 for part in fractions]
            if lane not in tiles:
                assert ideal[1] - ideal[0] <= 2 * block, f"{lane} has no tile in {rows}, ideally {ideal}"
                continue
            off = max(abs(edge - wanted) for edge, wanted in zip(tiles[lane][4:6], ideal, strict=True))
            assert off <= block, f"{tiles[lane]} is off the ideal {ideal} by {off}"
            assert tiles[lane].k_stop == tiles[lane].q_stop, f"{tiles[lane]} is sent keys that it does not need"


@pytest.mark.parametrize("speeds", [[1, 1], [1, 1, 1], [0.4, 0.4, 0.2]])
@pytest.mark.parametrize("lengths", [[1600], [1600, 900], [300, 1600, 1500]])
def test_runs_need_the_keys_that_the_whole_prompt_needs(lengths, speeds):
    """The same where a lane ends with the rank; else those of the last run's cut, c^2 = f n^2 + (1 - f) s^2."""
    whole, columns, runs = [Row(0, n, n) for n in lengths], max(lengths), 8
    tiles: list[tuple[tuple[int, int, int], Tile]] = []
    for edges in pairwise(range(0, columns + 1, columns // runs)):
        rows = [row_in(edges, (columns - n, columns)) for n in lengths]  # padded on the left
        tiles += by_lane(partition(rows, 3, speeds, block=1, whole=whole)).items()
    furthest = {lane: max(tile.k_stop for other, tile in tiles if other == lane) for lane, _ in tiles}
    owned = fractions_by_hand(whole, 3, speeds)
    assert furthest.keys() == owned.keys()
    for lane, (_, part) in owned.items():
        n, s = lengths[lane[1]], max(0, lengths[lane[1]] - columns // runs)
        ideal = sqrt(part * n**2 + (1 - part) * s**2)
        assert abs(furthest[lane] - ideal) <= 1.5, f"{lane} is sent {furthest[lane]} keys, ideally {ideal}"


def test_runs_follow_the_prompt_not_their_own_lengths():
    """Late in the prompt only one row has tokens; still it belongs to the rank that has had it from the start."""
    whole = [Row(0, 100, 100), Row(0, 100, 100)]
    late = [Row(100, 100, 100), Row(50, 100, 100)]
    assert partition(late, 2, [1, 1], whole=whole) == [(), (Tile(1, 2, 0, 2, 50, 100, 0, 100),)]
    assert partition(late, 2, [1, 1]) == [(Tile(1, 2, 0, 1, 50, 100, 0, 100),), (Tile(1, 2, 1, 2, 50, 100, 0, 100),)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [[], [Row(0, 0, 0)], [Row(5, 5, 9)]])
def test_a_call_without_work_has_empty_shares(rows, mode):
    assert partition(rows, 2, [1, 1, 1], mode=mode) == [(), (), ()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [Row(0, 4, 4), Row(-1, 4, 4)]}, r"row 1 has queries \[-1, 4\)"),
        ({"rows": [Row(4, 3, 4)]}, r"row 0 has queries \[4, 3\) and 4 keys"),
        ({"rows": [Row(0, 0, -2)]}, "-2 keys"),
        ({"rows": [Row(0, 4, 4, 0)]}, "for 1 sequence or more"),
        ({"rows": [Row(0, 5, 4)]}, r"queries \[0, 5\) and 4 keys.*keys, too"),
        ({"whole": [Row(4, 4, 4)]}, "row 0 has queries here and none in whole"),
        ({"whole": []}, "whole has 0 rows, the call 1"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"speeds": []}, r"speeds are \[\]"),
        ({"speeds": [0, 0.0]}, "at least one above 0"),
        ({"speeds": [1.0, float("nan")]}, "nan"),
        ({"speeds": [float("inf"), 1.0]}, "inf"),
        ({"speeds": [1.0, -0.5]}, r"-0\.5"),
        ({"block": 0}, "block is 0"),
        ({"mode": "rows"}, "mode is 'rows'.*query_blocks"),
        ({"axis": "heads"}, "axis is 'heads'.*queries"),
    ],
)
def test_bad_input_is_refused_with_its_numbers(changes, message):
    call = {"rows": [Row(0, 4, 4)], "kv_heads": 2, "speeds": [1.0], **changes}
    with pytest.raises(ValueError, match=message):
        partition(**call)


def test_the_examples_in_the_docstrings():
    failed, attempted = doctest.testmod(partition_module)
    assert attempted >= 2, f"only {attempted} examples found"
    assert failed == 0, f"{failed} of {attempted} examples print something else"
