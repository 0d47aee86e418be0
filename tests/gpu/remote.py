"""A pool rank on this machine that is reached as those on others are: over TCP, without a key, with bodies by NIXL."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.pool.process import start
from fapool_plugin.ranks.linked import linked
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.sockets import connect, listen


class RemotePool:
    """One rank; another process each time that it is asked for."""

    def __init__(self, config: FAPoolConfig) -> None:
        self.config, self._loop = config, Loop()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[Link] = []

    def acquire(self, announce: Callable[[str], object], base: torch.device) -> dict[int, Link]:
        listener, address = listen("tcp:127.0.0.1:0")
        with listener:
            self._processes.append(start("listen", [listener], self.config, device=str(base)))
            self._links.append(linked(connect(address, 10.0), self._loop, self.config, 0, None))
        self._links[-1].wait_until_heard(self.config.start_timeout_s)
        return {0: self._links[-1]}

    def pids(self) -> dict[int, int]:
        return {0: self._processes[-1].pid} if self._processes else {}

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._loop.close()
        for process in self._processes:
            process.kill()
            process.wait()
