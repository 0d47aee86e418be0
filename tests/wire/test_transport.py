"""Links: what is sent arrives, what is malformed is refused, and a silent, still or dead end is noticed in time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import (
    HEADER_BYTES,
    TILE_FIELDS,
    Header,
    LinkLost,
    Op,
    Status,
    bits_float,
    dtype_code,
    float_bits,
    header_bytes,
    rooms,
)
from fapool_plugin.wire.sockets import pair
from tests.thread_pool import link_pair

_PEER = """
import socket, sys, time
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
link = Link(socket.socket(fileno=int(sys.argv[1])), Loop(), name="peer", timeout_s=60, asks=False)
time.sleep(120)
"""


@pytest.fixture
def ends(loops: tuple[Loop, Loop]) -> Iterator[tuple[Link, Link]]:
    base, pool = link_pair(*loops)
    yield base, pool
    base.close()
    pool.close()


def request(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Header, list[torch.Tensor]]:
    tiles = torch.arange(2 * TILE_FIELDS).view(2, TILE_FIELDS)
    header = Header(
        op=Op.ATTEND,
        tiles=2,
        q_elements=len(q),
        k_elements=len(k),
        v_elements=len(v),
        dtype=dtype_code(q.dtype),
    )
    return header, [tiles, q, k, v]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_sent_arrives_in_order(ends: tuple[Link, Link], dtype: torch.dtype) -> None:
    base, pool = ends
    sent = [request(*(torch.randn(n + i).to(dtype) for n in (1000, 7, 0))) for i in range(20)]
    for header, tensors in sent:
        base.send(header, tensors)
    for header, tensors in sent:
        message = pool.receive()
        assert message.header == header
        for got, want in zip(message.tensors, tensors, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
            assert not got.numel() or got.data_ptr() % 64 == 0, "kernels read aligned tensors faster"
    assert base.bytes_sent == pool.bytes_received > 0


def test_messages_are_received_ahead_of_use(ends: tuple[Link, Link]) -> None:
    base, pool = ends
    large = torch.randn(4_000_000)
    base.send(*request(large, large, large))
    base.drain(0)  # would wait for ever if it were received when receive() is called, and not before
    got = pool.receive().tensors
    assert all(torch.equal(x, large) for x in got[1:])


def test_large_messages_both_ways_at_once_do_not_wait_for_each_other(ends: tuple[Link, Link]) -> None:
    large = torch.randn(3_000_000)
    for _ in range(3):
        for end in ends:
            end.send(*request(large, large, large))
    for end in ends:
        for _ in range(3):
            assert torch.equal(end.receive(20.0).tensors[1], large)


def test_what_is_sent_may_be_overwritten_at_once(ends: tuple[Link, Link]) -> None:
    base, pool = ends
    large = torch.ones(4_000_000)
    for _ in range(3):
        base.send(*request(large, large, large))
    large.zero_()
    for _ in range(3):
        assert all(bool((x == 1).all()) for x in pool.receive().tensors[1:])


@given(st.floats(allow_nan=False))
def test_floats_travel_as_bits(value: float) -> None:
    assert bits_float(float_bits(value)) == value


def test_a_payload_that_its_header_does_not_announce_is_refused(ends: tuple[Link, Link]) -> None:
    header, tensors = request(torch.zeros(4), torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="announces"):
        ends[0].send(header, tensors[:-1])
    with pytest.raises(ValueError, match="announces"):
        ends[0].send(header, [*tensors[:-1], torch.zeros(4, dtype=torch.float64)])
    with pytest.raises(ValueError, match="float8"):
        dtype_code(torch.float8_e4m3fn)
    ends[0].send(header, tensors)
    assert ends[1].receive().header == header


def test_malformed_headers_are_no_messages() -> None:
    with pytest.raises(LinkLost, match="malformed"):
        rooms(Header(op=Op.ATTEND, tiles=-1))
    for merged in ({"merge": 1}, {"peers": 1}, {"status": Status.OK, "parts": 1}):
        with pytest.raises(LinkLost, match="malformed"):
            rooms(Header(op=Op.BACKWARD, tiles=1, **merged))


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (Header(op=Op.ATTEND, dtype=99), "malformed"),
        (Header(op=Op.ATTEND, tiles=2**61), "too big|size|memory|dimension"),
        (Header(op=Op.PEER, address=2**40), "malformed"),
    ],
)
def test_a_header_that_makes_no_sense_ends_the_link(loops: tuple[Loop, Loop], header: Header, match: str) -> None:
    stranger, mine = pair()
    link = Link(mine, loops[0], name="test", timeout_s=5, asks=True)
    stranger.send(header_bytes(header))
    with stranger, pytest.raises(LinkLost, match=match):
        link.receive(5.0)
    link.close()


def test_a_header_is_held_against_what_is_expected_before_its_body_has_memory(loops: tuple[Loop, Loop]) -> None:
    stranger, mine = pair()
    link = Link(mine, loops[0], name="test", timeout_s=5, asks=True)
    seen: list[Header] = []

    def refuse(header: Header) -> None:
        seen.append(header)
        raise LinkLost("not asked for")

    link.check = refuse
    announced = Header(op=Op.ATTEND, q_elements=2**30)
    stranger.send(header_bytes(announced))
    with stranger, pytest.raises(LinkLost, match="not asked for"):
        link.receive(5.0)
    assert seen == [announced]
    assert link._body is None
    link.close()


def test_unasked_messages_do_not_pile_up(loops: tuple[Loop, Loop]) -> None:
    stranger, mine = pair()
    link = Link(mine, loops[0], name="test", timeout_s=5, asks=True)
    one = header_bytes(Header(op=Op.HELLO))
    with stranger:
        stranger.settimeout(10)
        try:
            for _ in range(10_000):
                stranger.sendall(one)
        except OSError:
            pass  # it was cut off
        assert link.lost
        assert "not asked for" in link.lost
    link.close()


def test_a_header_is_as_long_in_every_version() -> None:
    """Either end receives so much before it knows the other's version."""
    assert HEADER_BYTES == 256
    assert 8 * len(Header()) <= HEADER_BYTES
    assert rooms(Header(version=99, op=Op.ATTEND, tiles=5)) == ((), 0)
    assert rooms(Header(op=Op.ATTEND, status=Status.STALE, q_elements=5)) == ((), 0)


