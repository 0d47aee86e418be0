"""Links: what is sent arrives, what is malformed is refused, and a silent or dead end is noticed in time."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import (
    TILE_FIELDS,
    Header,
    LinkLost,
    Op,
    Status,
    bits_float,
    dtype_code,
    float_bits,
    frame_bytes,
    payload,
)
from tests.thread_pool import HOST, link_pair, make_store

_SILENT_PEER = f"""
import sys, time, torch.distributed as dist
from fapool_plugin.wire.link import Link
store = dist.TCPStore("{HOST}", int(sys.argv[1]), None, False)
link = Link(store, "peer", "pool", timeout_s=60, host="{HOST}")
print("up", flush=True)
time.sleep(120)
"""


def close(base: Link, pool: Link) -> None:
    """Ends both, also where a test has failed one of them."""
    for end in (base, pool):
        end.close()
    for end in (base, pool):
        end.join(5)
        assert not any(thread.is_alive() for thread in end._threads)


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    store = make_store()
    base, pool = link_pair(store)
    yield base, pool
    close(base, pool)


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
def test_what_is_sent_arrives_in_order(pair: tuple[Link, Link], dtype: torch.dtype) -> None:
    base, pool = pair
    sent = [request(*(torch.randn(n + i).to(dtype) for n in (1000, 7, 0))) for i in range(20)]
    for header, tensors in sent:
        base.send(header, tensors)
    for header, tensors in sent:
        message = pool.receive()
        assert message.header == header
        for got, want in zip(message.tensors, tensors, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
    base.settle(base.messages_sent)
    assert base.bytes_sent == pool.bytes_received > 0


def test_messages_are_received_ahead_of_use(pair: tuple[Link, Link]) -> None:
    base, pool = pair
    large = torch.zeros(4_000_000)
    base.send(*request(large, large, large))
    base.settle(base.messages_sent)  # would wait for ever if nobody received before receive() is called
    assert pool.receive().tensors[1].numel() == 4_000_000


@given(st.floats(allow_nan=False))
def test_floats_travel_as_bits(value: float) -> None:
    assert bits_float(float_bits(value)) == value


def test_a_payload_that_its_header_does_not_announce_is_refused(pair: tuple[Link, Link]) -> None:
    header, tensors = request(torch.zeros(4), torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="announces"):
        pair[0].send(header, tensors[:-1])
    with pytest.raises(ValueError, match="float8"):
        dtype_code(torch.float8_e4m3fn)


def test_a_malformed_header_ends_the_link(pair: tuple[Link, Link]) -> None:
    base, pool = pair
    with pytest.raises(LinkLost, match="malformed"):
        payload(Header(op=Op.ATTEND, tiles=-1))
    for merged in ({"merge": 1}, {"peers": 1}, {"status": Status.OK, "parts": 1}):
        with pytest.raises(LinkLost, match="malformed"):
            payload(Header(op=Op.BACKWARD, tiles=1, **merged))
    frame = torch.zeros(frame_bytes(), dtype=torch.uint8)
    frame[: 8 * len(Header())].view(torch.int64).copy_(torch.tensor(Header(op=Op.ATTEND, dtype=99)))
    base._data.send([frame], 1, 0).wait()
    with pytest.raises(LinkLost, match="malformed"):
        pool.receive()


def test_a_header_that_announces_more_than_memory_ends_the_link(pair: tuple[Link, Link]) -> None:
    base, pool = pair
    frame = torch.zeros(frame_bytes(), dtype=torch.uint8)
    frame[: 8 * len(Header())].view(torch.int64).copy_(torch.tensor(Header(op=Op.ATTEND, tiles=2**61)))
    base._data.send([frame], 1, 0).wait()
    with pytest.raises(LinkLost, match="connection ended"):
        pool.receive()


def test_a_frame_is_as_long_in_every_version() -> None:
    """Both ends receive so much before either knows the other's version."""
    assert frame_bytes() == 256 + 4096
    assert 8 * len(Header()) <= 256


def test_a_header_of_another_version_announces_nothing() -> None:
    assert payload(Header(version=99, op=Op.ATTEND, tiles=5)) == []
    assert payload(Header(op=Op.ATTEND, status=Status.STALE, q_elements=5)) == []


@pytest.mark.parametrize("elements", [10, 100_000])
def test_parts_are_laid_end_to_end_whatever_their_strides(pair: tuple[Link, Link], elements: int) -> None:
    base, pool = pair
    q = [torch.randn(2, elements).T, torch.randn(3, 5)[:, ::2]]
    header, (tiles, *_) = request(torch.cat([t.reshape(-1) for t in q]), torch.zeros(0), torch.zeros(0))
    base.send(header, [tiles, q, [], torch.zeros(0)])
    got = pool.receive().tensors[1]
    assert torch.equal(got, torch.cat([t.reshape(-1) for t in q]))


def test_a_small_message_is_one_transfer(pair: tuple[Link, Link]) -> None:
    base, _ = pair
    base.send(*request(torch.zeros(900), torch.zeros(0), torch.zeros(0)))
    assert base.bytes_sent == frame_bytes()


