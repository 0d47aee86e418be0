"""Ranks in threads that stand by themselves, as those of a pool on Ray do: jobs come and go, and share them.

Real links and workers; nothing is asked of Ray, and no process is started.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fapool_plugin.base.leases import Leases
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.devices.gpu import CPU
from fapool_plugin.pool.exchange import Inbox
from fapool_plugin.pool.report import Report
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.sockets import pair
from tests.models import assert_close, eager, load_pooled, random_ids
from tests.thread_pool import ThreadPool

TIMEOUT_S = 1.0


class _Told(Report):
    """What the process of a standing rank tells its worker."""

    leaves = False

    def is_leaving(self) -> bool:
        return self.leaves


class Standing:
    """So many ranks; each serves every base that links to it, until all is over."""

    def __init__(self, count: int) -> None:
        self.workers: dict[int, Worker] = {}
        self.told: dict[int, _Told] = {}
        self._keepers: list[Link] = []
        self._threads: list[threading.Thread] = []
        self._loops: list[Loop] = []
        for _ in range(count):
            self.grow()

    def grow(self) -> None:
        """One rank more."""
        loop, number, told = Loop(), len(self.workers), _Told()
        worker = Worker(Inbox(loop, TIMEOUT_S), 2**26, torch.device("cpu"), 4, report=told)
        mine, its = pair()
        keeper = Link(mine, loop, name="keeper", timeout_s=60.0, asks=True)
        thread = threading.Thread(target=worker.serve, args=([worker.link(its, 60.0)],), daemon=True)
        thread.start()
        self.workers[number], self.told[number] = worker, told
        self._keepers.append(keeper)
        self._threads.append(thread)
        self._loops.append(loop)

    def leave(self, number: int) -> None:
        """A rank is told to leave."""
        self.told[number].leaves = True

    def source(self) -> Callable[[FAPoolConfig], JobsPool]:
        """Where a job's ranks come from."""
        return lambda config: JobsPool(self, config)

    def close(self) -> None:
        for keeper in self._keepers:
            keeper.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a worker did not end with its links"
        for loop in self._loops:
            loop.close()


class JobsPool(ThreadPool):
    """The ranks of such a pool, for one job."""

    def __init__(self, ranks: Standing, config: FAPoolConfig) -> None:
        super().__init__(config)
        self._standing = ranks

    def acquire(self, announce: Callable[[str], object], base: torch.device = CPU) -> dict[int, Link]:
        return self.look(())

    def look(self, leased: Collection[int]) -> dict[int, Link]:
        for number, worker in self._standing.workers.items():
            if number not in self.links and not self._standing.told[number].leaves:
                self.links[number], _ = self._pair(number, worker, silence_s=60.0)
                self.links[number].wait_until_heard(10.0)
        return {number: link for number, link in self.links.items() if not link.lost}


class Job:
    """A model on such a pool, beside the same model without the plugin; every forward is compared."""

    def __init__(self, folder: Path, ranks: Standing, **settings: Any) -> None:
        settings = {"pool_ranks": 8, "timeout_s": TIMEOUT_S, "warm_start": False, "blocks": 1} | settings
        self.model, self.reference = load_pooled(folder, **settings), eager(folder)
        self.leases: Leases = self.model.fa_pool.leases
        self.leases.source = ranks.source()
        self.cache: Any = None
        self.expected: Any = None
        self._seeds = itertools.count(1)

    def forward(self, ids: Tensor) -> None:
        """To both models, each with a cache of its own."""
        actual, expected = (
            model(ids, past_key_values=cache, use_cache=True)
            for model, cache in ((self.model, self.cache), (self.reference, self.expected))
        )
        assert_close(actual.logits, expected.logits, what=f"logits; {self.events()}")
        self.cache, self.expected = actual.past_key_values, expected.past_key_values

    def prompt(self, length: int = 60) -> None:
        """A sequence begins; the one before it ends."""
        self.cache = self.expected = None
        self.model.fa_pool.reap()
        self.forward(random_ids(2, length, seed=next(self._seeds)))

    def steps(self, count: int = 1) -> None:
        for _ in range(count):
            self.forward(random_ids(2, 1, seed=next(self._seeds)))

    @property
    def ranks(self) -> list[int]:
        return [rank.number for rank in self.leases.ranks]

    def events(self) -> list[str]:
        return [f"{event['kind']}: {event['reason']}" for event in self.model.fa_pool.stats()["events"]]

    def kinds(self, *among: str) -> list[str]:
        """Of events, in order; only ``among`` these."""
        return [kind for one in self.events() if (kind := one.split(":")[0]) in among]


@contextmanager
def jobs(folder: Path, ranks: Standing, *settings: dict[str, Any]) -> Iterator[list[Job]]:
    """Several jobs, and at their end what none may have met: a fault."""
    made: list[Job] = []
    try:
        with torch.no_grad():
            made += [Job(folder, ranks, **one) for one in settings]
            yield made
            for job in made:
                assert job.model.fa_pool.stats()["faults"] == 0, job.events()
    finally:
        for job in made:
            job.model.fa_pool.close()
        ranks.close()
