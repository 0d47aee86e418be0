"""Bodies between devices, with a stand-in for CUDA's runtime: what is sent arrives in the other end's memory, a slot
has its bytes before its header goes and is given back after they were taken, liars lose their link."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.sockets import pair
from tests.bodies import RING, answer, answer_bytes, flat, request
from tests.fake_cudart import FakeDevice
from tests.greetings import greet
from tests.thread_pool import link_pair

CALLS = 8


@pytest.fixture
def devices() -> tuple[FakeDevice, FakeDevice]:
    return FakeDevice(), FakeDevice()


@pytest.fixture
def ends(loops: tuple[Loop, Loop], devices: tuple[FakeDevice, FakeDevice]) -> Iterator[tuple[Link, Link]]:
    base, pool = link_pair(*loops, timeout_s=20.0, ring_bytes=RING)
    greet(base, pool, devices)
    assert (base.carrier.name, pool.carrier.name) == ("ipc", "ipc")
    yield base, pool
    base.close()
    pool.close()


def on(device: FakeDevice, tensors: list[Any]) -> list[Any]:
    """The same, on a device: tables stay, and each part is in one piece, as what is sent from a device is."""
    return [tensors[0], *(device.given(flat(part)) for part in tensors[1:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nbytes", [300, 2**13, RING // 2, RING, 5 * RING])
def test_what_is_sent_arrives_on_the_other_device(
    ends: tuple[Link, Link], devices: tuple[FakeDevice, FakeDevice], nbytes: int, dtype: torch.dtype
) -> None:
    base, pool = ends
    sent = [request(call, nbytes, dtype) for call in range(1, 3 + 4 * RING // nbytes if nbytes > 300 else 9)]
    for header, tensors in sent:
        base.send(header, on(devices[0], tensors))
    for header, tensors in sent:
        message = pool.receive(20.0)
        assert message.header == header, "where a body was is not told"
        for got, want in zip(message.tensors, tensors, strict=True):
            assert torch.equal(got.view(-1), flat(want))
        assert [devices[1].holds(x) for x in message.tensors] == [False, True, True, True], "a table is the host's"
    log = devices[0].runtime.log
    assert "cudaMemcpyAsync" in " ".join(log)


def test_a_header_goes_after_its_copy_and_a_slot_comes_back_after_it_was_taken(
    ends: tuple[Link, Link], devices: tuple[FakeDevice, FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pool = ends
    together: list[str] = []
    for name, link, device in (("base", base, devices[0]), ("rank", pool, devices[1])):
        device.runtime.log = log = Named(name, together)
        sock = link._outgoing._socket

        class Told:
            def __init__(self, sock: Any, log: Named) -> None:
                self.sock, self.log = sock, log

            def sendmsg(self, *args: Any) -> int:
                self.log.append("says")
                return int(self.sock.sendmsg(*args))

            def __getattr__(self, attribute: str) -> Any:
                return getattr(self.sock, attribute)

        monkeypatch.setattr(link._outgoing, "_socket", Told(sock, log))
    header, tensors = request(1, RING // 4)
    base.send(header, on(devices[0], tensors), answer_bytes=answer_bytes(2**13))
    asked = pool.receive(10.0).header
    told, parts = answer(asked, 2**13)
    pool.send(told, [devices[1].given(x) for x in parts])
    base.receive(10.0)
    seen = [line for at, line in enumerate(together) if "BEAT" not in line and line not in together[at - 1 : at]]
    assert seen == [
        "base copies", "base waits", "base says",
        "rank copies", "rank waits",  # out of the slot
        "rank copies", "rank waits",  # the table of what was copied out, to the host
        "rank copies", "rank waits", "rank says",
        "base copies", "base waits",
    ]  # fmt: skip


class Named(list[str]):
    """A log that several write to."""

    def __init__(self, name: str, together: list[str]) -> None:
        super().__init__()
        self.name, self.together = name, together

    def append(self, line: str) -> None:
        short = {"cudaMemcpyAsync": "copies", "cudaStreamSynchronize": "waits", "says": "says"}.get(line.split()[0])
        if short:
            self.together.append(f"{self.name} {short}")


def serve(pool: Link, device: FakeDevice, nbytes: int, ended: list[Any]) -> None:
    try:
        while True:
            message = pool.receive()
            want = request(message.header.call, int(message.header.sequence))[1]
            assert all(torch.equal(got.view(-1), flat(part)) for got, part in zip(message.tensors, want, strict=True))
            header, parts = answer(message.header._replace(sequence=0), nbytes)
            pool.send(header, [device.given(x) for x in parts])
            pool.drain(8)
    except LinkLost:
        pass
    except BaseException as error:
        ended.append(error)
        pool.fail(str(error))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("asked", "answered"), [(RING // 4, RING // 4), (2 * RING, 2 * RING)])
def test_eight_outstanding_calls_do_not_wait_in_a_circle(
    ends: tuple[Link, Link], devices: tuple[FakeDevice, FakeDevice], asked: int, answered: int
) -> None:
    base, pool = ends
    ended: list[Any] = []
    thread = threading.Thread(target=serve, args=(pool, devices[1], answered, ended))
    thread.start()
    try:
        for _ in range(2):
            for call in range(1, CALLS + 1):
                header, tensors = request(call, asked)
                base.send(header._replace(sequence=asked), on(devices[0], tensors), answer_bytes=answer_bytes(answered))
            for call in range(1, CALLS + 1):
                message = base.receive(15.0)
                assert message.header.call == call
                assert message.tensors[0].tolist() == [call] * (answered // 4)
        assert not ended, ended
    finally:
        base.close()
        thread.join(20)
        assert not thread.is_alive()


def test_a_device_without_memory_takes_bodies_on_the_host(
    ends: tuple[Link, Link], devices: tuple[FakeDevice, FakeDevice]
) -> None:
    base, pool = ends
    for device in devices:
        device.is_full = True
    for call, nbytes in ((1, 2**13), (2, 3 * RING)):
        header, tensors = request(call, nbytes)
        base.send(header, on(devices[0], tensors))
        message = pool.receive(10.0)
        assert not any(devices[1].holds(x) for x in message.tensors)
        for got, want in zip(message.tensors, tensors, strict=True):
            assert torch.equal(got.view(-1), flat(want))


def test_a_copy_that_fails_loses_the_link_and_raises_nothing_else(
    ends: tuple[Link, Link], devices: tuple[FakeDevice, FakeDevice]
) -> None:
    base, pool = ends
    devices[0].runtime.fails["cudaStreamSynchronize"] = 700
    header, tensors = request(1, 2**13)
    with pytest.raises(LinkLost, match="cudaStreamSynchronize failed with error 700"):
        base.send(header, on(devices[0], tensors))
    assert devices[0].runtime.last_error == 0, "torch would take it for its own"
    with pytest.raises(LinkLost):
        pool.receive(5.0)


def test_memory_ends_with_the_link(loops: tuple[Loop, Loop]) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        pairs = FakeDevice(), FakeDevice()
        base, pool = link_pair(*loops, ring_bytes=RING)
        for link in (base, pool):
            link.terms._when_ended = lambda process, ended: ended()  # as the other end's process does
        greet(base, pool, pairs)
        with pool.loop.alone():
            for call in range(1, 9):
                header, tensors = request(call, RING // 2)
                base.send(header, on(pairs[0], tensors))
            base.close()
        pool.close()
        for device in pairs:
            runtime = device.runtime
            assert (runtime.allocated, runtime.opened, runtime.registered) == ({}, {}, {}), "memory is left"
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("fapool ring") == 0
    assert len(os.listdir("/proc/self/fd")) == before


_DIES = """
import os, signal, socket, sys
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Status
from tests.fake_cudart import FakeDevice, FakeRuntime
from tests.greetings import hear

