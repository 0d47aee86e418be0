"""Pool ranks on this machine: there in milliseconds, told of when they do not come, and gone without a trace."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.ranks.pools import open_manager
from fapool_plugin.wire.link import Link
from tests.models import workers

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


def config(**settings: object) -> FAPoolConfig:
    return FAPoolConfig(**{"pool_ranks": 2, "memory_limit_mib": 16, "timeout_s": 2.0} | settings)


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    made = LocalPool(config())
    yield made
    made.close()


def serves(link: Link, number: int = 0) -> bool:
    rank = PoolRank(number, link, 7, RankCounters(number))
    rank.open()
    return rank.memory_limit == 16 * 2**20


def test_a_lost_rank_is_replaced_by_a_fork(pool: LocalPool) -> None:
    pool.acquire(lambda text: None)
    before = pool.pids()
    assert set(before.values()) == workers()
    os.kill(before[0], signal.SIGKILL)
    began = time.monotonic()
    while not pool._links[0].lost:
        time.sleep(0.01)
    assert time.monotonic() - began < 1, "a death is told of at once"
    links = pool.acquire(lambda text: None)
    after = pool.pids()
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert all(serves(link, number) for number, link in links.items())


def test_ranks_start_the_long_way_where_there_is_no_fork_server(pool: LocalPool) -> None:
    assert pool._server is not None
    pool._server.process.kill()
    pool._server.process.wait()
    links = pool.acquire(lambda text: None)
    assert pool._server is None
    assert all(serves(link, number) for number, link in links.items())


def test_a_fork_server_with_threads_does_not_fork(pool: LocalPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork has one thread, and what the others held stays held."""
    from fapool_plugin.pool import fork_server

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert fork_server._forked([], [], None) == 0  # type: ignore[arg-type]
    finally:
        stop.set()
        thread.join()


def test_a_rank_that_does_not_start_is_told_of_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its start and its first word: that is noticed at once, not after start_timeout_s."""
    real = LocalPool._start

    def struck(pool: LocalPool, rank: int) -> None:
        real(pool, rank)
        if rank == 0:
            pool._processes[rank].kill()

    monkeypatch.setattr(LocalPool, "_start", struck)
    made = LocalPool(config(start_timeout_s=60.0))
    try:
        assert made._server is not None
        began = time.monotonic()
        with pytest.warns(RuntimeWarning, match="1 of 2 pool ranks did not start"):
            assert list(made.acquire(lambda text: None)) == [1]
        took = time.monotonic() - began
        assert took < 30, f"it took {took:.1f} s"
    finally:
        made.close()


def test_none_that_start_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalPool._start

    def struck(pool: LocalPool, rank: int) -> None:
        real(pool, rank)
        pool._processes[rank].kill()

    monkeypatch.setattr(LocalPool, "_start", struck)
    made = LocalPool(config())
    try:
        with pytest.raises(RuntimeError, match=r"pool rank 0 \(pid .*pool rank 1 \(pid .*start_timeout_s"):
            made.acquire(lambda text: None)
    finally:
        made.close()


def test_a_lease_that_is_interrupted_leaves_no_rank_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PoolRank.open

    def interrupted(rank: PoolRank, **how: Any) -> bool:
        opened = real(rank, **how)
        if rank.number == 1:
            raise KeyboardInterrupt
        return opened

    with ResourceManager(config(), LocalPool) as manager:
        with monkeypatch.context() as patched:
            patched.setattr(PoolRank, "open", interrupted)
            with pytest.raises(KeyboardInterrupt):
                manager._activate(100, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            manager._activate(100, None)
        assert len(manager.ranks) == 2
        assert manager.counters.faults == 0


def test_a_manager_is_warm_when_it_is_opened_and_cold_if_asked() -> None:
    for warm in (True, False):
        with open_manager(config(warm_start=warm)) as manager:
            assert (manager.leases.pool is not None) == warm
            assert not workers(), "a rank is started by a long sequence only"


def test_a_child_of_a_warm_process_makes_ranks_of_its_own() -> None:
    with open_manager(config(pool_ranks=1)) as manager:
        child = os.fork()
        if not child:
            try:
                manager._activate(100, None)
                fine = len(manager.ranks) == 1
                manager.close()
                os._exit(0 if fine else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        manager._activate(100, None)
        assert len(manager.ranks) == 1


@pytest.mark.parametrize("cycles", [3, pytest.param(60, marks=pytest.mark.full)])
def test_opening_and_closing_leaves_nothing(cycles: int) -> None:
    process = psutil.Process()

    def cycle() -> None:
        made = LocalPool(config())
        assert all(serves(link, number) for number, link in made.acquire(lambda text: None).items())
        made.close()

    def counts() -> tuple[int, int, int, int]:
        return process.num_fds(), process.num_threads(), len(process.children()), len(os.listdir("/dev/shm"))

    cycle()
    before, memory = counts(), process.memory_info().rss
    for _ in range(cycles):
        cycle()
    assert counts() == before, "descriptors, threads, children, shared memory"
    grown = (process.memory_info().rss - memory) / 2**20
    assert grown < 16, f"{grown:.1f} MiB more"
