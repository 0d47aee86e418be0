"""Ranks that work together, and what happens when one of them fails: no rank hangs, and the result stays exact."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fapool_plugin.base.requests import Requests
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.wire.messages import LinkLost, Message
from tests.base.test_attention import Stream, check
from tests.base.test_trees import links_between, manager_of, pool_of, went_well
from tests.thread_pool import ThreadPool


class TwoBases(ThreadPool):
    """Each rank has links to two base ranks."""

    bases = 2


@pytest.fixture(autouse=True)
def _no_waste() -> Iterator[None]:
    """A closed link takes a while to go, and what collects it waits: nothing may, where seconds count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_rank_that_evicted_the_keys_holds_up_nobody(victim: int) -> None:
    with manager_of(pool_ranks=4, partition="query_blocks", reduction="tree") as manager:
        stream = Stream(manager, (0,))
        check(*stream.call(40), 2e-5)
        pool_of(manager).workers[victim].prefixes.clear()
        check(*stream.call(1), 2e-5)
        told = [(rank.stale, rank.calls) for _, rank in sorted(manager.counters.ranks.items())]
        assert told == [(1, 1) if rank == victim else (0, 2) for rank in range(4)]
        assert not any(rank.apart for rank in manager.ranks), "the others' results came"
        check(*stream.call(1), 2e-5)
        check(*stream.call(20), 2e-5)