class Dying(FakeRuntime):
    left = 0
    def done(self, target, source, size):
        self.left -= 1
        if self.left == 0:
            super().done(target, source, size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        super().done(target, source, size)

device = FakeDevice(Dying())
link = Link(socket.socket(fileno=int(sys.argv[1])), Loop(), name="peer", timeout_s=60, asks=False)
link.terms.device = device
hear(link)
if sys.argv[2] == "reading":
    device.runtime.left = int(sys.argv[3])
while True:
    message = link.receive()
    if sys.argv[2] == "writing":
        device.runtime.left = int(sys.argv[3])
    x = message.tensors[1]
    link.send(message.header._replace(status=Status.OK, k_elements=0, v_elements=0), [x, x[:0]])
"""


@pytest.mark.processes
@pytest.mark.timeout(60)
@pytest.mark.parametrize("when", ["reading", "writing"])
def test_an_end_killed_in_the_middle_of_a_copy_is_lost_and_a_new_link_works(
    loops: tuple[Loop, Loop], when: str
) -> None:
    device = FakeDevice()
    for dies in (2, 10**9):
        mine, its = pair()
        with its:
            peer = subprocess.Popen(
                [sys.executable, "-c", _DIES, str(its.fileno()), when, str(dies)], pass_fds=(its.fileno(),)
            )
        base = Link(mine, loops[0], name="test", timeout_s=20, asks=True, ring_bytes=RING)
        base.terms.device = device
        try:
            base.wait_until_heard(30.0)
            rank = PoolRank(0, base, 1, RankCounters(0))
            rank.open()
            assert base.carrier.name == "ipc", base.terms.notes
            base.check = lambda header: None
            if dies == 2:
                with pytest.raises(LinkLost, match=r"ended|send failed"):
                    _calls(base, device)
                assert peer.wait(10) == -signal.SIGKILL
            else:
                _calls(base, device)
        finally:
            peer.kill()
            peer.wait()
            base.close()
    assert (device.runtime.allocated, device.runtime.opened) == ({}, {})


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_memory_is_nobodys_while_an_end_that_was_lost_may_still_write(loops: tuple[Loop, Loop]) -> None:
    device = FakeDevice()
    mine, its = pair()
    with its:
        peer = subprocess.Popen(
            [sys.executable, "-c", _DIES, str(its.fileno()), "reading", str(10**9)], pass_fds=(its.fileno(),)
        )
    base = Link(mine, loops[0], name="test", timeout_s=20, asks=True, ring_bytes=RING)
    base.terms.device = device
    try:
        base.wait_until_heard(30.0)
        PoolRank(0, base, 1, RankCounters(0)).open()
        os.kill(peer.pid, signal.SIGSTOP)
        base.fail("it stands still")
        base.close()
        assert not device.runtime.opened
        assert len(device.runtime.allocated) == 1, "given back while another process has it open"
    finally:
        peer.kill()
        peer.wait()
    deadline = time.monotonic() + 20
    while device.runtime.allocated and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not device.runtime.allocated, "kept after the other process has ended"


def _calls(base: Link, device: FakeDevice) -> None:
    for call in range(1, 4):
        header, tensors = request(call, 3 * RING)
        base.send(header, on(device, tensors), answer_bytes=4 * header.q_elements)
    for call in range(1, 4):
        got = base.receive(15.0).tensors[0]
        assert torch.equal(got, flat(request(call, 3 * RING)[1][1]))
