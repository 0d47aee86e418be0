"""Predicted decode steps, reckoned by hand."""

from typing import Any

import pytest

from fapool_plugin.plan.clocks import Cores, Way
from fapool_plugin.plan.forecast import choose_decode
from fapool_plugin.plan.profile import CallCost, Fit, LinkCost
from fapool_plugin.plan.step import Decode
from tests.plan.test_forecast import (
    ATTENTION,
    DEVICES,
    FREE,
    LINEAR,
    profile,
    steps_of,
)
from tests.walked_plan import GROUP, HEAD_DIM, KV_HEADS, LAYERS, V_HEAD_DIM


def test_a_decode_step_is_the_longer_of_two_clocks() -> None:
    """Two ranks and the base take one head each of one row: the second rank is asked after the first."""
    link = LinkCost(
        to_rank=Fit(a=3e-4, b=1e-9), to_base=Fit(a=2e-4, b=2e-9), send=Fit(a=1e-4, b=1e-9), take=Fit(a=2e-4, b=1e-9)
    )
    told, keys = profile(ATTENTION, LINEAR, link, decode=(Fit(a=1e-4, b=3e-7), Fit(a=1e-3, b=1e-3))), 3000
    call = CallCost(ask_s=1e-5, merge_s=2e-5, own_s=3e-5, rank_s=4e-5, away_s=5e-5)
    told = told.model_copy(update={"call": call})
    predicted = Decode(told, steps_of([keys]), DEVICES, held=[keys, keys]).play(Way(2, 1, 1 / 3)).seconds
    head = 1e-4 + 3e-7 * keys / KV_HEADS
    out, back = GROUP * HEAD_DIM * 2, GROUP * (V_HEAD_DIM * 2 + 4)

    def by_hand(lanes: int, own_s: float, rank_s: float) -> float:
        ask, merge = 1e-5 + link.send.at(lanes * out), 2e-5 + link.take.at(lanes * back)
        second = ask + link.to_rank.at(lanes * out) + 4e-5 + rank_s + link.to_base.at(lanes * back) + 5e-5
        return 2e-3 + LAYERS * (max(2 * ask + own_s, second) + 2 * merge)

    expected = by_hand(1, 3e-5 + head, head)
    assert predicted == pytest.approx(expected), f"predicted {predicted}, by hand {expected}"
    # Without the base each rank has a head and half of another: two lanes, two tiles.
    predicted = Decode(told, steps_of([keys]), DEVICES, held=[2 * keys, 2 * keys]).play(Way(2, 1, 0.0)).seconds
    expected = by_hand(2, 0.0, 2 * 1e-4 + 3e-7 * keys / 2)
    assert predicted == pytest.approx(expected), f"predicted {predicted}, by hand {expected}"


def test_on_crowded_cores_attention_takes_longer_and_the_rest_does_not() -> None:
    """Three threads on two cores, one head for each: every tile takes half as long again, what is linear no longer."""
    told, keys = profile(ATTENTION, LINEAR, FREE, decode=(Fit(a=1e-4, b=3e-7), Fit(a=1e-3, b=1e-3)), cores=2), 3000
    predicted = Decode(told, steps_of([keys]), Cores(2), held=[keys, keys]).play(Way(2, 1, 1 / 3)).seconds
    head = 1e-4 + 3e-7 * keys / KV_HEADS
    expected = told.linear_for(1).decode.at(1) + LAYERS * 1.5 * head
    assert predicted == pytest.approx(expected), f"predicted {predicted}, by hand {expected}"


def test_decode_shares_come_in_blocks_of_keys() -> None:
    """A rank takes whole blocks of a lane's keys: of fewer keys than a block it takes none."""
    told = profile(ATTENTION, LINEAR, FREE, decode=(Fit(b=1e-6), Fit(b=1e-6)))
    for keys, shares in ((1000, {0.0, 1 / 3, 2 / 3}), (255, {0.0})):
        held = [KV_HEADS * keys]
        found = choose_decode(told, steps_of([keys]), ranks=1, cores=DEVICES, resident=held, block=256, alone=False)
        assert found.base_share in shares, f"{found}"


def test_decode_takes_what_is_resident_and_sends_only_for_many_steps() -> None:
    ways: dict[str, Any] = dict.fromkeys(("to_rank", "to_base", "send", "take"), Fit(a=1e-6, b=1e-9))
    told = profile(ATTENTION, LINEAR, LinkCost(**ways), decode=(Fit(b=1e-7), Fit(b=1e-5)))
    held = [KV_HEADS * 8000 // 4]
    kwargs: dict[str, Any] = {"ranks": 1, "cores": DEVICES}
    once = choose_decode(told, steps_of([8000]), resident=held, **kwargs)
    assert once.ranks == 1
    assert once.base_share == pytest.approx(0.75, abs=0.011), f"{once}: the rank holds a quarter"
    nothing = choose_decode(told, steps_of([8000]), resident=[0], **kwargs)
    assert nothing.ranks == 0, f"{nothing}"
    often = choose_decode(told, steps_of([8000]), resident=[0], steps=10**6, **kwargs)
    assert often.ranks == 1, f"{often}"
