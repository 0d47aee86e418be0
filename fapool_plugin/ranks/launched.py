"""Pool ranks that came with the launch: a base rank's links to them, asked for when they are first needed.

Several models and several base ranks may use the same ones. Knows where their supervisors write what they run, not how
they are started, and not what they are asked to do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fapool_plugin.base.lease import RanksStarting
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.devices.gpu import CPU
from fapool_plugin.ranks.launch import Launch, link_key
from fapool_plugin.ranks.linked import check_nixl, linked
from fapool_plugin.wire.link import Link, first_line
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.sockets import connect

_OPERATION_S = 10.0
"""For single operations of the store; every wait of ours is a loop of them."""


@dataclass
class _Rank:
    """A pool rank and this base rank's link to the worker that it runs."""

    worker: str
    pid: int
    link: Link


@dataclass
class LaunchedPool:
    """The pool ranks of a launch, for one model of one base rank.

    Args:
        launch: this base rank's place.
        config: how long to wait.
    """

    launch: Launch
    config: FAPoolConfig
    look: ClassVar[None] = None
    said: ClassVar[tuple[()]] = ()
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    """Ranks that have been here once: one that is not ready again yet is not waited for."""
    _owner: int = field(default_factory=os.getpid)
    _client: Any = None
    _loop: Loop = field(default_factory=Loop)
    _key: bytes | None = None

    def __post_init__(self) -> None:
        check_nixl(self.config, one_machine=self.launch.one_machine)
        if not self.launch.one_machine:
            if self.config.carrier in ("shm", "ipc"):
                raise FAPoolConfigError(
                    f"carrier is {self.config.carrier}, and the ranks of this launch are on several machines, which "
                    "share no memory; set it to auto or inline"
                )
            self._key = link_key(self.config, self.launch.bind)

    def new_token(self) -> int:
        """The lease that all base ranks of the job share."""
        return self.launch.token

    def acquire(self, announce: Callable[[str], object], base: torch.device = CPU) -> dict[int, Link]:
        """Links to every rank that is ready; the launch has said where they compute. Raises RuntimeError if there is
        none."""
        problems: list[RuntimeError] = []
        for number in range(self.launch.pool_ranks):
            known = self._ranks.get(number)
            if known is not None and not known.link.lost:
                continue
            if known is not None:
                self.discard(number, known.link.lost or "")
            try:
                self._ranks[number] = self._find(number, announce)
                self._seen.add(number)
            except RuntimeError as error:
                kind = RanksStarting if isinstance(error, RanksStarting) else RuntimeError
                problems.append(kind(f"pool rank {number}: {first_line(error)}"))
        if not self._ranks:
            starting = all(isinstance(problem, RanksStarting) for problem in problems)
            raise (RanksStarting if starting else RuntimeError)("; ".join(map(str, problems)))
        return {number: rank.link for number, rank in sorted(self._ranks.items())}

    def discard(self, rank: int, reason: str) -> str:
        """Gives up a lost rank; its supervisor ends the process, stopped ones too, and starts another."""
        known = self._ranks.pop(rank, None)
        if known is None:
            return ""
        known.link.fail(reason)
        known.link.close()
        self._tell(f"{known.worker}/discarded", reason[:200])
        return f" (pid {known.pid})"

    def close(self) -> None:
        """Says goodbye to all; they stay for others. Does nothing in a forked child, whose links they are not."""
        if os.getpid() != self._owner:
            return
        ranks, self._ranks = self._ranks, {}
        for rank in ranks.values():
            rank.link.close()
        self._loop.close()

    def _find(self, number: int, announce: Callable[[str], object]) -> _Rank:
        key = self.launch.pool_key(number)
        deadline = time.monotonic() + (0.0 if number in self._seen else self.config.start_timeout_s)
        while (ready := self._ready(key)) is None:
            if gone := self._read(f"{key}/gone"):
                raise RuntimeError(gone)
            if time.monotonic() > deadline:
                if number in self._seen:
                    raise RanksStarting("is being started")
                raise RuntimeError(f"was not ready within start_timeout_s = {self.config.start_timeout_s:g} s")
            time.sleep(0.02)
        worker, pid, address = ready
        announce(f"linking to pool rank {number}")
        # A worker that died a moment ago is not waited for as long as one that starts.
        limit, link = min(self.config.start_timeout_s, max(5.0, self.config.timeout_s)), None
        try:
            if not address.startswith("unix:" if self.launch.one_machine else "tcp:"):
                raise LinkLost("it is not where ranks of this launch listen")
            sock = connect(address, limit, self._key, worker)
            link = linked(sock, self._loop, self.config, number, pid if self.launch.one_machine else None, address)
            link.wait_until_heard(limit)
        except (OSError, LinkLost) as error:
            if link is not None:
                link.close()
            if link is not None or isinstance(error, TimeoutError):
                # It stands still; others it only refused, or a stranger has kept it busy.
                self._tell(f"{worker}/discarded", "it was ready and opened no link")
            raise RuntimeError(f"{address} opened no link: {first_line(error)}") from error
        return _Rank(worker, pid, link)

    def _ready(self, key: str) -> tuple[str, int, str] | None:
        """(name, process id, address) of the worker that a supervisor runs, when it can be reached."""
        worker = self._read(key)
        told = self._read(f"{worker}/ready") if worker else None
        if not worker or not told or self._read(f"{worker}/discarded") is not None:
            return None
        pid, _, address = told.partition(" ")
        if not pid.isdecimal() or not address:
            raise RuntimeError(f"{told[:80]!r} says not where {worker} is")
        return worker, int(pid), address

    def _read(self, key: str) -> str | None:
        """A key's value; None if it is not there. A connection that has broken is opened again, once."""
        for last in (False, True):
            try:
                if self._client is None:
                    self._client = self.launch.store(_OPERATION_S)
                return self._client.get(key).decode() if self._client.check([key]) else None
            except RuntimeError:
                self._client = None
                if last:
                    raise
        return None

    def _tell(self, key: str, value: str) -> None:
        with suppress(RuntimeError):
            self._read(key)  # over a connection that stands
            self._client.set(key, value)
