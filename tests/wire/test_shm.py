"""Bodies in shared memory: what is sent arrives, room that runs out comes back, no two ends wait for each other, and a
liar loses its link."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import (
    Body,
    Header,
    LinkLost,
    Op,
    Status,
)
from fapool_plugin.wire.shm import Shm
from fapool_plugin.wire.sockets import pair
from tests.bodies import RING, agree, answer, answer_bytes, flat, request
from tests.thread_pool import link_pair

CALLS = 8
FULL = pytest.mark.full


@pytest.fixture
def ends(loops: tuple[Loop, Loop]) -> Iterator[tuple[Link, Link]]:
    base, pool = link_pair(*loops, timeout_s=20.0, ring_bytes=RING)
    agree(base, pool)
    yield base, pool
    base.close()
    pool.close()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each piece that was copied out of a ring."""
    found: list[int] = []
    copy_out = Shm.copy_out

    def seen(self: Shm, header: Header, body: Body, done: int) -> int:
        found.append(copy_out(self, header, body, done))
        return found[-1]

    monkeypatch.setattr(Shm, "copy_out", seen)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("nbytes", [300, 2**13, 2**16, RING // 2, RING, 5 * RING])
def test_what_is_sent_arrives(ends: tuple[Link, Link], used: list[int], nbytes: int, dtype: torch.dtype) -> None:
    """So often that every part of the ring is used more than once."""
    base, pool = ends
    sent = [request(call, nbytes, dtype) for call in range(1, 3 + 4 * RING // nbytes if nbytes > 300 else 9)]
    for header, tensors in sent:
        base.send(header, tensors)
    for header, tensors in sent:
        message = pool.receive(20.0)
        assert message.header == header, "where a body was is not told"
        for got, want in zip(message.tensors, tensors, strict=True):
            assert torch.equal(got.view(-1), flat(want))
    base.drain(0)
    assert base.bytes_sent == pool.bytes_received
    assert (sum(used) > 0) == (nbytes > 300), "small bodies go over the socket, and large ones do not"
    if nbytes > RING:
        assert max(used) <= RING // 16 < len(used) * RING


def test_what_is_sent_may_be_overwritten_at_once(ends: tuple[Link, Link]) -> None:
    base, pool = ends
    with pool.loop.alone():  # nothing is read, and the ring fills up
        for call in range(1, 9):
            header, tensors = request(call, RING // 3)
            base.send(header, tensors)
            for x in (tensors[1], *tensors[2], tensors[3]):
                x.fill_(-1)
        assert len(base._outgoing) > 0, "all had room: nothing was tried"
    for call in range(1, 9):
        message = pool.receive(20.0)
        for got, want in zip(message.tensors, request(call, RING // 3)[1], strict=True):
            assert torch.equal(got.view(-1), flat(want))


def test_messages_stay_in_order_and_heartbeats_do_not_wait(ends: tuple[Link, Link]) -> None:
    base, pool = ends
    with pool.loop.alone():
        for call in range(1, 5):
            base.send(*request(call, RING // 2))
            base.send(Header(op=Op.FREE, sequence=call))
        waiting = len(base._outgoing)
        assert waiting > 2
        base._say(Header(op=Op.BEAT))
        assert len(base._outgoing) == waiting, "a heartbeat waits behind a body"
    seen = [pool.receive(20.0).header for _ in range(8)]
    assert [(header.op, header.call or header.sequence) for header in seen] == [
        (op, call) for call in range(1, 5) for op in (Op.ATTEND, Op.FREE)
    ]


def serve(pool: Link, nbytes: int, ended: list[Any]) -> None:
    """As a rank does: one request after the other, each with a large answer."""
    try:
        while True:
            message = pool.receive()
            want = request(message.header.call, int(message.header.sequence))[1]
            assert all(torch.equal(got.view(-1), flat(part)) for got, part in zip(message.tensors, want, strict=True))
            pool.send(*answer(message.header._replace(sequence=0), nbytes))
            pool.drain(8)
    except LinkLost:
        pass
    except BaseException as error:
        ended.append(error)
        pool.fail(str(error))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (RING // 4, RING // 4),
        (2 * RING, 2 * RING),
        *(pytest.param(*sizes, marks=FULL) for sizes in product((RING // 2, RING // 3, 3 * RING), repeat=2)),
    ],
)
def test_eight_outstanding_calls_do_not_wait_in_a_circle(
    ends: tuple[Link, Link], used: list[int], asked: int, answered: int
) -> None:
    """All are asked before any answer is taken; neither the requests nor the answers have room together."""
    base, pool = ends
    ended: list[Any] = []
    thread = threading.Thread(target=serve, args=(pool, answered, ended))
    thread.start()
    try:
        for _ in range(2):
            for call in range(1, CALLS + 1):
                header, tensors = request(call, asked)
                base.send(header._replace(sequence=asked), tensors, answer_bytes=answer_bytes(answered))
            for call in range(1, CALLS + 1):
                message = base.receive(15.0)
                assert message.header.call == call
                assert message.tensors[0].tolist() == [call] * (answered // 4)
        assert not ended, ended
        assert sum(used) >= 2 * CALLS * (asked // 24 * 24 + answered)
        carrier = base.carrier
        assert isinstance(carrier, Shm)
        assert not carrier._reserved, "room for answers is kept that have come"
        assert isinstance(pool.carrier, Shm)
        assert len(pool.carrier._lent) <= 4, "a rank remembers slots of answers that have gone"
        assert not carrier._lent or carrier._mark > carrier._asked, "slots are kept that were given back"
    finally:
        base.close()
        thread.join(20)
        assert not thread.is_alive()


def test_a_request_waits_for_room_for_its_answer(ends: tuple[Link, Link]) -> None:
    """The rank never does: what it has computed goes at once."""
    base, pool = ends
    for call in range(1, 7):
        base.send(*request(call, 300), answer_bytes=answer_bytes(RING // 4 - 1024))
    came = [pool.receive(5.0) for _ in range(4)]
    assert [message.header.call for message in came] == [1, 2, 3, 4]
    assert len(base._outgoing) == 2, "there is room for four answers in the ring"
    pool.send(*answer(came[0].header, RING // 4 - 1024))
    assert base.receive(5.0).header.call == 1
    assert pool.receive(5.0).header.call == 5
    assert len(base._outgoing) == 1


def test_the_next_lease_uses_what_was_agreed_on(ends: tuple[Link, Link]) -> None:
    base, pool = ends
    assert base.terms.offer() is None
    base.send(Header(op=Op.HELLO), attached=base.terms.offer())
    assert pool.terms.agree(pool.receive(5.0).attached) is None


def test_an_end_that_offers_nothing_stays_on_the_socket(loops: tuple[Loop, Loop], used: list[int]) -> None:
    for offers, takes in ((False, True), (True, False)):
        base, pool = link_pair(*loops, ring_bytes=RING * offers)
        base.send(Header(op=Op.HELLO), attached=base.terms.offer())
        hello = pool.receive(5.0)
        made = pool.terms.agree(hello.attached) if takes else None
        pool.send(Header(op=Op.HELLO, status=Status.OK), attached=made)
        base.terms.agree(base.receive(5.0).attached)
        header, tensors = request(1, RING)
        base.send(header, tensors)
        assert torch.equal(pool.receive(5.0).tensors[3], tensors[3])
        assert (base.carrier.name, used) == ("inline", [])
        base.close()
        pool.close()


def test_memory_ends_with_the_link(loops: tuple[Loop, Loop]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        base, pool = link_pair(*loops, ring_bytes=RING)
        agree(base, pool)
        with pool.loop.alone():
            for call in range(1, 9):
                base.send(*request(call, RING // 2))
            base.close()
        pool.close()
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("fapool ring") == 0
    assert len(os.listdir("/proc/self/fd")) == before


_DIES = """
import os, signal, socket, sys
import numpy as np
import fapool_plugin.wire.shm as shm
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Op, Status

link = Link(socket.socket(fileno=int(sys.argv[1])), Loop(), name="peer", timeout_s=60, asks=False)
link.send(Header(op=Op.HELLO, status=Status.OK), attached=link.terms.agree(link.receive().attached))
left = int(sys.argv[3])

class Dying:
    def __getattr__(self, name):
        return getattr(np, name)

    def copyto(self, target, source):
        global left
        left -= 1
        if not left:
            target[: len(target) // 2] = source[: len(target) // 2]
            os.kill(os.getpid(), signal.SIGKILL)
        np.copyto(target, source)

if sys.argv[2] == "reading":
    shm.np = Dying()
while True:
    message = link.receive()
    if sys.argv[2] == "writing":
        shm.np = Dying()  # an answer larger than its room is written by chunks
    x = message.tensors[1]
    link.send(message.header._replace(status=Status.OK, k_elements=0, v_elements=0), [x, x[:0]])
"""


def _calls(base: Link, count: int) -> None:
    for call in range(1, count + 1):
        header, tensors = request(call, 9 * RING)
        base.send(header, tensors, answer_bytes=4 * header.q_elements)
    for _ in range(count + 1):
        base.receive(15.0)


@pytest.mark.processes
@pytest.mark.timeout(60)
@pytest.mark.parametrize("at", [2, *(pytest.param(at, marks=FULL) for at in (1, 5, 40))])
@pytest.mark.parametrize("when", ["reading", "writing"])
def test_an_end_killed_in_the_middle_of_a_copy_is_lost_and_no_more(
    loops: tuple[Loop, Loop], when: str, at: int
) -> None:
    mine, its = pair()
    with its:
        peer = subprocess.Popen(
            [sys.executable, "-c", _DIES, str(its.fileno()), when, str(at)], pass_fds=(its.fileno(),)
        )
    base = Link(mine, loops[0], name="test", timeout_s=20, asks=True, ring_bytes=RING)
    try:
        base.send(Header(op=Op.HELLO), attached=base.terms.offer())
        base.terms.agree(base.receive(30.0).attached)
        with pytest.raises(LinkLost, match=r"ended|send failed"):
            _calls(base, 3 if when == "reading" else 1)
        assert peer.wait(10) == -signal.SIGKILL
    finally:
        peer.kill()
        peer.wait()
        base.close()
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("fapool ring") == 0
