"""Bodies in shared memory: what is sent arrives, room that runs out comes back, no two ends wait for each other, and a
liar loses its link."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import (
    TILE_FIELDS,
    Header,
    LinkLost,
    Op,
    Status,
    dtype_code,
    header_bytes,
    header_of,
    rooms,
)
from fapool_plugin.wire.ring import Ring
from fapool_plugin.wire.shm import Shm
from fapool_plugin.wire.sockets import pair
from tests.thread_pool import link_pair

RING = 2**18
"""A body of 4 KiB or more goes into it, one of more than 128 KiB in chunks of 16."""
CALLS = 8
FULL = pytest.mark.full


@pytest.fixture
def ends(loops: tuple[Loop, Loop]) -> Iterator[tuple[Link, Link]]:
    base, pool = link_pair(*loops, timeout_s=20.0, ring_bytes=RING)
    agree(base, pool)
    yield base, pool
    base.close()
    pool.close()


def agree(base: Link, pool: Link) -> None:
    base.send(Header(op=Op.HELLO), attached=base.offer())
    pool.send(Header(op=Op.HELLO, status=Status.OK), attached=pool.agree(pool.receive(5.0).attached))
    base.agree(base.receive(5.0).attached)
    assert (base.carrier.name, pool.carrier.name) == ("shm", "shm")


def request(call: int, nbytes: int, dtype: torch.dtype = torch.float32) -> tuple[Header, list[Any]]:
    """About so many bytes, a third each of strided queries, keys in many parts, and values in one."""
    n = max(1, nbytes // 3 // dtype.itemsize // 8) * 8
    generator = torch.Generator().manual_seed(call)
    q, k, v = (torch.randn(n, generator=generator).to(dtype) for _ in range(3))
    header = Header(op=Op.ATTEND, call=call, tiles=1, q_elements=n, k_elements=n, v_elements=n, dtype=dtype_code(dtype))
    parts = k.view(2, -1, 4).transpose(0, 1)
    return header, [torch.full((1, TILE_FIELDS), call), q.view(4, -1).T, list(parts), v]


def flat(part: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in part]) if isinstance(part, list) else part.reshape(-1)


def answer(header: Header, nbytes: int) -> tuple[Header, list[torch.Tensor]]:
    n = nbytes // 4
    return header._replace(status=Status.OK, q_elements=n, lse_elements=8), [
        torch.full((n,), float(header.call)),
        torch.zeros(8),
    ]


def answer_bytes(nbytes: int) -> int:
    return rooms(Header(op=Op.ATTEND, status=Status.OK, q_elements=nbytes // 4, lse_elements=8))[1]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each piece that was copied out of a ring."""
    found: list[int] = []
    copy_out = Shm.copy_out

    def seen(self: Shm, header: Header, room: memoryview) -> int:
        found.append(copy_out(self, header, room))
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
        assert message.header == header, "where a body was is nobody's business"
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
        (RING // 2, RING // 2),
        (2 * RING, 2 * RING),
        *(pytest.param(*sizes, marks=FULL) for sizes in product((RING // 4, RING // 3, 3 * RING), repeat=2)),
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
    assert base.offer() is None
    base.send(Header(op=Op.HELLO), attached=base.offer())
    assert pool.agree(pool.receive(5.0).attached) is None


def test_an_end_that_offers_nothing_stays_on_the_socket(loops: tuple[Loop, Loop], used: list[int]) -> None:
    for offers, takes in ((False, True), (True, False)):
        base, pool = link_pair(*loops, ring_bytes=RING * offers)
        base.send(Header(op=Op.HELLO), attached=base.offer())
        hello = pool.receive(5.0)
        made = pool.agree(hello.attached) if takes else None
        pool.send(Header(op=Op.HELLO, status=Status.OK), attached=made)
        base.agree(base.receive(5.0).attached)
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


class Liar:
    """The other end of a link, by hand."""

    def __init__(self, loop: Loop, asks: bool) -> None:
        mine, self.sock = pair()
        self.link = Link(mine, loop, name="test", timeout_s=20, asks=asks, ring_bytes=RING if asks else 0)
        self.sock.settimeout(5)
        if asks:
            self.link.send(Header(op=Op.HELLO), attached=self.link.offer())
            self.say(Header(op=Op.BEAT, status=Status.OK))
            self.theirs = Ring(self.hear())
            self.mine, made = Ring.made(RING)
            self.say(Header(op=Op.HELLO, status=Status.OK), made)
            self.link.agree(self.link.receive(5.0).attached)
        else:
            self.mine, made = Ring.made(RING)
            self.say(Header(op=Op.HELLO), made)
            self.link.send(Header(op=Op.HELLO), attached=self.link.agree(self.link.receive(5.0).attached))
            self.hear()  # its first heartbeat
            self.theirs = Ring(self.hear())
        assert self.link.carrier.name == "shm"

    def say(self, header: Header, attached: Descriptor | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, attached.fileno().to_bytes(4, "little"))] if attached else []
        self.sock.sendmsg([header_bytes(header)], rights)

    def hear(self) -> Descriptor:
        _, rights, _, _ = self.sock.recvmsg(256, socket.CMSG_SPACE(4))
        return Descriptor(int.from_bytes(rights[0][2][:4], "little") if rights else -1)

    def header(self) -> Header:
        data = b""
        while len(data) < 256:
            data += self.sock.recv(256 - len(data))
        return header_of(data)


ASKED = Header(op=Op.ATTEND, tiles=1, q_elements=2**12, call=1)
NBYTES = rooms(ASKED)[1]
LIES: dict[str, list[Header]] = {
    "a slot before the ring": [ASKED._replace(slot=-64, piece=NBYTES)],
    "a slot behind it": [ASKED._replace(slot=RING - 64, piece=NBYTES)],
    "a slot far behind it": [ASKED._replace(slot=2**62, piece=NBYTES)],
    "a piece of less than nothing": [ASKED._replace(piece=-64)],
    "a piece larger than the body": [ASKED._replace(piece=NBYTES + 1)],
    "a piece larger than the ring": [ASKED._replace(piece=2**40)],
    "a body in a slot that has none": [Header(op=Op.FREE, piece=64)],
    "a piece of no body": [Header(op=Op.PIECE, call=1, piece=64)],
    "another call's piece": [ASKED._replace(piece=64), Header(op=Op.PIECE, call=2, piece=64)],
    "a piece too much": [ASKED._replace(piece=64), Header(op=Op.PIECE, call=1, piece=NBYTES)],
    "no piece": [ASKED._replace(piece=64), Header(op=Op.PIECE, call=1)],
    "a message in the middle of a body": [ASKED._replace(piece=64), Header(op=Op.FREE)],
    "room for an answer before the ring": [ASKED._replace(piece=NBYTES, answer_slot=-64, answer_bytes=2**13)],
    "room for an answer behind it": [ASKED._replace(piece=NBYTES, answer_slot=RING, answer_bytes=2**13)],
    "no room for an answer": [ASKED._replace(piece=NBYTES, answer_bytes=64)],
    "less than no room for an answer": [ASKED._replace(piece=NBYTES, answer_bytes=-(2**40))],
    "credit that was not asked for": [Header(op=Op.CREDIT, status=Status.OK, extra=1)],
    "credit for less than nothing": [Header(op=Op.CREDIT, status=Status.OK, extra=-(2**40))],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_base_that_lies_loses_its_link(loops: tuple[Loop, Loop], lie: str) -> None:
    liar = Liar(loops[0], asks=False)
    with liar.sock:
        for header in LIES[lie]:
            liar.say(header)
        with pytest.raises(LinkLost, match="broke the protocol"):
            liar.link.receive(5.0)
    liar.link.close()


@pytest.mark.parametrize("slot", [-64, 0, 2**62], ids=["before", "elsewhere", "behind"])
@pytest.mark.parametrize("piece", [2**14, 2**16])
def test_a_rank_that_answers_elsewhere_loses_its_link(loops: tuple[Loop, Loop], slot: int, piece: int) -> None:
    liar = Liar(loops[0], asks=True)
    with liar.sock:
        for call in (1, 2):
            liar.link.send(*request(call, 300), answer_bytes=answer_bytes(2**14))
        first = liar.header()
        liar.sock.recv(rooms(first)[1])
        second = liar.header()
        assert first.answer_bytes == second.answer_bytes == answer_bytes(2**14)
        told = answer(second, 2**14)[0]._replace(answer_slot=0, answer_bytes=0)
        liar.say(told._replace(slot=slot or first.answer_slot, piece=piece))
        with pytest.raises(LinkLost, match="broke the protocol"):
            liar.link.receive(5.0)
    liar.link.close()


def test_a_base_outlives_whatever_a_rank_says(loops: tuple[Loop, Loop], used: list[int]) -> None:
    """Each answer is given by a rank of its own, in a slot, with changed fields of where it is."""
    random_ = random.Random(14)
    taken = lost = 0
    for _ in range(150):
        liar = Liar(loops[0], asks=True)
        with liar.sock:
            liar.link.send(*request(1, 300), answer_bytes=answer_bytes(2**14))
            asked = liar.header()
            told, _ = answer(asked._replace(answer_slot=0, answer_bytes=0), 2**14)
            first = random_.choice((asked.answer_bytes, 64 * random_.randrange(1, 250)))
            said = [told._replace(slot=asked.answer_slot, piece=first)]
            said.append(Header(op=Op.PIECE, call=1, slot=first, piece=asked.answer_bytes - first))
            wrong = random_.randrange(3)
            for index, header in enumerate(said):
                place = random_.choice(("slot", "piece", "answer_slot", "answer_bytes", "op", "call", "extra"))
                value = random_.choice((0, 1, -1, -64, 63, RING, RING - 64, 2**31, 2**62, -(2**62)))
                with suppress(OSError):  # it was cut off
                    liar.say(header._replace(**{place: value}) if index == wrong else header)
            try:
                message = liar.link.receive(0.2)
                assert message.header.op != Op.ATTEND or len(message.tensors) in (0, 2)
                taken += 1
            except LinkLost:
                lost += 1
        liar.link.close()
    assert min(taken, lost) > 30, f"{taken} taken, {lost} lost: one of the two was not tried"


def test_what_changes_after_it_was_copied_out_changes_nothing(loops: tuple[Loop, Loop]) -> None:
    liar = Liar(loops[0], asks=False)
    with liar.sock:
        liar.theirs.part(0, NBYTES)[:] = 1
        liar.say(ASKED._replace(piece=NBYTES))
        message = liar.link.receive(5.0)
        before = [x.clone() for x in message.tensors]
        liar.theirs.part(0, NBYTES)[:] = 255
        assert all(torch.equal(x, y) for x, y in zip(before, message.tensors, strict=True))
    liar.link.close()


@pytest.mark.parametrize("what", ["unsealed", "socket", "second"])
def test_a_descriptor_that_is_no_ring_loses_the_link(loops: tuple[Loop, Loop], what: str) -> None:
    mine, sock = pair()
    link = Link(mine, loops[0], name="test", timeout_s=20, asks=False)
    other, unsealed = socket.socket(), Descriptor(os.memfd_create("test"))
    os.ftruncate(unsealed.fileno(), RING)
    with sock, other:
        if what == "second":
            assert link.agree(Ring.made(RING)[1]) is not None
            offered = Ring.made(RING)[1]
        else:
            offered = unsealed if what == "unsealed" else Descriptor(other.detach())
        with pytest.raises(LinkLost, match=r"offers|cannot be mapped"):
            link.agree(offered)
    unsealed.close()
    link.close()


_DIES = """
import os, signal, socket, sys
import numpy as np
import fapool_plugin.wire.shm as shm
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Op, Status

link = Link(socket.socket(fileno=int(sys.argv[1])), Loop(), name="peer", timeout_s=60, asks=False)
link.send(Header(op=Op.HELLO, status=Status.OK), attached=link.agree(link.receive().attached))
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
        base.send(Header(op=Op.HELLO), attached=base.offer())
        base.agree(base.receive(30.0).attached)
        with pytest.raises(LinkLost, match=r"ended|send failed"):
            _calls(base, 3 if when == "reading" else 1)
        assert peer.wait(10) == -signal.SIGKILL
    finally:
        peer.kill()
        peer.wait()
        base.close()
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("fapool ring") == 0