def test_a_failed_link_wakes_who_waits_and_sends_no_more(pair: tuple[Link, Link]) -> None:
    base, _ = pair
    assert base.fail("first") == "first"
    assert base.fail("second") == "first"
    for _ in range(2):
        with pytest.raises(LinkLost, match="first"):
            base.receive()
    with pytest.raises(LinkLost, match="first"):
        base.send(Header(op=Op.HELLO))


@pytest.mark.parametrize("closer", [0, 1])
def test_closing_one_end_ends_all_threads_of_both(pair: tuple[Link, Link], closer: int) -> None:
    pair[closer].close()
    for end in pair:
        end.join(5)
        assert not any(thread.is_alive() for thread in end._threads)
    with pytest.raises(LinkLost, match="goodbye"):
        pair[1 - closer].receive()


def test_an_interrupted_message_ends_the_link(pair: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = pair
    header, tensors = request(torch.zeros(4), torch.zeros(4), torch.zeros(4))

    class Interrupting:
        def send(self, *args: object) -> dist.Work:
            raise KeyboardInterrupt

    monkeypatch.setattr(base, "_data", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        base.send(header, tensors)
    assert base.lost
    assert "send failed" in base.lost


def test_goodbye_waits_for_the_end_of_a_message(pair: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its transfers it would be taken for the second one."""
    base, pool = pair
    post, sizes = base._post, []

    def slow(transfer: torch.Tensor) -> None:
        sizes.append(transfer.numel())
        post(transfer)
        time.sleep(0.2)

    monkeypatch.setattr(base, "_post", slow)
    sender = threading.Thread(target=base.send, args=request(torch.zeros(5000), torch.zeros(0), torch.zeros(0)))
    sender.start()
    while not sizes:
        time.sleep(0.01)
    base.close()
    sender.join(5)
    assert sizes[0] == sizes[2] == frame_bytes() < sizes[1]
    assert pool.receive().tensors[1].numel() == 5000
    with pytest.raises(LinkLost, match="goodbye"):
        pool.receive()


def test_nothing_is_sent_after_half_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store()
    base, pool = link_pair(store)
    post, sizes = base._post, []

    def interrupted(transfer: torch.Tensor) -> None:
        sizes.append(transfer.numel())
        if len(sizes) > 1:
            raise KeyboardInterrupt
        post(transfer)

    with monkeypatch.context() as patched:
        patched.setattr(base, "_post", interrupted)
        with pytest.raises(KeyboardInterrupt):
            base.send(*request(torch.zeros(5000), torch.zeros(0), torch.zeros(0)))
        base.close()
    assert len(sizes) == 2, "a goodbye would be taken for the rest"
    pool.close()
    base.join(5)
    # What the other end waits for ends with the connection.
    base._data = base._pulse = None
    base._outgoing.clear()
    pool.join(5)
    assert not any(thread.is_alive() for end in (base, pool) for thread in end._threads)


@pytest.mark.processes
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("how", "limit_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 4.0)])
def test_a_dead_or_stopped_end_is_noticed_in_time(how: signal.Signals, limit_s: float) -> None:
    store = make_store()
    command = [sys.executable, "-c", _SILENT_PEER, str(store.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as peer:
        try:
            base = Link(store, "peer", "base", timeout_s=1.5, host=HOST)
            assert peer.stdout is not None
            peer.stdout.readline()
            time.sleep(0.5)
            assert base.lost is None
            os.kill(peer.pid, how)
            began = time.monotonic()
            with pytest.raises(LinkLost):
                base.receive()
            took = time.monotonic() - began
            assert took < limit_s, f"noticed after {took:.2f} s"
        finally:
            peer.kill()
    base.join(5)


def test_an_idle_link_stays_up_longer_than_its_timeouts() -> None:
    store = make_store()
    base, pool = link_pair(store, timeout_s=0.5, connect_timeout_s=1.0)
    time.sleep(2.0)
    base.send(Header(op=Op.HELLO, token=7))
    assert pool.receive().header.token == 7
    assert (base.lost, pool.lost) == (None, None)
    close(base, pool)


@pytest.mark.timeout(30)
def test_an_end_that_never_comes_is_not_waited_for_for_ever() -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="timeout"):
        Link(make_store(), "alone", "base", timeout_s=1.0, connect_timeout_s=1.0, host=HOST)
    took = time.monotonic() - began
    assert took < 10, f"waited {took:.1f} s"


def test_several_links_may_share_an_inbox() -> None:
    store = make_store()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pairs = [link_pair(store, f"l{i}", into=inbox.put) for i in range(3)]
    for i, (base, _) in enumerate(pairs):
        base.send(Header(op=Op.HELLO, token=i))
    got = [inbox.get() for _ in pairs]
    assert {(link.name, message.header.token) for link, message in got} == {("l0", 0), ("l1", 1), ("l2", 2)}
    for base, pool in pairs:
        close(base, pool)


def test_the_store_listens_on_its_host_alone() -> None:
    store = make_store()
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening if address.port == store.port} == {HOST}
