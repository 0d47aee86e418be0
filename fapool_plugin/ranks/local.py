"""Pool ranks on this machine: processes that the base starts, and that end with it.

Knows how to start and end them; what they are asked to do is not known here.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta

import torch

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.pool.process import end, start
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.rendezvous import open_store, request_link

_HOST = "127.0.0.1"
_LAST_S = 10.0
"""For a link's threads to end; on a quiet machine they take milliseconds."""


class LocalPool:
    """Starts ranks when they are first needed, keeps them warm between leases, replaces lost ones at the next lease.

    Args:
        config: how many, and with which threads, memory and patience.
    """

    def __init__(self, config: FAPoolConfig) -> None:
        self.config, self._owner = config, os.getpid()
        self._store = open_store(_HOST, timedelta(seconds=config.start_timeout_s))
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._links: dict[int, Link] = {}
        self._started = 0

    def new_token(self) -> int:
        """A lease of its own each time: nobody else uses these ranks."""
        return secrets.randbits(62)

    def acquire(self, announce: Callable[[str], object]) -> dict[int, Link]:
        """Links to all ranks, starting those that are missing. Raises RuntimeError if none can be started."""
        for rank, link in list(self._links.items()):
            if link.lost:
                self.discard(rank, link.lost)
        missing = [rank for rank in range(self.config.pool_ranks) if rank not in self._links]
        for rank in missing:
            self.discard(rank, "its start was interrupted")
        if missing:
            announce(f"starting {len(missing)} local pool rank(s)")
        names = {rank: self._start(rank) for rank in missing}
        problems = []
        for rank, name in names.items():
            try:
                self._wait_ready(rank, name)
                self._links[rank] = self._connect(name)
            except RuntimeError as error:
                problems.append(str(error))
                self.discard(rank, str(error))
        if not self._links:
            raise RuntimeError("; ".join(problems))
        return dict(self._links)

    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def discard(self, rank: int, reason: str) -> str:
        """Kills a lost rank, stopped ones too; returns " (pid N)"."""
        link, process = self._links.pop(rank, None), self._processes.pop(rank, None)
        if link is not None:
            link.fail(reason)
        if process is None:
            return ""
        end(process, 0)
        if link is not None:
            link.join(_LAST_S)
        return f" (pid {process.pid})"

    def close(self) -> None:
        """Ends all ranks: by a word, then by force. Does nothing in a forked child, whose ranks they are not."""
        if os.getpid() != self._owner:
            return
        links, self._links = self._links, {}
        processes, self._processes = self._processes, {}
        for link in links.values():
            link.close()
        for process in processes.values():
            end(process, 2.0)
        for link in links.values():
            # A thread that is still inside of gloo when the interpreter ends would abort it.
            link.join(_LAST_S)

    def _start(self, rank: int) -> str:
        self._started += 1
        name = f"rank{rank}.{self._started}"
        device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        self._processes[rank] = start(name, f"{_HOST}:{self._store.port}", self.config, device=device)
        return name

    def _connect(self, name: str) -> Link:
        patience, limit = self.config.timeout_s, self.config.start_timeout_s
        link = request_link(self._store, name)
        return Link(self._store, link, "base", timeout_s=patience, connect_timeout_s=limit, host=_HOST)

    def _wait_ready(self, rank: int, name: str) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        process = self._processes[rank]
        while not self._store.check([f"{name}/ready"]):
            if process.poll() is not None:
                raise RuntimeError(f"pool rank {rank} ended with exit code {process.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"pool rank {rank} was not ready within start_timeout_s = {self.config.start_timeout_s:g} s"
                )
            time.sleep(0.01)
