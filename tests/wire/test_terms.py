"""What two ends agree on at HELLO: rings on devices if each can open the other's, the host's memory if not, and no
memory of those who lie."""

from __future__ import annotations

import threading

import pytest
import torch

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.devices.cudart import Cudart
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.wire.ipc import DeviceRing
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Op, Status
from tests.bodies import RING, flat, request
from tests.fake_cudart import NO_MEMORY, FakeDevice
from tests.greetings import greet, hear
from tests.thread_pool import link_pair

PEER_ACCESS = 217
"""cudaErrorPeerAccessUnsupported."""


@pytest.fixture
def devices() -> tuple[FakeDevice, FakeDevice]:
    return FakeDevice(), FakeDevice()


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaIpcGetMemHandle", "cudaIpcOpenMemHandle"])
@pytest.mark.parametrize("end", [0, 1], ids=["base", "rank"])
def test_where_memory_cannot_be_shared_bodies_go_through_the_hosts(
    loops: tuple[Loop, Loop], devices: tuple[FakeDevice, FakeDevice], end: int, call: str
) -> None:
    devices[end].runtime.fails[call] = PEER_ACCESS if "Open" in call else NO_MEMORY
    base, pool = link_pair(*loops, timeout_s=20.0, ring_bytes=RING)
    greet(base, pool, devices)
    assert (base.carrier.name, pool.carrier.name) == ("shm", "shm")
    assert len(base.terms.notes) == 1, base.terms.notes
    assert "go through host memory" in base.terms.notes[0]
    header, tensors = request(1, 2**13)
    base.send(header, tensors)
    for got, want in zip(pool.receive(5.0).tensors, tensors, strict=True):
        assert torch.equal(got.view(-1), flat(want))
    greet(base, pool, devices)  # the next lease
    assert (base.carrier.name, len(base.terms.notes)) == ("shm", 1), "said once, and not tried again"
    for device in devices:
        assert not device.runtime.opened, "opened memory is kept for nothing"
        assert not device.runtime.freed_open, "given back while the other end had it open"
    base.close()
    pool.close()
    devices[end].runtime.fails.clear()
    for device in devices:
        assert device.runtime.last_error == 0
        leaked = 1 if (call, device is devices[end]) == ("cudaIpcGetMemHandle", True) else 0
        assert len(device.runtime.allocated) <= leaked, "a ring is kept for nothing"


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
def test_between_a_device_and_a_cpu_bodies_go_through_the_hosts_memory(
    loops: tuple[Loop, Loop], which: tuple[bool, bool]
) -> None:
    base, pool = link_pair(*loops, ring_bytes=RING)
    greet(base, pool, tuple(FakeDevice() if has else None for has in which))  # type: ignore[arg-type]
    assert (base.carrier.name, pool.carrier.name) == ("shm", "shm")
    base.close()
    pool.close()


@pytest.mark.parametrize(("carrier", "agreed"), [("auto", "ipc"), ("ipc", "ipc"), ("shm", "shm")])
def test_what_is_configured_says_which(
    loops: tuple[Loop, Loop], devices: tuple[FakeDevice, FakeDevice], carrier: str, agreed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Cudart, "of", lambda device: devices[0])
    base, pool = link_pair(*loops, timeout_s=20.0, ring_bytes=RING)
    pool.terms.device = devices[1]
    thread = threading.Thread(target=hear, args=(pool,), daemon=True)
    thread.start()
    rank = PoolRank(0, base, 1, RankCounters(0))
    assert rank.open(device=torch.device("cuda:0"), carrier=carrier)
    thread.join(10)
    assert (base.terms.device, base.carrier.name, rank.counters.carrier) == (devices[0], agreed, agreed)
    assert base.terms.notes == []
    base.close()
    pool.close()


@pytest.mark.parametrize("lie", ["size", "short", "long", "unasked"])
def test_a_name_that_is_none_loses_the_link(
    loops: tuple[Loop, Loop], devices: tuple[FakeDevice, FakeDevice], lie: str
) -> None:
    base, pool = link_pair(*loops, ring_bytes=RING)
    ring = DeviceRing(devices[1], RING // 2 if lie == "size" else RING)
    name = ring.name()
    name = name[:-1] if lie == "short" else torch.cat([name, name[:1]]) if lie == "long" else name
    if lie != "unasked":
        base.terms.device = devices[0]

    def lying() -> None:
        message = pool.receive(10.0)
        made = pool.terms.agree(message.attached)
        pool.send(Header(op=Op.HELLO, status=Status.OK, token=1, address=len(name)), [name], made)

    thread = threading.Thread(target=lying)
    thread.start()
    with pytest.raises(LinkLost, match=r"offers|not asked for"):
        PoolRank(0, base, 1, RankCounters(0)).open()
    thread.join(10)
    ring.close()
    base.close()
    pool.close()
