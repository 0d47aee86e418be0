"""Calls whose bodies go from device to device, with stand-ins for devices: exact, though every copy is late, memory is
taken by nothing else, and what the host reads of a message is the host's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.devices.copies import Copies
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.wire.link import Link
from tests.base.test_attention import Stream, check, dense
from tests.base.test_gradients import inputs, pooled
from tests.base.test_streams import GPU, RecordedPool
from tests.bodies import RING
from tests.fake_cudart import FakeDevice, Losing
from tests.recorded_streams import Recorder


class DevicePool(RecordedPool):
    """Ranks whose links have devices at both ends."""

    ring_bytes = RING
    fails = ""
    """A call that no base's device can do."""
    loses = ""
    """What becomes of a base's copies to a rank's device."""
    shares = True
    """Whether devices' memory may be opened elsewhere."""

    def acquire(self, announce: Callable[[str], object], base: torch.device = GPU) -> dict[int, Link]:
        links = super().acquire(announce, base)
        for link in [*links.values(), *self.ends]:
            if link.terms.device is None:
                runtime = Losing(self.loses) if self.loses and link in links.values() else None
                link.terms.device = device = FakeDevice(runtime, all_floats=True)
                link.terms.uses_device_rings = self.shares
                if self.fails and link in links.values():
                    device.runtime.fails[self.fails] = 1
        return links


class PoolWithoutPeerAccess(DevicePool):
    fails = "cudaIpcOpenMemHandle"


class PoolThatLosesBytes(DevicePool):
    loses = "a byte of each"


class HostMemoryPool(DevicePool):
    """Rings in page-locked host memory, small ones, so that all goes there."""

    ring_bytes, shares = 2**14, False


class PoolWithoutRegistering(HostMemoryPool):
    fails = "cudaHostRegister"


@contextmanager
def manager_of(pool: type[DevicePool] = DevicePool, **keys: Any) -> Iterator[ResourceManager]:
    with ResourceManager(FAPoolConfig(threshold=0, kv_block=4, memory_limit_mib=64, **keys), pool) as manager:
        manager.copies = Copies(Recorder())
        yield manager


def device_of(link: Link) -> FakeDevice:
    assert isinstance(link.terms.device, FakeDevice)
    return link.terms.device


def carriers(manager: ResourceManager) -> list[str]:
    return [rank["carrier"] for rank in manager.stats()["ranks"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("pool", [DevicePool, HostMemoryPool])
def test_prompts_chunks_and_steps_are_exact(pool: type[DevicePool], ranks: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    with manager_of(pool, pool_ranks=ranks, reduction="tree", spot_check=1.0) as manager, torch.no_grad():
        stream = Stream(manager, (0, 0, 5, 0), dtype)
        for new in (30, 9, 1, 1, 13, 1):
            check(*stream.call(new), 3e-2 if dtype == torch.bfloat16 else 2e-5)
        stats = manager.stats()
        carrier = "ipc" if pool is DevicePool else "shm"
        assert (stats["faults"], carriers(manager)) == (0, [carrier] * ranks), stats["events"]
        copied = [device_of(rank.link).runtime.log.count("cudaStreamSynchronize") for rank in manager.ranks]
        assert min(copied) > 0, "nothing was copied by a device"
        assert stats["decode"]["pooled_calls"] > 0
        assert stats["spot_checks"] > 0


@pytest.mark.parametrize("residency", [False, True])
def test_gradients_are_exact(residency: bool) -> None:
    with manager_of(pool_ranks=2, training_residency=residency) as manager:
        q, k, v, _ = inputs(2, 25)
        geometry = Geometry((0, 4), (25, 25), 0, 25)
        dout = torch.randn(2, 25, q.shape[1], v.shape[3], dtype=torch.float64)
        pooled(manager, geometry)(q, k, v).backward(dout)
        got = [x.grad for x in (q, k, v)]
        wanted: list[Tensor] = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        dense(wanted[0], wanted[1], wanted[2], geometry, q.shape[3] ** -0.5, 0.0, None).backward(dout)
        for name, ours, theirs in zip("qkv", got, wanted, strict=True):
            assert ours is not None
            assert theirs.grad is not None
            difference = (ours - theirs.grad).abs().max().item()
            assert difference < 1e-10, f"d{name}: largest difference {difference:.3g}"
        assert (manager.stats()["faults"], carriers(manager)) == (0, ["ipc", "ipc"])


@pytest.mark.parametrize("pool", [PoolWithoutPeerAccess, PoolWithoutRegistering])
def test_what_a_device_cannot_do_is_said_once_and_costs_no_result(pool: type[DevicePool]) -> None:
    with manager_of(pool, pool_ranks=2) as manager, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            check(*Stream(manager, (0, 3)).call(30), 2e-5)
            manager.leases.release("test")
        stats = manager.stats()
        assert (stats["faults"], carriers(manager)) == (0, ["shm", "shm"])
        said = [event["reason"] for event in stats["events"] if event["kind"] == "carrier"]
        assert len(said) == 2, said


def test_memory_that_loses_bytes_is_warned_of_and_costs_no_result() -> None:
    with manager_of(PoolThatLosesBytes, pool_ranks=2) as manager, torch.no_grad():
        with pytest.warns(RuntimeWarning, match=r"pool rank \d: bodies go through host memory: .* arrived otherwise"):
            check(*Stream(manager, (0, 3)).call(30), 2e-5)
        stats = manager.stats()
        assert (stats["faults"], carriers(manager)) == (0, ["shm", "shm"])
        assert sum(event["kind"] == "carrier" for event in stats["events"]) == 2


def test_it_is_refused_where_it_was_asked_for_and_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed locally, with the reason; no rank stays leased."""
    for pool, match in ((DevicePool, "the model is on cpu"), (PoolWithoutPeerAccess, "cannot be opened here")):
        with manager_of(pool, pool_ranks=2, carrier="ipc") as manager, torch.no_grad():
            if pool is PoolWithoutPeerAccess:
                manager.advisor.device = GPU
            with pytest.warns(RuntimeWarning, match=match):
                manager._activate(100, None)
            assert (manager.ranks, manager.state) == ([], "idle")
            manager.advisor.device = torch.device("cpu")
            object.__setattr__(manager.config, "carrier", "auto")
            check(*Stream(manager, (0, 3)).call(30), 2e-5)
            assert len(manager.ranks) == 2, "they were left leased"
