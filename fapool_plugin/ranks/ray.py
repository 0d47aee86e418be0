"""The ranks of a standing pool as a model's own: found by name, linked to, leased if no other job has them.

    job: which ranks stand? ── where? ── link ── lease, keys, answers: over the link, never through Ray
         asked at the first long sequence, and again beside the job while it has fewer ranks than it may have

What lets a job reach a rank on another machine is the key file that both have. Knows no call.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from fapool_plugin.base.lease import RanksStarting
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.devices.gpu import CPU
from fapool_plugin.ranks.directory import OTHER, asked, figures, join, place, pools, standing, told
from fapool_plugin.ranks.launch import job_token, link_key
from fapool_plugin.ranks.linked import linked
from fapool_plugin.wire import PROTOCOL_VERSION
from fapool_plugin.wire.link import Link, first_line
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.sockets import connect, machine

_PATIENCE_S = 10.0
"""For a link, at least."""
_LOOK_S = 1.0
"""Between two looks for ranks that have come."""


@dataclass
class _Rank:
    actor: Any
    pid: int
    link: Link


@dataclass
class RayPool:
    """The ranks of a standing pool, for one model. What other jobs have leased is left to them.

    Args:
        config: which pool, on which cluster.
    """

    config: FAPoolConfig
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _far: dict[int, tuple[bool, int, bool]] = field(default_factory=dict)
    """How far each rank is: on another node of Ray's; which of the pool's domains is the first that it shares with this
    node; on another machine."""
    _token: int | None = field(default_factory=job_token)
    _owner: int = field(default_factory=os.getpid)
    _loop: Loop = field(default_factory=Loop)
    _finding: threading.Lock = field(default_factory=threading.Lock)
    _looked: float = -math.inf
    _said: list[dict[str, Any]] = field(default_factory=list)
    _asked: float = 0.0
    _closed: bool = False

    def __post_init__(self) -> None:
        self._ray = join(self.config.ray_address)

    def new_token(self) -> int:
        """A lease of its own each time; base ranks of one launch share theirs, as one job."""
        return self._token if self._token is not None else secrets.randbits(62)

    def acquire(self, announce: Callable[[str], object], base: torch.device = CPU) -> dict[int, Link]:
        """Links to every rank that stands, the nearest first; the pool has said where they compute. Raises
        RuntimeError if there is none, FAPoolConfigError if there is no cluster."""
        with self._finding:
            # A script may have left the cluster; asked anything then, Ray would start a cluster of its own.
            self._ray = join(self.config.ray_address)
            problems, said = self._find(announce, ())
            if not self._ranks:
                if any(one["state"] == "starting" for one in said.values()):
                    raise RanksStarting(f"the ranks of pool {self.config.pool_name!r} are being started")
                known = ", ".join(pools(self._ray)) or "none"
                raise RuntimeError(
                    f"no rank of pool {self.config.pool_name!r} can be had"
                    f" ({'; '.join(problems) or 'it has none'}; pools here: {known}): start it with "
                    f"`fapool pool up --name {self.config.pool_name}`"
                )
        return self._links()

    def look(self, leased: Collection[int]) -> dict[int, Link]:
        """Links to the ranks that are known. Others are looked for meanwhile, which may take Ray a while."""
        if time.monotonic() - self._looked > _LOOK_S and self._beside(leased):
            self._looked = time.monotonic()
        return self._links()

    @property
    def said(self) -> list[dict[str, Any]]:
        """What each rank of the pool said when it was asked last. They are asked again meanwhile."""
        age_s = round(time.monotonic() - self._asked, 1)
        if age_s > _LOOK_S:
            self._beside(None)
        return [one | {"age_s": age_s} for one in self._said]

    def _beside(self, leased: Collection[int] | None) -> bool:
        """Has Ray asked in a thread, unless that is being done; ``leased``: new ranks are looked for, too."""
        if self._finding.locked() or os.getpid() != self._owner or not self._ray.is_initialized():
            return False
        threading.Thread(target=self._look, args=(leased,), name="fapool ranks", daemon=True).start()
        return True

    def _look(self, leased: Collection[int] | None) -> None:
        # What it may meet, the next lease meets too, and tells; the loop may have been closed meanwhile, and Ray, of
        # which parts are missing then.
        with self._finding, suppress(RuntimeError, OSError, ValueError, AttributeError):
            if not self._closed and self._ray.is_initialized():
                self._ask() if leased is None else self._find(lambda text: None, leased)
            if self._closed:
                for number in list(self._ranks):
                    self._part(number, "closed")

    def _links(self) -> dict[int, Link]:
        """Those that stand, near ones first."""
        found = {number: rank.link for number, rank in list(self._ranks.items()) if not rank.link.lost}
        return {number: found[number] for number in sorted(found, key=lambda number: (self._far[number], number))}

    def _find(
        self, announce: Callable[[str], object], leased: Collection[int]
    ) -> tuple[list[str], dict[int, dict[str, Any]]]:
        """Links to ranks that have come, and gives up those that are gone, but for leased ones: of those their lease
        learns. Returns (why some have no link, what all said). Raises RuntimeError."""
        actors, said = self._ask()
        for number, rank in list(self._ranks.items()):
            if number not in leased and (rank.link.lost or number not in actors):
                self.discard(number, rank.link.lost or "it left the pool")
        problems = [f"pool rank {number} does not answer" for number in actors if number not in said]
        for number, one in said.items():
            if one["state"] == OTHER:
                versions = f"{one['protocol']}, this job {PROTOCOL_VERSION}"
                problems.append(f"pool rank {number} speaks protocol {versions}: install one version on both")
            # One that leaves says so itself, to the job that has its lease.
            if one["state"] in ("free", "leased") and number not in self._ranks and not self._closed:
                announce(f"linking to pool rank {number}")
                try:
                    self._ranks[number] = _Rank(actors[number], one["pid"], self._linked(number, one))
                except (OSError, LinkLost, FAPoolConfigError) as error:
                    problems.append(f"pool rank {number} opened no link: {first_line(error)}")
        return problems, said

    def _ask(self) -> tuple[dict[int, Any], dict[int, dict[str, Any]]]:
        """(The actors of the pool, what they say). Raises RuntimeError."""
        try:
            actors = standing(self._ray, self.config.pool_name)
            said = told(self._ray, actors)
            node, labels = place(self._ray)
        except self._ray.exceptions.RayError as error:
            raise RuntimeError(f"the Ray cluster does not answer: {first_line(error)}") from error
        self._far |= {number: _distance(one, node, labels) for number, one in said.items() if one["state"] != OTHER}
        self._said, self._asked = figures(actors, said), time.monotonic()
        return actors, said

    def discard(self, rank: int, reason: str) -> str:
        """Gives up a lost rank; its actor ends the worker, if it stands still, and starts another."""
        known = self._part(rank, reason)
        if known is None:
            return ""
        if self._ray.is_initialized():
            with suppress(self._ray.exceptions.RayError):  # the call goes on without this rank
                asked(known.actor.give_up, known.pid)
        return f" (pid {known.pid})"

    def close(self) -> None:
        """Says goodbye to all; they stay for others. Does nothing in a forked child, whose links they are not."""
        if os.getpid() != self._owner:
            return
        self._closed = True
        waited = self._finding.acquire(timeout=_LOOK_S)  # Ray may be slow to answer, and who looks is not waited for
        for number in list(self._ranks):
            self._ranks.pop(number).link.close()
        self._loop.close()
        if waited:
            self._finding.release()

    def _part(self, number: int, reason: str) -> _Rank | None:
        known = self._ranks.pop(number, None)
        if known is not None:
            known.link.fail(reason)
            known.link.close()
        return known

    def _linked(self, number: int, said: dict[str, Any]) -> Link:
        near = said["machine"] == machine()
        kind = "unix:" if near else "tcp:"
        address = next((one for one in said["addresses"] if one.startswith(kind)), None)
        if address is None:
            raise LinkLost(
                f"it is on another machine ({said['host']}), and its pool was started without a key: "
                "`fapool pool up --link-key-file FILE`"
            )
        key = None if near else link_key(self.config, address)
        limit_s = min(self.config.start_timeout_s, max(_PATIENCE_S, self.config.timeout_s))
        sock = connect(address, limit_s, key, f"{self.config.pool_name}/{number}")
        link = linked(sock, self._loop, self.config, number, said["pid"] if near else None, address)
        try:
            link.wait_until_heard(limit_s)
        except (OSError, LinkLost):
            link.close()
            raise
        return link


def _distance(said: dict[str, Any], node: str, labels: dict[str, str]) -> tuple[bool, int, bool]:
    """How far a rank that says this is from the node of this name and labels; least is nearest."""
    domains = said["wanted"]["domains"]
    shared = (at for at, name in enumerate(domains) if name in labels and said["labels"].get(name) == labels[name])
    return not node.startswith(said["node"]), next(shared, len(domains)), said["machine"] != machine()
