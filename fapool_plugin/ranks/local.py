"""Pool ranks on this machine: processes that the base starts, and that end with it.

Each is at the other end of a pair of sockets that was made before it: there is no port, no name and no file by which a
stranger could come between. They compute beside a base on a CPU, and on the next GPUs after a base's own. Knows how to
start and end them; what they are asked to do is not known here.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable

import torch

from fapool_plugin.config import FAPoolConfig, check_machine
from fapool_plugin.devices.gpu import CPU, rank_device, sharers
from fapool_plugin.observe.available_memory import left_for_job
from fapool_plugin.pool.process import Process, arguments, end, environment, start
from fapool_plugin.ranks.forked import ForkServer
from fapool_plugin.ranks.linked import linked
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.sockets import pair


class LocalPool:
    """Starts ranks when they are first needed, keeps them warm between leases, replaces lost ones at the next lease.

    Args:
        config: how many, and with which threads, memory and patience.
        gpus: counts this machine's.
    """

    look, said = None, ()

    def __init__(self, config: FAPoolConfig, gpus: Callable[[], int] = torch.cuda.device_count) -> None:
        self.config, self._owner, self._loop, self._gpus = config, os.getpid(), Loop(), gpus
        self._base = CPU
        """Where the base computes."""
        self._devices: dict[int, torch.device] = {}
        self._processes: dict[int, Process] = {}
        self._links: dict[int, Link] = {}
        self._server: ForkServer | None = ForkServer(environment(config))

    def new_token(self) -> int:
        """A lease of its own each time: these ranks are no other job's."""
        return secrets.randbits(62)

    def acquire(self, announce: Callable[[str], object], base: torch.device = CPU) -> dict[int, Link]:
        """Links to all ranks, starting those that are missing; a warning says how many did not start. Raises
        RuntimeError if none did."""
        self._base, gpus = base, self._gpus()
        if base.type != "cuda" and gpus:
            check_machine(self.config, left_for_job())
        for rank, link in list(self._links.items()):
            if link.lost or not link.heard:
                self.discard(rank, link.lost or "its start was interrupted")
            elif self._devices[rank] != rank_device(base, rank, gpus):
                self.discard(rank, f"the model has moved to {base}")
        missing = [rank for rank in range(self.config.pool_ranks) if rank not in self._links]
        if missing:
            announce(f"starting {len(missing)} local pool rank(s)")
        for rank in missing:
            self._start(rank)
        deadline, problems = time.monotonic() + self.config.start_timeout_s, []
        for rank in missing:
            try:
                self._links[rank].wait_until_heard(max(0.0, deadline - time.monotonic()))
            except LinkLost as error:
                problems.append(f"pool rank {rank}{self.discard(rank, str(error))}: {self._why(str(error))}")
        if not self._links:
            raise RuntimeError("; ".join(problems))
        if problems:
            warnings.warn(
                f"fa_pool: {len(problems)} of {self.config.pool_ranks} pool ranks did not start, and the others do "
                f"their work: {'; '.join(problems)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return dict(sorted(self._links.items()))

    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def discard(self, rank: int, reason: str) -> str:
        """Kills a lost rank, stopped ones too; returns " (pid N)"."""
        link, process = self._links.pop(rank, None), self._processes.pop(rank, None)
        if link is not None:
            link.fail(reason)
            link.close()
        if process is None:
            return ""
        end(process, 0)
        return f" (pid {process.pid})"

    def close(self) -> None:
        """Ends all ranks: by a word, then by force. Does nothing in a forked child, whose ranks they are not."""
        if os.getpid() != self._owner:
            return
        links, self._links = self._links, {}
        processes, self._processes = self._processes, {}
        for link in links.values():
            link.close()
        self._loop.close()
        for process in processes.values():
            end(process, 2.0)
        if self._server is not None:
            self._server.close()

    def _start(self, rank: int) -> None:
        gpus = self._gpus()
        device = self._devices[rank] = rank_device(self._base, rank, gpus)
        mine, its = pair()
        with its:
            together = sharers(self._base, rank, self.config.pool_ranks, gpus)
            process = self._processes[rank] = self._process(its, str(device), together)
        self._links[rank] = linked(mine, self._loop, self.config, rank, process.pid)

    def _process(self, sock: socket.socket, device: str, together: int) -> Process:
        if self._server is not None:
            told = arguments(self.config, device, together=together)
            if process := self._server.start(told, sock, self.config.start_timeout_s):
                return process
            self._server.close()
            self._server = None  # ranks start the long way
        return start("link", [sock], self.config, device=device, together=together)

    def _why(self, reason: str) -> str:
        return f"{reason}; a pool rank has start_timeout_s = {self.config.start_timeout_s:g} s to start"
