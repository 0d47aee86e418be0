"""Bodies that NIXL writes, with a stand-in for it: what is sent arrives, a header goes after its write, what cannot be
agreed on stays on the socket, a write that fails or is late loses the link, and so does a liar."""

from __future__ import annotations

import gc
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.ranks.linked import check_nixl
from fapool_plugin.ranks.pools import pool_maker
from fapool_plugin.wire import window
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Op, Status, header_bytes
from fapool_plugin.wire.nixl import Nixl
from fapool_plugin.wire.seal import answer as seal_answer
from fapool_plugin.wire.seal import call as seal_call
from fapool_plugin.wire.sockets import connect, listen
from tests.bodies import RING, answer_bytes, flat, request
from tests.fake_cudart import FakeDevice
from tests.fake_nixl import End, FakeNixl
from tests.greetings import greet
from tests.tcp import tcp_pair
from tests.thread_pool import link_pair
from tests.wire.test_ipc import serve

Ends = tuple[Link, Link]
CALLS = 8


@pytest.fixture
def nixl() -> FakeNixl:
    return FakeNixl()


@pytest.fixture
def makers(nixl: FakeNixl) -> tuple[End, End]:
    return nixl.end(), nixl.end()


@pytest.fixture
def ends(loops: tuple[Loop, Loop], makers: tuple[End, End]) -> Iterator[Ends]:
    base, pool = tcp_pair(loops, makers, RING, 20.0)
    greet(base, pool, (None, None))
    assert (base.carrier.name, pool.carrier.name) == ("nixl", "nixl"), (base.terms.notes, pool.terms.notes)
    yield base, pool
    base.close()
    pool.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nbytes", [300, 2**13, RING // 2, RING, 5 * RING])
