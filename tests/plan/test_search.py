"""The search for the best way: what is passed over without being played cannot be better."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.plan.clocks import Prefill, Way
from fapool_plugin.plan.forecast import choose_prefill
from fapool_plugin.plan.line import Row
from fapool_plugin.plan.profile import CallCost
from fapool_plugin.plan.step import Decode
from tests.plan.test_forecast import CORES, DEVICES, FREE, LENGTHS, PROFILES, TYPICAL, prompts_of, steps_of


@settings(max_examples=200, deadline=None)
@given(PROFILES, LENGTHS, CORES, st.integers(1, 3), st.integers(1, 4), st.floats(0, 0.99), st.sampled_from([1, 90]))
def test_bounds_are_below_what_is_played(told, lengths, cores, ranks, blocks, share, alike) -> None:
    prefill = Prefill(told, [Row(0, n, n, alike) for n in lengths], cores)
    steps = [row._replace(alike=alike) for row in steps_of(lengths)]
    for forward, way in (
        (prefill, Way(ranks, min(blocks, -(-max(lengths) // 64)), share)),
        (Decode(told, steps, cores, [5000] * ranks), Way(ranks, 1, share)),
    ):
        played, bound, ceiling = forward.play(way), forward.bound_s(way), forward.ceiling_s(ranks)
        assert ceiling <= played.seconds * (1 + 1e-9), f"{way}: played {played} below the ceiling {ceiling} s"
        assert bound <= played.seconds * (1 + 1e-9), f"{way}: bound {bound} s, played {played}"


@pytest.mark.parametrize("tokens", [512, 4096])
def test_costly_requests_do_not_hide_the_best_way(tokens: int) -> None:
    """Asking that takes longer than an answer: only the ranks asked first may wait for it."""
    told = TYPICAL.model_copy(update={"call": CallCost(ask_s=5e-4, merge_s=1e-5), "link": FREE})
    found = choose_prefill(told, prompts_of([tokens]), ranks=3, cores=DEVICES, max_blocks=1, alone=False)
    prefill = Prefill(told, prompts_of([tokens]), DEVICES)
    least = min(prefill.play(Way(p, 1, x / 100)).seconds for p in (1, 2, 3) for x in range(100))
    assert found.seconds == least, f"{found}, the best takes {least}"


def test_rows_without_queries_move_nothing() -> None:
    told, busy, idle = TYPICAL, Row(0, 100, 100), Row(10000, 10000, 10000)
    ways = [Prefill(told, rows, DEVICES).play(Way(1, 1, 0.5)) for rows in ([busy, busy], [busy, idle, idle, busy])]
    assert ways[0] == ways[1]
