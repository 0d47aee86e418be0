"""Pool ranks in threads of this process: real links and workers, no processes to start."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.pool.exchange import Arrived, Inbox, connect_at
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.rendezvous import open_store

HOST = "127.0.0.1"


def make_store() -> dist.TCPStore:
    """A store on a port of its own."""
    return open_store(HOST, timedelta(seconds=30))


def link_pair(
    store: dist.TCPStore,
    name: str = "test",
    timeout_s: float = 5.0,
    connect_timeout_s: float = 30.0,
    into: Callable[[Arrived], object] | None = None,
) -> tuple[Link, Link]:
    """Both ends of one link: (base, pool). Pool ends may receive into one inbox, as a worker's do."""
    ends: dict[str, Link] = {}
    patience: dict[str, Any] = {"timeout_s": timeout_s, "connect_timeout_s": connect_timeout_s}

    def pool_end() -> None:
        # A store's client waits under a lock: two ends that share one would wait for each other.
        client = dist.TCPStore(HOST, store.port, None, False, timedelta(seconds=30))
        ends["pool"] = Link(client, name, "pool", **patience, host=HOST, into=into)

    thread = threading.Thread(target=pool_end)
    thread.start()
    base = Link(store, name, "base", **patience, host=HOST)
    thread.join(20)
    return base, ends["pool"]


class ThreadPool:
    """A pool whose ranks are threads; ``nodes`` pretends that they are on several nodes. With several ``bases`` the
    links of the second base rank and so on are ``more``."""

    nodes: Mapping[int, int] = MappingProxyType({})
    bases = 1

    def __init__(self, config: FAPoolConfig) -> None:
        self.config, self.store = config, make_store()
        self.links: dict[int, Link] = {}
        self.more: list[dict[int, Link]] = [{} for _ in range(self.bases - 1)]
        self.workers: dict[int, Worker] = {}
        self.discarded: list[int] = []
        self.ends: list[Link] = []
        """The pool ranks' ends of all links."""
        self._threads: list[threading.Thread] = []
        self._made = 0

    def new_token(self) -> int:
        return secrets.randbits(62)

    def acquire(self, announce: Callable[[str], object]) -> dict[int, Link]:
        for rank in range(self.config.pool_ranks):
            if rank not in self.links:
                inbox = Inbox(self._connect, self.config.timeout_s)
                pairs = [self._pair(rank, inbox) for _ in range(self.bases)]
                limit = self.config.memory_limit_mib * 2**20
                worker = Worker(inbox, limit, torch.device("cpu"), self.config.kv_block, self.nodes.get(rank, 0))
                thread = threading.Thread(target=worker.serve, args=([pool for _, pool in pairs],), daemon=True)
                thread.start()
                self.links[rank], self.workers[rank] = pairs[0][0], worker
                for links, (base, _) in zip(self.more, pairs[1:], strict=True):
                    links[rank] = base
                self.ends += [pool for _, pool in pairs]
                self._threads.append(thread)
        return dict(self.links)

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
        for link in (*bases, *self.ends):
            link.join(5)

    def _pair(self, rank: int, inbox: Inbox) -> tuple[Link, Link]:
        self._made += 1
        return link_pair(self.store, f"r{rank}.{self._made}", self.config.timeout_s, into=inbox.put)

    def _connect(self, name: str, side: Any, into: Any) -> Link:
        """A pool rank's link to another one."""
        link = connect_at(HOST, self.store.port, self.config.timeout_s)(name, side, into)
        self.ends.append(link)
        return link


@contextmanager
def closing_all(make: Callable[..., ResourceManager]) -> Iterator[Callable[..., ResourceManager]]:
    """Makes managers, and closes them: between many ranks there are many links, and each has threads."""
    with ExitStack() as made:
        yield lambda **keys: made.enter_context(make(**keys))
