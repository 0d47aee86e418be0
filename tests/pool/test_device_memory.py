"""A rank whose device has no more memory: it refuses what is new, keeps what it holds, and lives. One whose device is
lost ends."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.pool import worker as pool_worker
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.link import Link
from tests.base.test_attention import Stream, check, dense
from tests.base.test_gradients import inputs, pooled
from tests.base.test_streams import RecordedPool
from tests.thread_pool import ThreadPool


def manager_of(**keys: Any) -> ResourceManager:
    return ResourceManager(FAPoolConfig(threshold=0, kv_block=4, memory_limit_mib=64, pool_ranks=1, **keys), ThreadPool)


def full_at(monkeypatch: pytest.MonkeyPatch, name: str, when: Callable[[], bool]) -> None:
    """The worker finds no memory in one of its functions."""
    real = getattr(pool_worker, name)

    def tried(*args: Any, **keys: Any) -> Any:
        if when():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **keys)

    monkeypatch.setattr(pool_worker, name, tried)


@pytest.mark.parametrize("name", ["attend", "TileRequest"])
def test_it_refuses_and_the_base_computes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    full: list[bool] = []
    full_at(monkeypatch, name, lambda: bool(full))
    with manager_of() as manager, torch.no_grad():
        first, second = Stream(manager, (0, 0)), Stream(manager, (0,))
        check(*first.call(30), 2e-5)
        held = manager.leases.pool.workers[0].prefixes  # type: ignore[union-attr]
        full.append(True)
        check(*second.call(30), 2e-5)
        assert (manager.counters.faults, len(manager.ranks)) == (0, 1), "it was given up"
        assert first.state.id in held, "what it held is gone"
        check(*second.call(9), 2e-5)
        assert any("could not store the keys" in reason for reason in manager.counters.local_reasons)
        full.clear()
        pooled_before = manager.counters.phase("decode").pooled_calls
        check(*first.call(1), 2e-5)
        assert manager.counters.phase("decode").pooled_calls == pooled_before + 1
        assert manager.counters.rank(0).stale == 0, "its keys were sent again"


@pytest.mark.parametrize("where", ["attend", "_arrived"])
def test_a_rank_whose_device_is_lost_ends(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Nothing that it is asked would be done any more: as a process it is replaced, and the base computes meanwhile."""

    def lost(*args: Any, **keys: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Worker, where, lost)
    ended = []

    class EndingPool(RecordedPool):
        def serve(self, worker: Worker, ends: list[Link]) -> None:
            try:
                super().serve(worker, ends)
            except torch.AcceleratorError as error:  # a process ends with that
                ended.append(error)
                for end in ends:
                    end.close()

    config = FAPoolConfig(threshold=0, kv_block=4, memory_limit_mib=64, pool_ranks=1)
    with ResourceManager(config, EndingPool) as manager, torch.no_grad():
        with pytest.warns(RuntimeWarning, match="pool rank 0"):
            check(*Stream(manager, (0,)).call(30), 2e-5)
        assert (len(ended), manager.counters.faults) == (1, 1)


@pytest.mark.parametrize("residency", [False, True])
def test_gradients_are_computed_by_the_base(monkeypatch: pytest.MonkeyPatch, residency: bool) -> None:
    full_at(monkeypatch, "attend_backward", lambda: True)
    with manager_of(training_residency=residency) as manager:
        q, k, v, _ = inputs(1, 25)
        geometry = Geometry((0,), (25,), 0, 25)
        pooled(manager, geometry)(q, k, v).sum().backward()
        wanted = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        dense(wanted[0], wanted[1], wanted[2], geometry, q.shape[3] ** -0.5, 0.0, None).sum().backward()
        for ours, theirs in zip((q, k, v), wanted, strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            difference = (ours.grad - theirs.grad).abs().max().item()
            assert difference < 1e-10, f"largest difference {difference:.3g}"
        assert (manager.counters.faults, manager.counters.backward.local_calls) == (0, 1)


def test_copies_for_others_are_dropped_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a copy would be taken for one."""
    with manager_of() as manager, torch.no_grad():
        stream = Stream(manager, (0,))
        stream.call(30)
        worker = manager.leases.pool.workers[0]  # type: ignore[union-attr]
        assert stream.state.id in worker.prefixes
        full_at(monkeypatch, "brought", lambda: True)
        key = torch.zeros(1, 1, 1, 8)
        monkeypatch.setattr(pool_worker, "stored", lambda message: [((None, 0, 1, 0), key, key)])
        worker.store(SimpleNamespace(header=SimpleNamespace(sequence=stream.state.id)))
        assert stream.state.id not in worker.prefixes
