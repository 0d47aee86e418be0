"""Rings in page-locked host memory: registered, copied to, unregistered, unmapped, in this order, whatever ends the
link; and one that cannot be registered is used as it is."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fapool_plugin.devices.copies import Copies
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Op
from fapool_plugin.wire.ring import Ring
from fapool_plugin.wire.sockets import pair
from tests.bodies import RING, agree, flat, request
from tests.fake_cudart import NO_MEMORY, FakeDevice
from tests.thread_pool import link_pair


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def ends(loops: tuple[Loop, Loop], device: FakeDevice) -> Iterator[tuple[Link, Link]]:
    base, pool = link_pair(*loops, timeout_s=20.0, ring_bytes=RING)
    base.terms.device = device
    agree(base, pool)
    yield base, pool
    base.close()
    pool.close()


def send(link: Link, device: FakeDevice, call: int, nbytes: int) -> list[torch.Tensor]:
    """As from a device, as far as the carrier takes it from there."""
    header, tensors = request(call, nbytes)
    parts = [tensors[0], *(flat(part) for part in tensors[1:])]
    if link.carrier.takes(nbytes):
        parts[1:] = map(device.given, parts[1:])
    link.send(header, parts)
    return parts


def send_and_wait(link: Link, device: FakeDevice) -> None:
    for call in range(1, 9):
        send(link, device, call, RING // 2)
    link.receive(15.0)


def calls(device: FakeDevice) -> list[str]:
    """What was asked of the library, without how often or how much."""
    names = [line.split()[0] for line in device.runtime.log]
    return [name for at, name in enumerate(names) if name not in names[:at] or "Register" in name]


@pytest.mark.parametrize("nbytes", [2**13, RING // 2, 5 * RING])
def test_registered_copied_to_unregistered_unmapped(ends: tuple[Link, Link], device: FakeDevice, nbytes: int) -> None:
    base, pool = ends
    for call in range(1, 8):
        wanted = send(base, device, call, nbytes)
        for got, want in zip(pool.receive(20.0).tensors, wanted, strict=True):
            assert torch.equal(got.view(-1), want.view(-1)), "a slot was read before it was written"
    base.close()
    pool.close()
    gc.collect()
    # That it was still mapped then, the stand-in looks for itself.
    assert calls(device) == [
        "cudaHostRegister", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaHostUnregister",
    ]  # fmt: skip
    assert not device.runtime.registered
    assert Path("/proc/self/maps").read_text().count("fapool ring") == 0


def test_a_ring_that_cannot_be_registered_is_used_as_it_is(ends: tuple[Link, Link], device: FakeDevice) -> None:
    base, pool = ends
    device.runtime.fails["cudaHostRegister"] = NO_MEMORY
    for call in (1, 2):
        wanted = send(base, device, call, RING // 2)
        for got, want in zip(pool.receive(20.0).tensors, wanted, strict=True):
            assert torch.equal(got.view(-1), want.view(-1))
    assert device.runtime.log == ["cudaHostRegister"], "tried more than once"
    assert device.runtime.last_error == 0, "torch would take it for its own"
    assert ["page-locked" in note for note in base.terms.notes] == [True]
    staged = Copies().start([torch.zeros(RING)], base.carrier.takes)
    assert staged._event is None, "what is on the host stays there"


def test_small_bodies_need_no_registered_ring(ends: tuple[Link, Link], device: FakeDevice) -> None:
    base, pool = ends
    send(base, device, 1, 300)
    pool.receive(5.0)
    assert device.runtime.log == []


@pytest.mark.parametrize("how", ["lost", "dropped"])
def test_whatever_ends_a_link_its_ring_is_unregistered(loops: tuple[Loop, Loop], device: FakeDevice, how: str) -> None:
    base, pool = link_pair(*loops, timeout_s=20.0, ring_bytes=RING)
    base.terms.device = device
    agree(base, pool)
    with pool.loop.alone():
        for call in range(1, 6):
            send(base, device, call, RING // 2)  # some of them wait for room
    assert device.runtime.registered
    if how == "lost":
        pool.fail("test")
        with pytest.raises(LinkLost):
            base.receive(10.0)
    base.close()
    pool.close()
    assert calls(device)[-1] == "cudaHostUnregister"
    assert not device.runtime.registered


def test_a_forked_child_undoes_nothing(device: FakeDevice) -> None:
    ring, made = Ring.made(RING)
    assert ring.register(device) == ""
    made.close()
    if not (child := os.fork()):
        del ring
        gc.collect()
        os._exit(len(device.runtime.log) - 1)
    assert os.waitpid(child, 0)[1] == 0, "a child has called CUDA, which it must not"
    del ring
    assert device.runtime.log == ["cudaHostRegister", "cudaHostUnregister"]


_DIES = """
import os, signal, socket, sys
import numpy as np
import fapool_plugin.wire.shm as shm
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, Op, Status

link = Link(socket.socket(fileno=int(sys.argv[1])), Loop(), name="peer", timeout_s=60, asks=False)
link.send(Header(op=Op.HELLO, status=Status.OK), attached=link.terms.agree(link.receive().attached))

class Dying:
    def __getattr__(self, name):
        return getattr(np, name)

    def copyto(self, target, source):
        os.kill(os.getpid(), signal.SIGKILL)

shm.np = Dying()
link.receive()
"""


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_a_peer_that_is_killed_in_mid_copy_leaves_nothing_registered(
    loops: tuple[Loop, Loop], device: FakeDevice
) -> None:
    mine, its = pair()
    with its:
        peer = subprocess.Popen([sys.executable, "-c", _DIES, str(its.fileno())], pass_fds=(its.fileno(),))
    base = Link(mine, loops[0], name="test", timeout_s=20, asks=True, ring_bytes=RING)
    base.terms.device = device
    try:
        base.wait_until_heard(30.0)
        base.send(Header(op=Op.HELLO), attached=base.terms.offer())
        base.terms.agree(base.receive(30.0).attached)
        with pytest.raises(LinkLost, match=r"ended|send failed"):
            send_and_wait(base, device)
        assert peer.wait(10) == -signal.SIGKILL
    finally:
        peer.kill()
        peer.wait()
        base.close()
    assert calls(device)[-1] == "cudaHostUnregister"
    assert not device.runtime.registered