@pytest.mark.parametrize("elements", [10, 100_000])
def test_parts_are_laid_end_to_end_whatever_their_strides(ends: tuple[Link, Link], elements: int) -> None:
    base, pool = ends
    q = [torch.randn(2, elements).T, torch.randn(3, 5)[:, ::2]]
    header, (tiles, *_) = request(torch.cat([t.reshape(-1) for t in q]), torch.zeros(0), torch.zeros(0))
    base.send(header, [tiles, q, [], torch.zeros(0)])
    got = pool.receive().tensors[1]
    assert torch.equal(got, torch.cat([t.reshape(-1) for t in q]))


def test_a_failed_link_wakes_who_waits_and_sends_no_more(ends: tuple[Link, Link]) -> None:
    base, _ = ends
    waiting = threading.Timer(0.3, base.fail, args=("first",))
    waiting.start()
    for _ in range(2):
        with pytest.raises(LinkLost, match="first"):
            base.receive()
    assert base.fail("second") == "first"
    with pytest.raises(LinkLost, match="first"):
        base.send(Header(op=Op.HELLO))


@pytest.mark.parametrize("closer", [0, 1])
def test_closing_one_end_ends_the_other(ends: tuple[Link, Link], closer: int) -> None:
    ends[closer].send(Header(op=Op.FREE, sequence=3))
    ends[closer].close()
    assert ends[1 - closer].receive().header.sequence == 3, "what was sent before arrives"
    with pytest.raises(LinkLost, match="connection ended"):
        ends[1 - closer].receive()


