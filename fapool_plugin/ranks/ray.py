"""A standing pool on Ray: its ranks are detached named actors, which jobs find by name and borrow one by one.

    fapool pool up ──▶ an actor for each rank ──▶ a worker that listens
                                                    ▲
    job: which ranks stand? ── where? ── link ──────┘   lease, keys, answers: over the link, never through Ray

Ray places ranks, names them, restarts them and tells which stand. Nothing secret is said through it: what lets a job
reach a rank on another machine is the key file that both have. Knows no call and no lease.
"""

from __future__ import annotations

import functools
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from fapool_plugin.base.lease import Outstanding, RanksStarting
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.devices.gpu import CPU
from fapool_plugin.ranks.launch import link_key
from fapool_plugin.ranks.standing import StandingRank
from fapool_plugin.wire.link import Link, first_line
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.ring import RING_BYTES
from fapool_plugin.wire.sockets import connect, machine
from fapool_plugin.wire.watch import watch_process

NAMESPACE = "fapool"
_ANSWER_S = 10.0
"""An actor that does not answer for so long is taken for gone."""
_OTHERS_S = 0.5
"""Once a rank has answered, the others are waited for so long: those that have no place yet answer later or never."""
_CALLERS = 16
"""Calls of one rank's actor at the same time: none of them computes."""


@dataclass(frozen=True)
class Request:
    """What Ray is asked for each rank."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    strategy: str = "SPREAD"


def library() -> Any:
    """Ray. Raises FAPoolConfigError if it is not installed."""
    try:
        import ray
    except ImportError:
        raise FAPoolConfigError('"pool": "ray" needs Ray, which is not installed: pip install "ray>=2.60"') from None
    return ray


def join(address: str | None) -> Any:
    """Ray, with this process in the cluster at an address; None is the one that it is in, or the one on this machine.

    Raises:
        FAPoolConfigError: there is no cluster there.
    """
    ray = library()
    if not ray.is_initialized():
        try:
            _check_reachable(address)
            ray.init(address=address or "auto", log_to_driver=False, configure_logging=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise FAPoolConfigError(
                f"no Ray cluster was found at ray_address {address or 'auto'!r} ({first_line(error)}): start one with "
                "`fapool pool up` or `ray start --head`, or give its address"
            ) from None
    return ray


def _check_reachable(address: str | None) -> None:
    """Ray itself takes half a minute to find out. Raises OSError."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _ANSWER_S).close()


def standing(ray: Any, pool: str) -> dict[int, Any]:
    """The actors of a pool by rank number."""
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        name, _, number = actor["name"].rpartition("/")
        if actor["namespace"] == NAMESPACE and name == pool and number.isdecimal():
            found[int(number)] = ray.get_actor(actor["name"], namespace=NAMESPACE)
    return dict(sorted(found.items()))


def pools(ray: Any) -> list[str]:
    """Names of the pools that stand."""
    named = (a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE)
    return sorted({name.rpartition("/")[0] for name in named})


def add(ray: Any, pool: str, numbers: Iterable[int], settings: FAPoolConfig, wanted: Request) -> list[Any]:
    """Asks for ranks with these numbers; each comes when Ray has room for it."""
    made = []
    for number in numbers:
        options: dict[str, Any] = {
            "name": f"{pool}/{number}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": -1,
            "max_concurrency": _CALLERS,
            "num_cpus": wanted.cpus,
            "num_gpus": wanted.gpus,
            "scheduling_strategy": wanted.strategy,
        }
        options |= {"memory": wanted.memory_bytes} if wanted.memory_bytes else {}
        options |= {"label_selector": dict(wanted.labels)} if wanted.labels else {}
        device = "cuda:0" if wanted.gpus else "cpu"  # Ray shows a process only its own
        told = settings.to_dict(), device, ray.get_runtime_context().gcs_address, asdict(wanted)
        made.append(ray.remote(StandingRank).options(**options).remote(*told))
    return made


