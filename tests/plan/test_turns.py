"""A decode step in turns against steps played whole, and against what neither side can beat."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fapool_plugin.plan.clocks import Way
from fapool_plugin.plan.profile import Fit
from fapool_plugin.plan.step import Decode, turns_s
from tests.plan.test_forecast import ATTENTION, DEVICES, FREE, LINEAR, profile, steps_of
from tests.walked_plan import LAYERS

KEYS = 3000


def step(rows: int, linear: Fit, keys: int = KEYS) -> Decode:
    told = profile(ATTENTION, LINEAR, FREE, decode=(Fit(a=0.0, b=3e-7), linear))
    return Decode(told, steps_of([keys] * rows), DEVICES, held=[10**12] * 4)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(2, 64),
    ranks=st.integers(1, 4),
    base_share=st.floats(0.0, 0.9),
    fixed=st.floats(0.0, 1e-2),
    each=st.floats(0.0, 1e-3),
)
def test_turns_lie_between_one_part_and_what_no_way_can_beat(
    rows: int, ranks: int, base_share: float, fixed: float, each: float
) -> None:
    linear, way = Fit(a=fixed, b=each), Way(ranks, 1, base_share)
    whole, parts = step(rows, linear), [step(rows // 2, linear), step(rows - rows // 2, linear)]
    played = whole.play(way)
    assert turns_s([whole], way) == pytest.approx(played.seconds), "a single part is the whole step"
    busy = [part.play(way) for part in parts]
    least = max(sum(one.base_busy_s for one in busy), sum(one.pool_busy_s for one in busy))
    assert least * (1 - 1e-9) <= turns_s(parts, way) <= sum(one.seconds for one in busy) * (1 + 1e-9)


def test_turns_gain_where_linear_work_is_arithmetic_and_lose_where_it_is_weights() -> None:
    way = Way(1, 1, 0.0)
    attention_s = LAYERS * 16 * KEYS * 3e-7
    # Bound by arithmetic: half the rows, half the time. All of it but the first part's is hidden.
    arithmetic = Fit(a=0.0, b=attention_s / 16 / 2)
    whole, half = step(16, arithmetic).play(way).seconds, [step(8, arithmetic)] * 2
    assert whole == pytest.approx(1.5 * attention_s)
    assert turns_s(half, way) == pytest.approx(attention_s * (1 + 0.25 / LAYERS))
    # Bound by reading weights: each part takes as long as the whole, and the base has more to do than the pool.
    weights = Fit(a=1.5 * attention_s, b=0.0)
    whole, half = step(16, weights).play(way).seconds, [step(8, weights)] * 2
    assert whole == pytest.approx(2.5 * attention_s)
    assert turns_s(half, way) > 1.2 * whole
