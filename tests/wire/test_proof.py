"""Rings are tried before bodies go there: what loses bytes and reports nothing is found at either end, carries nothing,
and leaves the link with what it had."""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

import pytest
import torch

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.wire import proof
from fapool_plugin.wire.ipc import DeviceRing
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Op, Status
from fapool_plugin.wire.slotted import Slotted
from fapool_plugin.wire.terms import AGREED, Terms
from tests.bodies import RING, flat, request
from tests.fake_cudart import LOST, FakeDevice, Losing
from tests.fake_nixl import FakeNixl
from tests.greetings import greet
from tests.thread_pool import link_pair
from tests.two_ends import ends_of

STAYS = {"ipc": "shm", "nixl": "inline"}


def carrier_of(link: Any) -> Slotted:
    assert isinstance(link.carrier, Slotted)
    return link.carrier


@pytest.mark.parametrize("kind", ["shm", "ipc", "nixl"])
def test_every_byte_counts(loops: tuple[Loop, Loop], kind: str) -> None:
    """Filled it lacks nothing, whichever way; each byte that is changed then is found, and another number's bytes are
    all wrong."""
    with ends_of(kind, loops) as (base, pool):
        for here, there in ((base, pool), (pool, base)):
            proof.fill(carrier_of(here), 17)
            assert proof.lacking(carrier_of(there), 17) == 0
            assert proof.lacking(carrier_of(there), 18) > 0.99 * RING, "what lay there before passes for it"
            ring = carrier_of(there)._mine
            for at in (0, 1, RING // 8 - 1, RING // 8, RING // 2, RING - 1):
                ctypes.c_ubyte.from_address(ring.address + at).value ^= 1  # type: ignore[attr-defined]
            assert proof.lacking(carrier_of(there), 17) == 6


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("end", [0, 1], ids=["base", "rank"])
def test_a_copy_that_loses_bytes_is_found_and_carries_none(loops: tuple[Loop, Loop], how: str, end: int) -> None:
    devices = FakeDevice(Losing(how) if end == 0 else None), FakeDevice(Losing(how) if end == 1 else None)
    with ends_of("ipc", loops, devices) as (base, pool):
        assert (base.carrier.name, pool.carrier.name) == ("shm", "shm")
        assert base.terms.lost_bytes
        assert len(base.terms.notes) == 1, base.terms.notes
        told = "arrived otherwise" if end == 0 else "were not what the other end wrote"
        assert told in base.terms.notes[0]
        header, tensors = request(1, RING // 2)
        base.send(header, tensors)
        for got, want in zip(pool.receive(5.0).tensors, tensors, strict=True):
            assert torch.equal(got.view(-1), flat(want))
        greet(base, pool, devices)  # the next lease
        assert (base.carrier.name, len(base.terms.notes)) == ("shm", 1), "said once, and not tried again"
        for device in devices:
            assert (device.runtime.allocated, device.runtime.opened) == ({}, {}), "memory is kept for nothing"
            assert not device.runtime.freed_open, "given back while the other end had it open"


@pytest.mark.parametrize("end", [0, 1], ids=["base", "rank"])
def test_a_write_by_nixl_that_loses_bytes_is_found(loops: tuple[Loop, Loop], end: int) -> None:
    nixl = FakeNixl()
    makers = nixl.end(), nixl.end()
    makers[end].loses = 1
    with ends_of("nixl", loops, makers=makers) as (base, pool):
        assert (base.carrier.name, pool.carrier.name) == ("inline", "inline")
        assert base.terms.lost_bytes
        assert len(base.terms.notes) == 1, base.terms.notes
        gc.collect()
        assert not nixl.agents, "an agent is kept for nothing"


@pytest.mark.parametrize("kind", ["ipc", "nixl"])
def test_what_takes_too_long_to_fill_is_not_used(
    loops: tuple[Loop, Loop], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "LONGEST_S", -1.0)
    with ends_of(kind, loops) as (base, pool):
        assert (base.carrier.name, pool.carrier.name) == (STAYS[kind], STAYS[kind])
        assert not base.terms.lost_bytes
        assert "cannot be written to from here: 0 of" in base.terms.notes[0]


def test_what_was_not_tried_is_never_used(loops: tuple[Loop, Loop]) -> None:
    """A base that says that all came, before it has named anything, or that only it is content with."""
    base, pool = link_pair(*loops, ring_bytes=RING)
    pool.terms.device = FakeDevice()
    for keep in (AGREED, 1, AGREED):
        if keep == 1:
            assert pool.terms.answered(keep, None, base.terms.offer())[1] is not None
            continue
        with pytest.raises(LinkLost, match="not agreed on"):
            pool.terms.answered(keep, None, None)
    base.close()
    pool.close()


def test_a_rank_that_only_says_that_it_is_content_is_not_believed(loops: tuple[Loop, Loop]) -> None:
    """It names a ring, and answers that it holds all, and has filled the base's, which it has not."""
    base, pool = link_pair(*loops, ring_bytes=RING)
    base.terms.device = FakeDevice()
    ring = DeviceRing(FakeDevice(), RING)
    heard = []

    def lying() -> None:
        message = pool.receive(10.0)
        name = ring.name()
        made = pool.terms.agree(message.attached)
        pool.send(Header(op=Op.HELLO, status=Status.OK, token=1, address=len(name)), [name], made)
        for keep in (1, 1):  # to the ring's name, and to what the base says of it
            heard.append(pool.receive(10.0).header.keep)
            pool.send(Header(op=Op.HELLO, status=Status.OK, token=1, keep=keep))

    thread = threading.Thread(target=lying)
    thread.start()
    assert PoolRank(0, base, 1, RankCounters(0)).open()
    thread.join(10)
    assert heard == [1, 0]
    assert (base.carrier.name, base.terms.lost_bytes) == ("shm", True)
    ring.close()
    base.close()
    pool.close()


@pytest.mark.parametrize("knows", [False, True], ids=["before it has named its own", "after"])
def test_a_ring_that_may_be_written_to_outlives_its_link(loops: tuple[Loop, Loop], knows: bool) -> None:
    """The base is lost while it fills the rank's: that memory stays unused until the base's process has ended, and for
    good where it is not known which that is."""
    devices, ended = (FakeDevice(), FakeDevice()), []
    terms = [Terms(asks, RING, lambda process, then: ended.append((process, then))) for asks in (True, False)]
    base, rank = terms
    for end, device in zip(terms, devices, strict=True):
        end.device = device
    _, name, made = rank.answered(1, None, base.offer())
    base.agree(made)
    assert name is not None
    assert base.open(name)
    mine = base.name()
    assert mine is not None
    if knows:
        assert base.fill()
        assert rank.answered(1, mine, None)[0] == 1
    rank.close()
    assert len(devices[1].runtime.allocated) == 1, "given back while another process fills it"
    assert not devices[1].runtime.opened
    for _, then in ended:
        then()
    assert len(devices[1].runtime.allocated) == (not knows)
    base.close()