def told(ray: Any, actors: dict[int, Any], within_s: float = _ANSWER_S) -> dict[int, dict[str, Any]]:
    """What each rank says of itself; those that are not placed yet, or do not answer, are missing."""
    asked = {actor.described.remote(): number for number, actor in actors.items()}
    ready: list[Any] = []
    for some, patience_s in ((1, within_s), (len(asked), _OTHERS_S)):
        ready, _ = ray.wait(list(asked), num_returns=some, timeout=patience_s) if asked else ([], [])
    found = {}
    for reference in ready:
        try:
            found[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError:
            continue  # it died, or is being made anew
    return dict(sorted(found.items()))


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
    shared: ClassVar[bool] = True
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _owner: int = field(default_factory=os.getpid)
    _loop: Loop = field(default_factory=Loop)

    def __post_init__(self) -> None:
        self._ray = join(self.config.ray_address)

    def new_token(self) -> int:
        """A lease of its own each time."""
        return secrets.randbits(62)

    def acquire(self, announce: Callable[[str], object], base: torch.device = CPU) -> dict[int, Link]:
        """Links to every rank that stands, those on this machine first; the pool has said where they compute. Raises
        RuntimeError if there is none."""
        actors = standing(self._ray, self.config.pool_name)
        for number, rank in list(self._ranks.items()):
            if rank.link.lost or number not in actors:
                self.discard(number, rank.link.lost or "it left the pool")
        said = told(self._ray, actors)
        problems = [f"pool rank {number} does not answer" for number in actors if number not in said]
        for number, one in said.items():
            if one["state"] == "leaving" and number in self._ranks:
                self._part(number, "it leaves the pool")
            if one["state"] in ("free", "leased") and number not in self._ranks:
                announce(f"linking to pool rank {number}")
                try:
                    self._ranks[number] = _Rank(actors[number], one["pid"], self._linked(number, one))
                except (OSError, LinkLost, FAPoolConfigError) as error:
                    problems.append(f"pool rank {number} opened no link: {first_line(error)}")
        if not self._ranks:
            if any(one["state"] == "starting" for one in said.values()):
                raise RanksStarting(f"the ranks of pool {self.config.pool_name!r} are being started")
            known = ", ".join(pools(self._ray)) or "none"
            raise RuntimeError(
                f"no rank of pool {self.config.pool_name!r} can be had"
                f" ({'; '.join(problems) or 'it has none'}; pools here: {known}): start it with "
                f"`fapool pool up --name {self.config.pool_name}`"
            )
        here = machine()
        near = sorted(self._ranks, key=lambda number: (said.get(number, {}).get("machine") != here, number))
        return {number: self._ranks[number].link for number in near}

    def discard(self, rank: int, reason: str) -> str:
        """Gives up a lost rank; its actor ends the worker, if it stands still, and starts another."""
        known = self._part(rank, reason)
        if known is None:
            return ""
        known.actor.give_up.remote(known.pid)
        return f" (pid {known.pid})"

    def close(self) -> None:
        """Says goodbye to all; they stay for others. Does nothing in a forked child, whose links they are not."""
        if os.getpid() != self._owner:
            return
        for number in list(self._ranks):
            self._ranks.pop(number).link.close()
        self._loop.close()

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
        limit_s = min(self.config.start_timeout_s, max(_ANSWER_S, self.config.timeout_s))
        link = Link(
            connect(address, limit_s, key, f"{self.config.pool_name}/{number}"),
            self._loop,
            name=f"pool rank {number}",
            timeout_s=self.config.timeout_s,
            asks=True,
            check=Outstanding(),
            address=address,
            ring_bytes=RING_BYTES if near and self.config.carrier != "inline" else 0,
        )
        try:
            if near:
                ended = f"its process {said['pid']} has ended"
                watch_process(self._loop, said["pid"], functools.partial(link.fail, ended))
            link.wait_until_heard(limit_s)
        except (OSError, LinkLost):
            link.close()
            raise
        return link
