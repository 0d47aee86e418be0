"""Forecasts where base and ranks compute on devices: messages are copied beside what is computed.

Held against timelines that were written down by hand, in whole seconds, and against the walk through all events.
"""

from __future__ import annotations

import pytest

from fapool_plugin.plan.clocks import Cores, Prefill, Way
from fapool_plugin.plan.line import Row
from fapool_plugin.plan.profile import AttentionCost, CallCost, Fit, LinearCost, LinkCost, Machine, Profile, Shape
from fapool_plugin.plan.step import Decode, turns_s
from tests.plan.test_forecast import DEVICES, LINK, TYPICAL, steps_of
from tests.walked_plan import KV_HEADS, walked_s

ON_DEVICES = TYPICAL.model_copy(update={"on_devices": True})
# Links on which a copy takes as long as what is computed beside it, or longer.
SLOW_COPIES = LINK.model_copy(update={"send": Fit(a=1e-3, b=2e-8), "to_base": Fit(a=1.1e-3, b=2.1e-8)})


@pytest.mark.parametrize("link", [LINK, SLOW_COPIES], ids=["fast copies", "slow copies"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [0.0, 0.13, 0.5])
@pytest.mark.parametrize("lengths", [(8192,), (6000, 4001)])
def test_the_clocks_agree_with_a_walk_through_real_tiles(link, ranks, blocks, share, lengths) -> None:
    told, rows = ON_DEVICES.model_copy(update={"link": link}), [Row(0, n, n) for n in lengths]
    prefill, way = Prefill(told, rows, DEVICES), Way(ranks, blocks, share)
    predicted, expected = prefill.play(way).seconds, walked_s(told, rows, ranks, blocks, share, DEVICES)
    assert abs(predicted / expected - 1) < 0.005, f"predicted {predicted}, walked {expected}"
    assert prefill.bound_s(way) <= predicted * (1 + 1e-9)
    waiting = Prefill(told.model_copy(update={"on_devices": False}), rows, DEVICES).play(way).seconds
    assert predicted <= waiting * (1 + 1e-9), f"{predicted} s beside computing, {waiting} s before it"


def in_seconds(**link: float) -> Profile:
    """One layer, one lane. A prompt in two blocks of 64: linear 1 s a block; attention of both 12 s, 3 for the first
    and 9 for the second, 3 to 1 as their areas. Every message takes what ``link`` says."""
    attention = Fit(c=12.0 / (128 * 129), b=12.0 / (128 * 129))
    return Profile(
        date="2026-01-01",
        quick=False,
        machine=Machine(processor="any", cores=1, torch="2", fapool="0"),
        shape=Shape(
            hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, v_head_dim=8, dtype="bfloat16", parameters=1
        ),
        attention=(AttentionCost(kernel="", dtype="bfloat16", threads=1, prefill=attention, decode=Fit(b=0.1)),),
        linear=(LinearCost(threads=1, prefill=Fit(b=1 / 64), decode=Fit(a=2.0)),),
        link=LinkCost(**{name: Fit(a=seconds) for name, seconds in link.items()}),
        call=CallCost(),
        activation_s=0.0,
    )  # fmt: skip


def test_a_prompt_by_hand() -> None:
    """Half and half, two blocks:

        seconds        0   1   2   3   4   5   6   7   8   9  10  11  12  13  14
        base           | a | own a     | b |  own b            | - merge a, b
        host               | ask a |       | ask b |
        rank                           | take, a 2.5 | take, b 5.5        |
        rank's copies                                | sent a | ...       | sent b |

    Own shares take 1.5 (a) and 4.5 (b), asking 2, arriving 3 from the begin of asking, taking 1, sending 2, and an
    answer is there 3 after it leaves: the copy is part of that.
    """
    told = in_seconds(to_rank=3.0, to_base=3.0, send=2.0, take=1.0)
    rows, way = [Row(0, 128, 128)], Way(1, 2, 0.5)
    # Base: a posted at 1, done with it at max(1 + 2, 1 + 1.5) = 3; b posted at 4, done at max(6, 4 + 4.5) = 8.5.
    # Rank: a from 1 + 3 to 4 + 1 + 1.5 = 6.5; b from max(4 + 3, 6.5) = 7 to 7 + 1 + 4.5 = 12.5.
    # Answers: a at 9.5, b at max(12.5, 6.5 + 2) + 3 = 15.5. Merged: 10.5 (from 9.5), then 16.5.
    devices = Prefill(told.model_copy(update={"on_devices": True}), rows, Cores(1, 0))
    assert devices.play(way).seconds == pytest.approx(16.5, abs=0.1)
    # On CPUs base: 1 + 2 + 1.5 = 4.5, b posted at 5.5. Rank: a to 6.5, sent at 8.5; b from 8.5 to 8.5 + 5.5 = 14.
    assert Prefill(told, rows, Cores(1, 0)).play(way).seconds == pytest.approx(14 + 3 + 1, abs=0.1)


def test_answers_leave_one_after_the_other() -> None:
    """A copy of 10 s: the second answer leaves when the first is there, however early it was computed."""
    told = in_seconds(to_rank=0.0, to_base=10.0, send=0.0, take=0.0).model_copy(update={"on_devices": True})
    slow = told.model_copy(update={"link": told.link.model_copy(update={"send": Fit(a=10.0)})})
    rows, way = [Row(0, 128, 128)], Way(1, 2, 0.0)
    # Asking is 10 s, too: a posted at 1, arrives at once by this link, done at 4; b posted at 12, done at 21.
    # a leaves at 4 and is there at 14; b could leave at 21.
    assert Prefill(slow, rows, Cores(1, 0)).play(way).seconds == pytest.approx(31.0, abs=0.1)
    # Without a cost for the host both are asked at once: b computed at 4 + 9 = 13, there at 23.
    assert Prefill(told, rows, Cores(1, 0)).play(way).seconds == pytest.approx(23.0, abs=0.1)


def test_an_answer_waits_for_the_copy_of_the_one_before() -> None:
    """Four heads of wide values for each key: an answer of a block has 41,984 bytes, which are copied in 20 s, and a
    request 15,360. The second block is computed long before the first one's answer is copied."""
    told, copied = in_seconds(to_rank=0.0, to_base=0.0), Fit(b=20 / 41_984)
    wide = told.shape.model_copy(update={"heads": 4, "v_head_dim": 80})
    slow = LinkCost(to_rank=copied, to_base=copied, send=copied, take=Fit())
    told = told.model_copy(update={"shape": wide, "link": slow, "on_devices": True})
    ask, first = copied.at(15_360), 12 * (64 * 65) / (128 * 129)
    seconds = Prefill(told, [Row(0, 128, 128)], Cores(1, 0)).play(Way(1, 2, 0.0)).seconds
    assert seconds == pytest.approx(1 + ask + first + 20 + 20, abs=0.1)


def test_a_step_by_hand() -> None:
    """40 keys, half with the rank: own share and rank take 2 s each of the layer's 4."""
    told = in_seconds(to_rank=3.0, to_base=3.0, send=2.0, take=1.0)
    rows, way = [Row(39, 40, 40)], Way(1, 1, 0.5)
    # linear 2; asked 2, own 2; there and back 3 + 2 + 3; merged 1.
    on_cpus = Decode(told, rows, Cores(1, 0), held=[40]).play(way)
    on_devices = Decode(told.model_copy(update={"on_devices": True}), rows, Cores(1, 0), held=[40]).play(way)
    assert on_cpus.seconds == on_devices.seconds == pytest.approx(2 + 3 + 2 + 3 + 1)
    assert [on_cpus.base_busy_s, on_devices.base_busy_s] == pytest.approx([2 + 2 + 2 + 1, 2 + 2 + 1])
    assert [on_cpus.pool_busy_s, on_devices.pool_busy_s] == pytest.approx([1 + 2 + 2, 1 + 2])


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_turns_of_one_part_are_the_whole_step(share: float) -> None:
    told = ON_DEVICES.model_copy(update={"link": SLOW_COPIES})
    whole = Decode(told, steps_of([4000] * 4), DEVICES, held=[4000 * 4 * KV_HEADS])
    assert turns_s([whole], Way(1, 1, share)) == pytest.approx(whole.play(Way(1, 1, share)).seconds)


def test_in_turns_an_answer_is_copied_beside_the_other_part() -> None:
    """Two parts of a step, all keys with the rank:

        base      2 | - a posted    4 | - b posted       merge a at 15      merge b
        rank            | 2 to 6        | 6 to 10
        copies                   | 6 to 11   | 11 to 16

    Each part has 40 keys, 4 s of the rank; answers take 5 s, all of it the copy. Nothing else costs anything.
    """
    told = in_seconds(to_rank=0.0, to_base=5.0, send=0.0, take=0.0).model_copy(update={"on_devices": True})
    part = Decode(told, [Row(39, 40, 40)], Cores(1, 0), held=[40])
    way = Way(1, 1, 0.0)
    # a: asked at 2, there at 11. b: asked at 4, begun at 6, there at 15.
    assert turns_s([part, part], way) == pytest.approx(15.0)
    # Values ten times as wide as queries, so that an answer has 164 bytes and its copy takes those 5 s, a request 16.
    wide = told.shape.model_copy(update={"v_head_dim": 80})
    copied = Fit(b=5 / 164)
    slow = told.model_copy(
        update={"shape": wide, "link": LinkCost(to_rank=copied, to_base=copied, send=copied, take=Fit())}
    )
    part, ask = Decode(slow, [Row(39, 40, 40)], Cores(1, 0), held=[40]), 16 * 5 / 164
    # a: asked at 2 + ask, computed 4 s later, there 5 s after that. b is computed 4 s after a; its copy waits for a's.
    assert turns_s([part, part], way) == pytest.approx(2 + ask + 4 + 5 + 5)
