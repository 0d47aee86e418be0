"""Predictions against a slow clock that walks through real tiles, and what must hold for every profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.plan.clocks import Prefill, Way
from fapool_plugin.plan.forecast import SLACK, Choice, Cores, auto_threshold, choose_decode, choose_prefill
from fapool_plugin.plan.line import Row, partition
from fapool_plugin.plan.profile import (
    AttentionCost,
    CallCost,
    Fit,
    LinearCost,
    LinkCost,
    Machine,
    Profile,
    Shape,
)
from tests.walked_plan import GROUP, HEAD_DIM, KV_HEADS, LAYERS, V_HEAD_DIM, blocks_of, bytes_of, walked_s

FREE = LinkCost(to_rank=Fit(), to_base=Fit())
SLOW = LinkCost(to_rank=Fit(b=1e3), to_base=Fit(b=1e3))
DEVICES = Cores(total=1, per_rank=0)


def profile(
    attention: Fit,
    linear: Fit,
    link: LinkCost,
    *,
    decode: tuple[Fit, Fit] = (Fit(b=1e-7), Fit(b=1e-3)),
    cores: int = 64,
) -> Profile:
    """Costs with one thread; with two everything takes half as long."""

    def scaled(fit: Fit, threads: int) -> Fit:
        return Fit(a=fit.a, b=fit.b / threads, c=fit.c / threads)

    return Profile(
        date="2026-01-01",
        quick=False,
        machine=Machine(processor="any", cores=cores, torch="2", fapool="0"),
        shape=Shape(
            hidden=64,
            layers=LAYERS,
            heads=KV_HEADS * GROUP,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            v_head_dim=V_HEAD_DIM,
            dtype="bfloat16",
            parameters=1,
        ),
        attention=tuple(
            AttentionCost(
                kernel="torch", dtype="bfloat16", threads=t, prefill=scaled(attention, t), decode=scaled(decode[0], t)
            )
            for t in (1, 2)
        ),
        linear=tuple(LinearCost(threads=t, prefill=scaled(linear, t), decode=scaled(decode[1], t)) for t in (1, 2)),
        link=link,
        activation_s=0.001,
    )


ATTENTION, LINEAR = Fit(a=1e-5, b=1e-7, c=4e-9), Fit(a=1e-3, b=2e-5)
LINK = LinkCost(
    to_rank=Fit(a=2e-5, b=2e-10), to_base=Fit(a=3e-5, b=3e-10), send=Fit(a=1e-5, b=1e-10), take=Fit(a=1.5e-5, b=1.2e-10)
)
CALL = CallCost(ask_s=1.1e-5, merge_s=1.3e-5, own_s=7e-6, rank_s=9e-6, away_s=5e-6)
TYPICAL = profile(ATTENTION, LINEAR, LINK).model_copy(update={"call": CALL, "beside": 1.05})


def fits(high_a: float, high_b: float, high_c: float) -> st.SearchStrategy[Fit]:
    return st.builds(Fit, a=st.floats(0, high_a), b=st.floats(1e-9, high_b), c=st.floats(1e-12, high_c))


LINKS = st.builds(LinkCost, **dict.fromkeys(("to_rank", "to_base", "send", "take"), fits(1e-3, 1e-8, 1e-12)))
CALLS = st.builds(CallCost, **dict.fromkeys(("ask_s", "merge_s", "own_s", "rank_s", "away_s"), st.floats(0, 1e-3)))
PROFILES = st.builds(
    lambda call, **costs: profile(**costs).model_copy(update={"call": call}),
    CALLS,
    attention=fits(1e-4, 1e-6, 1e-8),
    linear=fits(1e-2, 1e-4, 0 + 1e-9),
    link=LINKS,
    cores=st.integers(1, 8),
)
LENGTHS = st.lists(st.integers(1, 6000), min_size=1, max_size=3)
CORES = st.builds(Cores, total=st.integers(1, 4), per_rank=st.integers(0, 2))


def prompts_of(lengths: Sequence[int]) -> list[Row]:
    return [Row(0, n, n) for n in lengths]


def steps_of(lengths: Sequence[int]) -> list[Row]:
    """One new token after a past."""
    return [Row(n - 1, n, n) for n in lengths]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("blocks", [1, 2, 5, 8])
@pytest.mark.parametrize("share", [0.0, 0.13, 0.5])
@pytest.mark.parametrize("lengths", [(8192,), (6000, 4001)])
def test_the_two_clocks_agree_with_a_walk_through_real_tiles(ranks, blocks, share, lengths) -> None:
    rows = [Row(0, n, n) for n in lengths]
    predicted = Prefill(TYPICAL, rows, DEVICES).play(Way(ranks, blocks, share)).seconds
    expected = walked_s(TYPICAL, rows, ranks, blocks, share, DEVICES)
    off = abs(predicted / expected - 1)
    assert off < 0.005, f"predicted {predicted}, walked {expected}, {off:.2%} off"


def test_no_way_of_a_grid_is_better() -> None:
    cores = Cores(total=4, per_rank=1)
    for length in (1500, 4096):
        found = choose_prefill(TYPICAL, prompts_of([length]), ranks=3, cores=cores, max_blocks=6)
        rows = [Row(0, length, length)]
        ways = [(p, c, x / 20) for p in (1, 2, 3) for c in range(1, min(6, length // 64) + 1) for x in range(20)]
        least, way = min((walked_s(TYPICAL, rows, *way, cores), way) for way in ways)
        least = min(least, found.alone_s)
        assert found.seconds <= least * 1.01, f"predicted {found}, but {way} takes {least}"


@pytest.mark.parametrize(
    ("blocks", "share", "seconds"), [(1, 0.0, 52.7), (2, 0.0, 36.0), (2, 0.12, 32.9), (8, 0.13, 28.2), (8, 0.15, 27.1)]
)
def test_runs_of_a_known_machine_come_out_near(blocks: int, share: float, seconds: float) -> None:
    """Thirty layers, 8192 tokens: 23 s linear and 30 s attention on one thread, as once measured with these blocks."""
    machine = profile(Fit(c=30 / 30 / 8192**2), Fit(b=23 / 8192), LINK, cores=2)
    machine = machine.model_copy(update={"shape": machine.shape.model_copy(update={"layers": 30})})
    cores = Cores(total=2, per_rank=1)
    found = choose_prefill(
        machine, prompts_of([8192]), ranks=1, cores=cores, max_blocks=blocks, base_share=share, alone=False
    )
    free = choose_prefill(machine, prompts_of([8192]), ranks=1, cores=cores, max_blocks=8, alone=False)
    assert abs(found.seconds / seconds - 1) < 0.06, f"predicted {found.seconds:.1f} s, measured {seconds} s"
    assert 0.10 <= free.base_share <= 0.16, f"chose {free}"


@settings(max_examples=60, deadline=None)
@given(PROFILES, LENGTHS, st.integers(0, 4), CORES, st.integers(1, 8), st.booleans())
def test_never_below_the_ceiling_and_never_worse_with_more_ranks(told, lengths, ranks, cores, blocks, alone) -> None:
    fewer, more = (
        choose_prefill(told, prompts_of(lengths), ranks=p, cores=cores, max_blocks=blocks, alone=alone or p == 0)
        for p in (ranks, ranks + 1)
    )
    assert fewer.seconds >= fewer.ceiling_s * (1 - 1e-9), f"{fewer}"
    if alone or ranks:
        assert more.seconds <= fewer.seconds * (1 + SLACK), f"{ranks} ranks {fewer}, one more {more}"
    if alone:
        assert fewer.seconds <= fewer.alone_s
    assert max(fewer.base_busy_s, fewer.pool_busy_s) <= fewer.seconds * (1 + 1e-9), f"{fewer}"


@settings(max_examples=60, deadline=None)
@given(PROFILES, LENGTHS, st.data())
def test_decode_keeps_the_same_promises(told, lengths, data) -> None:
    cores, ranks = data.draw(CORES), data.draw(st.integers(0, 3))
    held = [data.draw(st.integers(0, KV_HEADS * sum(lengths))) for _ in range(ranks + 1)]
    fewer, more = (
        choose_decode(told, steps_of(lengths), ranks=p, cores=cores, resident=held) for p in (ranks, ranks + 1)
    )
    assert fewer.ceiling_s * (1 - 1e-9) <= fewer.seconds <= fewer.alone_s, f"{fewer}"
    assert more.seconds <= fewer.seconds, f"{ranks} ranks {fewer}, one more {more}"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 5), st.floats(0, 0.9))
def test_bytes_are_those_of_the_tiles(lengths, ranks, blocks, share) -> None:
    rows = [Row(0, n, n) for n in lengths]
    found = Prefill(TYPICAL, rows, DEVICES).real_bytes(Way(ranks, blocks, share))
    speeds = [(1 - share) / ranks] * ranks + [share]
    shares = []
    for part in blocks_of(rows, blocks):
        coarse = max(row.q_stop - row.q_start for row in part) >= 256 * (ranks + 1)
        shares.append(partition(part, KV_HEADS, speeds, block=64 if coarse else 1, whole=rows))
    counts = [bytes_of(shares, rank) for rank in range(ranks)]
    expected = tuple(LAYERS * sum(side) for side in zip(*counts, strict=True))
    assert found == expected, f"{found}, tiles say {expected}"


def test_the_ceiling_is_the_best_balance() -> None:
    told = TYPICAL.model_copy(update={"link": FREE})
    attention, linear = LAYERS * told.attention_for(1).prefill.c, told.linear_for(1).prefill
    for length, ranks in ((1024, 1), (65536, 1), (65536, 4), (131072, 2)):
        work = (attention * length + LAYERS * ATTENTION.b) * length
        expected = min(
            max(linear.at(length) + x * work, (1 - x) * work / ranks) for x in (i / 4096 for i in range(4096))
        )
        found = Prefill(told, [Row(0, length, length)], DEVICES).ceiling_s(ranks)
        assert found == pytest.approx(expected, rel=1e-3), f"{ranks} ranks, {length} tokens"


def test_blocks_that_cost_nearly_nothing_are_taken() -> None:
    found = choose_prefill(TYPICAL, prompts_of([32768]), ranks=2, cores=DEVICES, max_blocks=8)
    by_blocks = {
        blocks: min(Prefill(TYPICAL, [Row(0, 32768, 32768)], DEVICES).play(Way(2, blocks, x / 100)) for x in range(100))
        for blocks in range(1, 9)
    }
    least = min(played.seconds for played in by_blocks.values())
    near = [blocks for blocks, played in by_blocks.items() if played.seconds <= least * (1 + SLACK)]
    assert found.blocks == max(near), f"{found}, {by_blocks}"
    assert found.seconds <= least * (1 + SLACK)


def test_links_decide() -> None:
    kwargs: dict[str, Any] = {"ranks": 4, "cores": DEVICES}
    slow, free = (TYPICAL.model_copy(update={"link": link}) for link in (SLOW, FREE))
    held = [KV_HEADS * 8192 // 4] * 4
    assert choose_prefill(slow, prompts_of([8192]), max_blocks=8, **kwargs).ranks == 0
    assert choose_prefill(free, prompts_of([8192]), max_blocks=8, **kwargs).ranks == 4
    assert choose_decode(slow, steps_of([8192]), resident=held, **kwargs).ranks == 0
    assert choose_decode(free, steps_of([8192]), resident=held, **kwargs).ranks == 4


def test_slow_ranks_get_less_and_the_base_more() -> None:
    kwargs: dict[str, Any] = {"ranks": 2, "cores": DEVICES, "max_blocks": 8, "alone": False}
    even, slow = (
        choose_prefill(TYPICAL, prompts_of([8192]), slowdown=factors, **kwargs) for factors in ((), (3.0, 3.0))
    )
    assert slow.base_share > even.base_share, f"{slow}, without slowdown {even}"
    assert slow.seconds > even.seconds


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-6, 1e-4), st.floats(1e-10, 1e-8), st.floats(1e-6, 1e-3), st.floats(1e-11, 1e-9))
def test_ranks_grow_with_length(linear_b: float, attention_c: float, link_a: float, link_b: float) -> None:
    link = LinkCost(to_rank=Fit(a=link_a, b=link_b), to_base=Fit(a=link_a, b=link_b))
    told = profile(Fit(a=1e-5, c=attention_c), Fit(a=1e-3, b=linear_b), link)
    lengths = (512, 2048, 8192, 32768, 131072)

    def choice(n: int, most: int) -> Choice:
        # With blocks in flight it need not: fewer ranks are enough once they work beside the base, not after it.
        return choose_prefill(told, prompts_of([n]), ranks=most, cores=DEVICES, max_blocks=1)

    chosen = [choice(n, 5) for n in lengths]
    for at, (n, one) in enumerate(zip(lengths, chosen, strict=True)):
        fewest = min(later.ranks for later in chosen[at:])
        # Shares are whole lanes and hundredths: a rank more or less may be a near-tie.
        assert fewest == one.ranks or choice(n, fewest).seconds <= 1.005 * one.seconds, f"{n} tokens: {chosen}"


def test_thresholds_are_the_first_lengths_that_hold() -> None:
    cores = Cores(total=2, per_rank=0)
    found = auto_threshold(TYPICAL, ranks=1, cores=cores, longest=32768, max_blocks=8)

    def choice(n: int) -> Choice:
        return choose_prefill(TYPICAL, prompts_of([n]), ranks=1, cores=cores, max_blocks=8, alone=False)

    def excess_s(n: int) -> float:
        """Attention_Time - FFN_Time - Overhead."""
        way, attention, linear = choice(n), TYPICAL.attention_for(2).prefill, TYPICAL.linear_for(2).prefill
        calls = LAYERS * way.blocks * way.ranks
        moved = Prefill(TYPICAL, prompts_of([n]), cores).real_bytes(way.way)
        sent = calls * LINK.to_rank.a + LINK.to_rank.b * moved[0]
        back = calls * LINK.to_base.a + LINK.to_base.b * moved[1]
        return LAYERS * attention.at(n) - linear.at(n) - sent - back - TYPICAL.activation_s

    lengths = range(64, 32769, 64)
    assert found.auto == next(n for n in lengths if excess_s(n) > 0)
    assert found.crossing == next(n for n in lengths if choice(n).seconds < choice(n).alone_s)
    never = auto_threshold(TYPICAL.model_copy(update={"link": SLOW}), ranks=1, cores=cores, longest=4096, max_blocks=8)
    assert (never.auto, never.crossing) == (None, None)


def test_cores_move_and_crowd() -> None:
    cores = Cores(total=4, per_rank=1)
    assert [cores.base(p) for p in range(6)] == [4, 3, 2, 1, 1, 1]
    assert [cores.crowding(p, 4) for p in (0, 3, 4, 7)] == [1.0, 1.0, 1.25, 2.0]
    assert Cores(total=4, per_rank=0).base(9) == 4
    told = profile(ATTENTION, LINEAR, FREE, cores=2)
    crowded = choose_prefill(told, prompts_of([8192]), ranks=4, cores=Cores(2, 1), max_blocks=8, alone=False)
    assert crowded.seconds >= 0.999 * crowded.alone_s, f"{crowded}: two cores do no more work than two cores can"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rows": []}, "without a new token"),
        ({"rows": [Row(0, 0, 0)]}, "of 0 keys"),
        ({"rows": [Row(6, 5, 5)]}, r"5 keys have queries \[6, 5\)"),
        ({"rows": [Row(5, 5, 5)]}, "without a new token"),
        ({"rows": [Row(0, 5, 5, 0)]}, r"0 sequence\(s\) of 5 keys"),
        ({"ranks": -1}, "ranks is -1"),
        ({"max_blocks": 0}, "max_blocks is 0"),
        ({"slowdown": [0.0]}, r"slowdown is \[0.0\]"),
        ({"base_share": 1.0}, "base_share is 1.0"),
    ],
)
def test_what_describes_no_forward_is_refused(wrong: dict, told: str) -> None:
    given = {"rows": prompts_of([512]), "ranks": 1, "cores": DEVICES, "max_blocks": 8, **wrong}
    with pytest.raises(ValueError, match=told):
        choose_prefill(TYPICAL, given.pop("rows"), **given)


def test_wrong_decodes_cores_and_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="resident has"):
        choose_decode(TYPICAL, steps_of([512, 512]), ranks=2, cores=DEVICES, resident=[1])
    with pytest.raises(ValueError, match="one new token"):
        choose_decode(TYPICAL, prompts_of([512]), ranks=1, cores=DEVICES, resident=[0])
    with pytest.raises(ValueError, match="steps is 0"):
        choose_decode(TYPICAL, steps_of([512]), ranks=0, cores=DEVICES, resident=[], steps=0)
    with pytest.raises(ValueError, match="0 threads"):
        Cores(total=0)
    with pytest.raises(ValueError, match="0 pool ranks"):
        auto_threshold(TYPICAL, ranks=0, cores=DEVICES, longest=4096, max_blocks=8)
