"""Pool ranks in threads of this process: real links and workers, no processes to start."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch

from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.devices.gpu import CPU
from fapool_plugin.pool.exchange import Arrived, Inbox
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.sockets import pair


def link_pair(
    base_loop: Loop,
    pool_loop: Loop,
    name: str = "test",
    timeout_s: float = 5.0,
    into: Callable[[Arrived], object] | None = None,
    ring_bytes: int = 0,
) -> tuple[Link, Link]:
    """Both ends of one link: (base, pool). Pool ends may receive into one inbox, as a worker's do."""
    one, other = pair()
    base = Link(one, base_loop, name=name, timeout_s=timeout_s, asks=True, ring_bytes=ring_bytes)
    return base, Link(other, pool_loop, name=name, timeout_s=timeout_s, asks=False, into=into)


@contextmanager
def two_loops() -> Iterator[tuple[Loop, Loop]]:
    """For the base's ends and for a pool rank's."""
    loops = Loop(), Loop()
    try:
        yield loops
    finally:
        for loop in loops:
            loop.close()


class ThreadPool:
    """A pool whose ranks are threads; ``nodes`` pretends that they are on several nodes. With several ``bases`` the
    links of the second base rank and so on are ``more``."""

    nodes: Mapping[int, int] = MappingProxyType({})
    bases = 1
    ring_bytes = 0
    """Of the memory for bodies; 0: they go over the sockets."""
    look: Any = None
    said: Any = ()
    device = CPU
    """Where ranks compute."""

    def __init__(self, config: FAPoolConfig) -> None:
        self.config, self.loop = config, Loop()
        self.links: dict[int, Link] = {}
        self.more: list[dict[int, Link]] = [{} for _ in range(self.bases - 1)]
        self.workers: dict[int, Worker] = {}
        self.discarded: list[int] = []
        self.ends: list[Link] = []
        """The pool ranks' ends of all links."""
        self._threads: list[threading.Thread] = []
        self._loops: list[Loop] = []

    def new_token(self) -> int:
        return secrets.randbits(62)

    def acquire(self, announce: Callable[[str], object], base: torch.device = CPU) -> dict[int, Link]:
        for rank in range(self.config.pool_ranks):
            if rank not in self.links:
                loop = Loop()
                inbox = Inbox(loop, self.config.timeout_s / 2)
                limit = self.config.cpu_limit_mib * 2**20
                worker = Worker(inbox, limit, self.device, self.config.kv_block, self.nodes.get(rank, 0))
                pairs = [self._pair(rank, worker) for _ in range(self.bases)]
                thread = threading.Thread(target=self.serve, args=(worker, [pool for _, pool in pairs]), daemon=True)
                thread.start()
                self._loops.append(loop)
                self.links[rank], self.workers[rank] = pairs[0][0], worker
                for links, (end, _) in zip(self.more, pairs[1:], strict=True):
                    links[rank] = end
                self.ends += [pool for _, pool in pairs]
                self._threads.append(thread)
        return dict(sorted(self.links.items()))

    def serve(self, worker: Worker, ends: list[Link]) -> None:
        """What a rank's thread does."""
        worker.serve(ends)

    def discard(self, rank: int, reason: str) -> str:
        self.discarded.append(rank)
        link = self.links.pop(rank)
        link.fail(reason)
        link.close()
        return ""

    def close(self) -> None:
        bases = [link for links in (self.links, *self.more) for link in links.values()]
        for link in bases:
            link.close()
        for thread in self._threads:
            thread.join(5)
        for loop in (self.loop, *self._loops):
            loop.close()

    def _pair(self, rank: int, worker: Worker, silence_s: float | None = None) -> tuple[Link, Link]:
        one, other = pair()
        base = Link(
            one, self.loop, name=f"rank {rank}", timeout_s=self.config.timeout_s, asks=True, ring_bytes=self.ring_bytes
        )
        return base, worker.link(other, silence_s or self.config.timeout_s)


@contextmanager
def closing_all(make: Callable[..., ResourceManager]) -> Iterator[Callable[..., ResourceManager]]:
    """Makes managers, and closes them: between many ranks there are many links, and each has threads."""
    with ExitStack() as made:
        yield lambda **keys: made.enter_context(make(**keys))
