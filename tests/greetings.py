"""Two ends that say HELLO as a base and a pool rank do, with devices that are stand-ins."""

from __future__ import annotations

import threading

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import Header, Op, Status
from fapool_plugin.wire.terms import AGREED
from tests.fake_cudart import FakeDevice


def greet(base: Link, pool: Link, devices: tuple[FakeDevice | None, FakeDevice | None]) -> PoolRank:
    """HELLO, as a base and a pool rank say it."""
    base.terms.device, pool.terms.device = devices
    rank = PoolRank(0, base, 1, RankCounters(0))
    thread = threading.Thread(target=hear, args=(pool,), daemon=True)
    thread.start()
    rank.open()
    thread.join(10)
    base.check = lambda header: None
    return rank


def hear(pool: Link) -> None:
    """As a worker does, until the base has nothing more to say of it."""
    worker, terms = Worker.__new__(Worker), pool.terms
    while True:
        message = pool.receive(10.0)
        header = message.header
        assert header.op == Op.HELLO
        reply = Header(op=Op.HELLO, status=Status.OK, token=1, peer=5, clock=1)
        worker._greeted(pool, message, reply)
        if header.keep in (0, AGREED) or not (header.address or terms._mine or terms._window):
            return