def test_what_is_sent_arrives(ends: Ends, nixl: FakeNixl, nbytes: int, dtype: torch.dtype) -> None:
    """So often that every part of the ring is used more than once."""
    base, pool = ends
    tried = len(nixl.log)
    sent = [request(call, nbytes, dtype) for call in range(1, 3 + 4 * RING // nbytes if nbytes > 300 else 9)]
    for header, tensors in sent:
        base.send(header, tensors)
    for header, tensors in sent:
        message = pool.receive(20.0)
        assert message.header == header, "where a body was is not told"
        for got, want in zip(message.tensors, tensors, strict=True):
            assert torch.equal(got.view(-1), flat(want))
    assert (len(nixl.log) > tried) == (nbytes > 300), "small bodies go over the socket, and large ones do not"


def test_a_header_goes_after_its_write(ends: Ends, nixl: FakeNixl, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next part is begun before the last one is waited for."""
    base, pool = ends
    nixl.log.clear()
    sock = base._outgoing._socket

    class Told:
        def sendmsg(self, buffers: Any, *rest: Any) -> int:
            nixl.log.append("says")
            return int(sock.sendmsg(buffers, *rest))

        def __getattr__(self, name: str) -> Any:
            return getattr(sock, name)

    monkeypatch.setattr(base._outgoing, "_socket", Told())
    header, tensors = request(1, RING // 8)
    base.send(header, tensors)
    pool.receive(10.0)
    said = [line for line in nixl.log if line != "BEAT"]
    assert said.count("begun") == said.count("done") == said.count("says") > 2
    for line, most in (("done", "begun"), ("says", "done")):
        for at in range(len(said)):
            assert said[:at].count(line) <= said[:at].count(most), f"{said}: {line} before {most}"
    assert said[:3] == ["begun", "begun", "done"], "the copy of a part waits for the write of the last"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("asked", "answered"), [(RING // 4, RING // 4), (2 * RING, 2 * RING)])
def test_eight_outstanding_calls_do_not_wait_in_a_circle(ends: Ends, asked: int, answered: int) -> None:
    base, pool = ends
    ended: list[Any] = []
    thread = threading.Thread(target=serve, args=(pool, FakeDevice(), answered, ended))
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
    finally:
        base.close()
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("call", ["initialize_xfer", "transfer", "check_xfer_state"])
@pytest.mark.parametrize("nbytes", [RING // 4, 3 * RING])
def test_a_write_that_fails_loses_the_link_and_raises_nothing_else(
    ends: Ends, makers: tuple[End, End], call: str, nbytes: int
) -> None:
    base, pool = ends
    makers[0].fails[call] = "NIXL_ERR_REMOTE_DISCONNECT"
    with pytest.raises(LinkLost, match=f"NIXL's {call} failed: NIXL_ERR_REMOTE_DISCONNECT"):
        base.send(*request(1, nbytes))
    with pytest.raises(LinkLost):
        pool.receive(5.0)


def test_a_write_that_ends_otherwise_or_is_late_loses_the_link(
    loops: tuple[Loop, Loop], makers: tuple[End, End]
) -> None:
    for state, late, match in (("ERR", 3, "ended as ERR"), ("DONE", 10**9, "not done within 0.5 s")):
        base, pool = tcp_pair(loops, makers, RING, 0.5)
        greet(base, pool, (None, None))
        makers[0].state, makers[0].late = state, late
        began = time.monotonic()
        with pytest.raises(LinkLost, match=match):
            base.send(*request(1, RING // 4))
        assert time.monotonic() - began < 10.0, "the link's patience is not kept"
        with pytest.raises(LinkLost):
            pool.receive(5.0)
        base.close()
        pool.close()
        makers[0].state, makers[0].late = "DONE", 3


@pytest.mark.parametrize("call", ["agent", "register_memory", "get_agent_metadata", "add_remote_agent", "transfer"])
@pytest.mark.parametrize("end", [0, 1], ids=["base", "rank"])
def test_where_it_cannot_be_had_bodies_stay_on_the_socket(
    loops: tuple[Loop, Loop], nixl: FakeNixl, makers: tuple[End, End], end: int, call: str
) -> None:
    makers[end].fails[call] = "no such luck"
    base, pool = tcp_pair(loops, makers, RING, 20.0)
    for _ in range(2):
        rank = greet(base, pool, (None, None))
        assert (base.carrier.name, pool.carrier.name) == ("inline", "inline")
        assert len(base.terms.notes) == 1, "said once, and not tried again"
        base.check = lambda header: None
    assert rank.link is base
    header, tensors = request(1, RING)
    base.send(header, tensors)
    assert torch.equal(pool.receive(5.0).tensors[3], tensors[3])
    gc.collect()
    assert not nixl.agents, "an agent is kept for nothing"
    base.close()
    pool.close()


def test_a_rank_without_it_is_said_so(loops: tuple[Loop, Loop], makers: tuple[End, End]) -> None:
    for which in ((makers[0], None), (None, makers[1])):
        base, pool = tcp_pair(loops, which, RING, 20.0)
        greet(base, pool, (None, None))
        assert (base.carrier.name, pool.carrier.name) == ("inline", "inline")
        assert base.terms.notes == (
            ["bodies go on the link's socket: it has no NIXL, or was not told of it"] if which[0] else []
        )
        base.close()
        pool.close()


def test_links_of_one_machine_and_under_a_key_have_none(loops: tuple[Loop, Loop], makers: tuple[End, End]) -> None:
    base, pool = link_pair(*loops)
    assert base.terms.wish == 0
    near = Link(base._socket.dup(), loops[0], name="near", timeout_s=5, asks=True, window=lambda timeout_s: 1 / 0)  # type: ignore[arg-type, return-value]
    assert near.terms.wish == 0, "on one machine there is shm"
    near.close()
    base.close()
    pool.close()
    listener, address = listen("tcp:127.0.0.1:0")
    with listener:
        mine = connect(address, 5.0)
        its, _ = listener.accept()
    sealed: list[Any] = []
    thread = threading.Thread(target=lambda: sealed.append(seal_answer(its, b"k" * 32, 10.0)))
    thread.start()
    far = Link(
        seal_call(mine, b"k" * 32, "x", 10.0), loops[0], name="far", timeout_s=5, asks=True,
        window=lambda timeout_s: window.Window(makers[0], RING, timeout_s),
    )  # fmt: skip
    thread.join(10)
    assert far.terms.wish == 0, "under a key nothing goes unencrypted"
    far.close()
    sealed[0].close()


@pytest.mark.parametrize("lie", ["size", "address", "nonce", "short", "metadata", "unasked", "long"])
def test_a_name_that_is_none_is_never_used(loops: tuple[Loop, Loop], makers: tuple[End, End], lie: str) -> None:
    base, pool = tcp_pair(loops, (None if lie == "unasked" else makers[0], makers[1]), RING, 20.0)
    true = window.Window(makers[1], RING, 20.0)
    size, address, nonce = struct.unpack("<qqq", bytes(true.name().tolist())[:24])
    rest = bytes(true.name().tolist())[24:]
    told = {
        "size": struct.pack("<qqq", 2 * size, address, nonce) + rest,
        "address": struct.pack("<qqq", size, -address, nonce) + rest,
        "nonce": struct.pack("<qqq", size, address, -1) + rest,
        "short": b"\0" * 24,
        "metadata": struct.pack("<qqq", size, address, nonce) + b"garbage",
        "unasked": struct.pack("<qqq", size, address, nonce) + rest,
        "long": struct.pack("<qqq", size, address, nonce) + rest.ljust(16 * 1024),
    }[lie]
    name = torch.tensor(list(told), dtype=torch.uint8)

    def lying() -> None:
        pool.receive(10.0)
        header = Header(op=Op.HELLO, status=Status.OK, token=1, address=len(name))
        if lie == "long":
            pool._socket.send(header_bytes(header))
            return
        pool.send(header, [name])
        pool.receive(10.0)
        pool.send(Header(op=Op.HELLO, status=Status.OK, token=1))

    def suppressed() -> None:
        with suppress(LinkLost):
            lying()

    thread = threading.Thread(target=suppressed)
    thread.start()
    if lie == "metadata":
        PoolRank(0, base, 1, RankCounters(0)).open()
        assert base.carrier.name == "inline"
    else:
        with pytest.raises(LinkLost, match=r"offers|not asked for|malformed"):
            PoolRank(0, base, 1, RankCounters(0)).open()
    base.close()
    thread.join(15)
    assert not thread.is_alive()
    true.close()
    pool.close()


def test_a_name_that_a_rank_did_not_ask_for_loses_the_link(
    loops: tuple[Loop, Loop], nixl: FakeNixl, makers: tuple[End, End]
) -> None:
    base, pool = tcp_pair(loops, makers, RING, 20.0)
    theirs = window.Window(makers[0], RING, 20.0)
    for keep in (0, 1, 2):
        with pytest.raises(LinkLost, match="not asked for"):
            pool.terms.answered(keep, theirs.name(), None)
    assert nixl.made == 1, "an agent was made for it"
    theirs.close()
    base.close()
    pool.close()


def test_a_base_that_asks_again_and_again_gets_one_agent(
    loops: tuple[Loop, Loop], nixl: FakeNixl, makers: tuple[End, End]
) -> None:
    base, pool = tcp_pair(loops, (None, makers[1]), RING, 20.0)
    names = [pool.terms.answered(keep, None, None)[1] for keep in (1, 2, 2, 0, 2, 0, 2)]
    assert [name is not None for name in names] == [False, True, True, False, False, False, False]
    assert nixl.made == 1, f"{nixl.made} agents, and each takes addresses for good"
    base.close()
    pool.close()


def test_agents_end_with_the_link_and_addresses_stay(loops: tuple[Loop, Loop], nixl: FakeNixl) -> None:
    """What an end that was lost by mistake still writes must hit nothing of this process."""
    base, pool = tcp_pair(loops, (nixl.end(), nixl.end()), RING, 20.0)
    greet(base, pool, (None, None))
    base.send(*request(1, RING // 2))
    pool.receive(5.0)
    carrier = pool.carrier
    assert isinstance(carrier, Nixl)
    mine = carrier._window.mine
    ring = np.frombuffer(carrier._window._pages, dtype=np.uint8)
    assert ring.any()
    base.close()
    pool.close()
    assert not ring.any(), "pages are kept that nothing uses"
    address = mine.address
    del carrier, mine, ring
    gc.collect()
    assert not nixl.agents, "an agent outlives its link"
    with open("/proc/self/maps", encoding="ascii") as maps:
        areas = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    assert any(low <= address and address + RING <= high for low, high in areas), "its addresses were given away"


def test_an_end_on_a_device_copies_by_page_locked_memory(loops: tuple[Loop, Loop], makers: tuple[End, End]) -> None:
    devices = FakeDevice(), FakeDevice()
    base, pool = tcp_pair(loops, makers, RING, 20.0)
    greet(base, pool, devices)
    header, tensors = request(1, RING // 2)
    for link in (base, pool):
        assert link.terms.notes == ["bodies come to the host first: NIXL is given no memory of GPUs"]
    assert base.carrier.takes(RING // 2)
    base.send(header, [tensors[0], *(devices[0].given(flat(part)) for part in tensors[1:])])
    message = pool.receive(10.0)
    for got, want in zip(message.tensors, tensors, strict=True):
        assert torch.equal(got.view(-1), flat(want))
    assert devices[0].runtime.registered
    base.close()
    pool.close()
    assert not devices[0].runtime.registered, "page-locked for good"


@pytest.mark.parametrize(
    ("keys", "one_machine", "match"),
    [
        ({"insecure": True}, True, "on one machine"),
        ({"insecure": True, "pool": "ray"}, False, "pool is ray"),
        ({"insecure": True, "pool": "local"}, True, "pool is local"),
        ({"insecure": False}, False, "not encrypted"),
        ({"insecure": True, "link_key_file": "/key"}, False, "not encrypted"),
        ({"insecure": True}, False, "pip install"),
    ],
)
def test_it_is_refused_where_it_cannot_be(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], one_machine: bool, match: str
) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    config = FAPoolConfig(**{"pool": "launch", **keys}, carrier="nixl")
    with pytest.raises(FAPoolConfigError, match=match):
        check_nixl(config, one_machine=one_machine)
    if config.pool == "local":
        with pytest.raises(FAPoolConfigError, match=match):
            pool_maker(config)
    check_nixl(FAPoolConfig(), one_machine=True)
