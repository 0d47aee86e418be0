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
from typing import Any

from fapool_plugin.base.lease import RanksStarting
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.ranks.launch import Launch
from fapool_plugin.wire.link import Link, first_line
from fapool_plugin.wire.rendezvous import request_link

_LAST_S = 10.0
"""For a link's threads to end; on a quiet machine they take milliseconds."""
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
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    """Ranks that have been here once: one that is not ready again yet is not waited for."""
    _owner: int = field(default_factory=os.getpid)
    _client: Any = None

    def new_token(self) -> int:
        """The lease that all base ranks of the job share."""
        return self.launch.token

    def acquire(self, announce: Callable[[str], object]) -> dict[int, Link]:
        """Links to every rank that is ready. Raises RuntimeError if there is none."""
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
        with suppress(RuntimeError):
            self._store().set(f"{known.worker}/discarded", reason[:200])
        return f" (pid {known.pid})"

    def close(self) -> None:
        """Says goodbye to all; they stay for others. Does nothing in a forked child, whose links they are not."""
        if os.getpid() != self._owner:
            return
        ranks, self._ranks = self._ranks, {}
        for rank in ranks.values():
            rank.link.close()
        for rank in ranks.values():
            # A thread that is still inside of gloo when the interpreter ends would abort it.
            rank.link.join(_LAST_S)

    def _find(self, number: int, announce: Callable[[str], object]) -> _Rank:
        store, key = self._store(), self.launch.pool_key(number)
        deadline = time.monotonic() + (0.0 if number in self._seen else self.config.start_timeout_s)
        while not self._is_ready(key):
            if store.check([f"{key}/gone"]):
                raise RuntimeError(store.get(f"{key}/gone").decode())
            if time.monotonic() > deadline:
                if number in self._seen:
                    raise RanksStarting("is being started")
                raise RuntimeError(f"was not ready within start_timeout_s = {self.config.start_timeout_s:g} s")
            time.sleep(0.02)
        worker = store.get(key).decode()
        announce(f"linking to pool rank {number}")
        # A worker that died a moment ago is not waited for as long as one that starts.
        patience, limit = self.config.timeout_s, min(self.config.start_timeout_s, max(5.0, self.config.timeout_s))
        name, own = request_link(store, worker), self.launch.store(limit)
        try:
            link = Link(own, name, "base", timeout_s=patience, connect_timeout_s=limit, host=self.launch.bind)
        except RuntimeError:
            store.set(f"{worker}/discarded", "it was ready and opened no link")
            raise
        return _Rank(worker, int(store.get(f"{worker}/ready")), link)

    def _is_ready(self, key: str) -> bool:
        store = self._store()
        if not store.check([key]):
            return False
        worker = store.get(key).decode()
        return bool(store.check([f"{worker}/ready"])) and not store.check([f"{worker}/discarded"])

    def _store(self) -> Any:
        if self._client is None:
            self._client = self.launch.store(_OPERATION_S)
        return self._client
