"""Pool ranks in threads of this process: real links and workers, no processes to start."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.transport import Link, LinkLost, Message, open_store
from fapool_plugin.worker import Worker

HOST = "127.0.0.1"


def make_store() -> dist.TCPStore:
    """A store on a port of its own."""
    return open_store(HOST, timedelta(seconds=30))


def link_pair(
    store: dist.TCPStore,
    name: str = "test",
    timeout_s: float = 5.0,
    connect_timeout_s: float = 30.0,
    inbox: queue.SimpleQueue[tuple[Link, Message | LinkLost]] | None = None,
) -> tuple[Link, Link]:
    """Both ends of one link: (base, pool). Pool ends may share an inbox, as a worker's do."""
    ends: dict[str, Link] = {}
    patience: dict[str, Any] = {"timeout_s": timeout_s, "connect_timeout_s": connect_timeout_s}

    def pool_end() -> None:
        # A store's client waits under a lock: two ends that share one would wait for each other.
        client = dist.TCPStore(HOST, store.port, None, False, timedelta(seconds=30))
        ends["pool"] = Link(client, name, "pool", **patience, host=HOST, into=inbox)

    thread = threading.Thread(target=pool_end)
    thread.start()
    base = Link(store, name, "base", **patience, host=HOST)
    thread.join(20)
    return base, ends["pool"]


class ThreadPool:
    """A pool whose ranks are threads."""

    def __init__(self, config: FAPoolConfig) -> None:
        self.config, self.store = config, make_store()
        self.links: dict[int, Link] = {}
        self.workers: dict[int, Worker] = {}
        self.discarded: list[int] = []
        self._threads: list[threading.Thread] = []
        self._made = 0

    def acquire(self, announce: Callable[[str], object]) -> dict[int, Link]:
        for rank in range(self.config.pool_ranks):
            if rank not in self.links:
                self._made += 1
                inbox: queue.SimpleQueue[tuple[Link, Message | LinkLost]] = queue.SimpleQueue()
                base, pool = link_pair(self.store, f"r{rank}.{self._made}", self.config.timeout_s, inbox=inbox)
                worker = Worker(inbox, self.config.memory_limit_mib * 2**20, torch.device("cpu"), self.config.kv_block)
                thread = threading.Thread(target=worker.serve, args=([pool],), daemon=True)
                thread.start()
                self.links[rank], self.workers[rank] = base, worker
                self._threads.append(thread)
        return dict(self.links)

    def discard(self, rank: int, reason: str) -> str:
        self.discarded.append(rank)
        link = self.links.pop(rank)
        link.fail(reason)
        link.close()
        return ""

    def close(self) -> None:
        for link in self.links.values():
            link.close()
        for thread in self._threads:
            thread.join(5)
        for link in self.links.values():
            link.join(5)