def test_half_a_message_ends_the_link(ends: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing after it could be understood."""
    base, pool = ends

    class Interrupting:
        def sendmsg(self, buffers: list[Any], rights: object) -> int:
            sock.send(buffers[0])
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(sock, name)

    sock = base._socket
    monkeypatch.setattr(base._outgoing, "_socket", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        base.send(*request(torch.zeros(4), torch.zeros(4), torch.zeros(4)))
    assert base.lost
    assert "send failed" in base.lost
    with pytest.raises(LinkLost):
        pool.receive(5.0)


def test_several_links_may_share_an_inbox(loops: tuple[Loop, Loop]) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pairs = [link_pair(*loops, name=f"l{i}", into=inbox.put) for i in range(3)]
    for i, (base, _) in enumerate(pairs):
        base.send(Header(op=Op.HELLO, token=i))
    got = [inbox.get(timeout=5) for _ in pairs]
    assert {(link.name, message.header.token) for link, message in got} == {("l0", 0), ("l1", 1), ("l2", 2)}
    for base, pool in pairs:
        base.close()
        pool.close()


def test_two_callers_may_wait_at_a_time(loops: tuple[Loop, Loop]) -> None:
    pairs = [link_pair(*loops, name=f"l{i}") for i in range(2)]
    got: list[int] = []
    threads = [threading.Thread(target=lambda b=base: got.append(b.receive().header.token)) for base, _ in pairs]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    for number, (_, pool) in enumerate(reversed(pairs)):
        pool.send(Header(op=Op.HELLO, token=number))
        time.sleep(0.1)
    for thread in threads:
        thread.join(5)
    assert sorted(got) == [0, 1]
    for base, pool in pairs:
        base.close()
        pool.close()


def test_a_message_in_the_middle_of_another_comes_after_it(
    ends: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the garbage collector ends a sequence while a request is being sent by the same thread."""
    base, pool = ends
    sock, large = base._socket, torch.randn(2_000_000)

    class Collecting:
        def sendmsg(self, buffers: list[Any], rights: Any) -> int:
            if len(told) < 3:
                told.append(len(told))
                base.send(Header(op=Op.FREE, sequence=told[-1]))
            return int(sock.sendmsg(buffers, rights))

        def __getattr__(self, name: str) -> Any:
            return getattr(sock, name)

    told: list[int] = []
    monkeypatch.setattr(base._outgoing, "_socket", Collecting())
    header, tensors = request(large, large, large)
    base.send(header, tensors)
    message = pool.receive(20.0)
    assert message.header == header
    assert all(torch.equal(got, want) for got, want in zip(message.tensors, tensors, strict=True))
    assert [pool.receive(20.0).header.sequence for _ in told] == told


def test_what_has_come_is_seen_though_the_time_is_over(ends: tuple[Link, Link], loops: tuple[Loop, Loop]) -> None:
    """A process that was stopped finds all deadlines past and all answers there."""
    base, pool = ends
    base.send(Header(op=Op.HELLO, token=3))
    base.drain(0)
    past = time.monotonic() - 1.0
    assert loops[1].wait(lambda: pool._received, lambda: past)
    assert not loops[1].wait(lambda: False, lambda: past)


def test_a_socket_travels_with_a_message(ends: tuple[Link, Link]) -> None:
    base, pool = ends
    mine, its = pair()
    base.send(Header(op=Op.HELLO))
    base.send(Header(op=Op.PEER, peer=4), attached=its)
    assert pool.receive().attached is None
    message = pool.receive()
    assert message.header.peer == 4
    assert message.attached is not None
    with mine, message.attached.socket() as arrived:
        mine.send(b"through")
        assert arrived.recv(7) == b"through"
    assert its.fileno() == -1, "the sender's own descriptor is closed"
