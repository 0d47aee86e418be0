"""Wrong words about slots, pieces and rooms lose their link and nothing else, whatever memory rings are, whichever end
lies. That no copy leaves a ring the stand-ins look for themselves; what a liar by hand can say more is in shm's."""

from __future__ import annotations

import random

import pytest

from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Op, header_bytes
from tests.bodies import RING, answer, answer_bytes, request
from tests.two_ends import ends_of

LIES = 30


@pytest.mark.parametrize("asks", [False, True], ids=["rank", "base"])
@pytest.mark.parametrize("kind", ["shm", "ipc", "nixl"])
def test_liars_lose_their_link_and_nothing_else(loops: tuple[Loop, Loop], kind: str, asks: bool) -> None:
    """``asks``: the honest end is the base."""
    random_, lost = random.Random(3), 0
    for _ in range(LIES):
        with ends_of(kind, loops) as (base, pool):
            assert base.carrier.name == pool.carrier.name == kind
            honest, liar = (base, pool) if asks else (pool, base)
            said = request(1, 2**13)[0]._replace(slot=0, piece=2**13)
            if asks:
                base.send(*request(1, 300), answer_bytes=answer_bytes(2**13))
                said = answer(Header(op=Op.ATTEND, call=1), 2**13)[0]._replace(slot=0, piece=answer_bytes(2**13))
            place = random_.choice(("slot", "piece", "answer_slot", "answer_bytes"))
            value = random_.choice((-1, -64, RING, RING - 64, 2**31, 2**62, -(2**62)))
            liar._socket.setblocking(True)
            liar._socket.send(header_bytes(said._replace(**{place: value})))
            try:
                assert honest.receive(0.1).header.op == Op.ATTEND
            except LinkLost:
                lost += 1
    assert lost > LIES // 2, f"{lost} of {LIES} lies were noticed"