def dies(pool: ThreadPool, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its next request; all its links end, as those of a killed process do."""
    worker = pool.workers[victim]

    def die(message: Message) -> None:
        for link in list(worker.inbox._exchanges):
            worker.inbox.leave(link)
        raise LinkLost("died")

    monkeypatch.setattr(worker, "attend", die)


def sends_nothing(pool: ThreadPool, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To other pool ranks; its links stand."""
    for exchange in links_between(pool):
        monkeypatch.setattr(exchange, "_patience_s", 0.5)
        if exchange.number == victim:
            monkeypatch.setattr(exchange, "send", lambda *args: None)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", [dies, sends_nothing])
@pytest.mark.parametrize("reduction", ["tree", "two_level"])
@pytest.mark.parametrize("victim", [0, 1, 2, 3, 4])
def test_a_rank_that_fails_at_any_place_costs_time_only(
    victim: int,
    reduction: str,
    fault: Callable[[ThreadPool, int, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with manager_of(pool_ranks=5, reduction=reduction, partition="query_blocks") as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        stream = Stream(manager, (0,))
        for new in (40, 1, 30):
            check(*stream.call(new), 2e-5)
        assert not any(rank.apart for rank in manager.ranks)
        fault(pool_of(manager), victim, monkeypatch)
        began = time.monotonic()
        for new in (1, 30, 1, 30, 1):
            check(*stream.call(new), 2e-5)
        took = time.monotonic() - began
        assert took < 3.0, f"it took {took:.1f} s"
        # The base waits for the root itself; who passes nothing on anyway is not missed.
        heard = {"tree": {0}, "two_level": {0, 2}}[reduction]
        assert [rank.apart for rank in manager.ranks] == [fault is dies or victim not in heard] * len(manager.ranks)
        assert not any(rank.stale for rank in manager.counters.ranks.values()), "the base believed keys to be there"
        if fault is dies:
            assert manager.counters.faults == 1
            assert [rank.number for rank in manager.ranks] == [rank for rank in range(5) if rank != victim]
        else:
            assert manager.counters.faults == 0
        manager.leases.release("test")
        monkeypatch.undo()
        stream = Stream(manager, (0,))
        for new in (40, 1, 30):
            check(*stream.call(new), 2e-5)
        assert len(manager.ranks) == 5
        assert not any(rank.apart for rank in manager.ranks), "a new lease is a new beginning"


@pytest.mark.parametrize("what", ["_ask", "_gather"])
def test_an_interrupted_call_leaves_nothing_that_a_later_call_could_mistake(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with manager_of(pool_ranks=3, partition="query_blocks", reduction="tree", timeout_s=1.0) as (manager):
        stream = Stream(manager, (0,))
        for new in (40, 1):
            check(*stream.call(new), 2e-5)
        for new, at in itertools.product((1, 30), range(2)):
            with monkeypatch.context() as patched:
                interrupt_at(patched, what, at)
                try:
                    stream.call(new)
                except KeyboardInterrupt:
                    # What the cache has now was not computed by anybody.
                    stream.crop(stream.k.shape[2] - new)
            for again in (1, 20, 1):
                check(*stream.call(again), 2e-5)
        assert manager.counters.faults == 0


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
@pytest.mark.parametrize("step", ["introduce", "ask"])
def test_a_rank_that_is_found_lost_while_all_are_asked(step: str, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"reduction": "tree", "partition": "query_blocks"}
    with manager_of(pool_ranks=4, timeout_s=2.0, **keys) as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        check(*Stream(manager, (0,)).call(1), 2e-5)  # takes the lease
        stream = Stream(manager, (0,))

        def fail(*args: object) -> None:
            raise LinkLost("found lost")

        monkeypatch.setattr(manager.ranks[victim], step, fail)
        began = time.monotonic()
        for new in (40, 1, 1, 20, 1):
            check(*stream.call(new), 2e-5)
        took = time.monotonic() - began
        assert took < 6.0, f"it took {took:.1f} s"
        assert manager.counters.faults == 1
        assert not any(rank.stale for rank in manager.counters.ranks.values()), "the base believed keys to be there"


def interrupt_at(patched: pytest.MonkeyPatch, what: str, at: int) -> None:
    """The ``at``-th such step of a call is interrupted."""
    original, count = getattr(Requests, what), itertools.count()

    def interrupted(self: Any, *args: Any) -> Any:
        if next(count) == at:
            raise KeyboardInterrupt
        return original(self, *args)

    patched.setattr(Requests, what, interrupted)


def test_two_bases_may_use_the_same_ranks_at_once() -> None:
    """They send in different orders; none waits for what waits for it."""
    pool = TwoBases(FAPoolConfig(pool_ranks=4, memory_limit_mib=64, timeout_s=5.0))
    try:
        links = [pool.acquire(print), *pool.more]

        class Shared:
            look, said = None, ()

            def __init__(self, mine: dict[int, Any]) -> None:
                self.mine = mine

            def new_token(self) -> int:
                return 7  # one job: both base ranks name the same lease

            def acquire(self, announce: object, base: object) -> dict[int, Any]:
                return dict(self.mine)

            def discard(self, rank: int, reason: str) -> str:
                return ""

            def close(self) -> None: ...

        problems: list[BaseException] = []

        def base(number: int) -> None:
            config = FAPoolConfig(
                pool_ranks=4, threshold=0, kv_block=4, partition="query_blocks", reduction="tree",
            )  # fmt: skip
            manager = ResourceManager(config, lambda _: Shared(links[number]))
            try:
                stream = Stream(manager, (0,))
                for new in (40, *[1, 1, 1, 7] * 10):
                    check(*stream.call(new), 2e-5)
                went_well(manager)
            except BaseException as error:
                problems.append(error)
            finally:
                manager.close()

        threads = [threading.Thread(target=base, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not problems, problems
    finally:
        pool.close()


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_stopped_and_killed_processes_at_any_place_cost_time_only() -> None:
    config = FAPoolConfig(
        pool_ranks=3, threshold=0, kv_block=4, memory_limit_mib=64, timeout_s=1.5, partition="query_blocks",
        reduction="tree",
    )  # fmt: skip
    with ResourceManager(config, LocalPool) as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        stream = Stream(manager, (0,))
        for new in (200, 1, 100, 1):
            check(*stream.call(new), 2e-5)
        went_well(manager)
        for victim, how, new in ((1, signal.SIGSTOP, 1), (1, signal.SIGSTOP, 100), (2, signal.SIGKILL, 1)):
            if not manager.ranks or len(manager.ranks) < 3:
                manager.leases.release("test")
                stream = Stream(manager, (0,))
                for first in (200, 1):
                    check(*stream.call(first), 2e-5)
            assert isinstance(manager.leases.pool, LocalPool)
            os.kill(manager.leases.pool.pids()[victim], how)
            faults, began = manager.counters.faults, time.monotonic()
            for later in (new, 1, 50, 1):
                check(*stream.call(later), 2e-5)
            took = time.monotonic() - began
            assert took < 10, f"it took {took:.1f} s"
            assert manager.counters.faults == faults + 1
            assert len(manager.ranks) == 2
