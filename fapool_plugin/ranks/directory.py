"""Which ranks of standing pools there are, on Ray: detached named actors, made, found by name, asked what they do.

    pool "shared" of 3 ranks:  actors fapool:shared/0, fapool:shared/1, fapool:shared/2, each a StandingRank

Ray places ranks, names them, restarts them and tells which stand. Nothing secret is said through it. Imports no torch;
knows neither links nor leases.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.ranks.standing import StandingRank
from fapool_plugin.wire import PROTOCOL_VERSION

NAMESPACE = "fapool"
_ANSWER_S = 10.0
"""An actor that does not answer for so long is taken for gone."""
_OTHERS_S = 0.5
"""Once a rank has answered, the others are waited for so long: those that have no place yet answer later or never."""
_HIDDEN = {"protocol", "settings", "wanted", "addresses", "machine", "labels"}
OTHER = "other version"
"""State of a rank by another version of this package, of which no more is known than its protocol."""
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
    domains: tuple[str, ...] = ()
    """Not asked of Ray: labels of nodes by which jobs find near ranks, the narrowest domain first."""


def library() -> Any:
    """Ray. Raises FAPoolConfigError if it is not installed."""
    try:
        import ray
    except ImportError:
        raise FAPoolConfigError(
            '"pool": "ray" needs Ray, which is not installed: pip install fapool-plugin[ray]'
        ) from None
    return ray


class NoCluster(FAPoolConfigError):
    """There is none at an address."""


def join(address: str | None) -> Any:
    """Ray, with this process in the cluster at an address; None is the one that it is in, or that Ray finds.

    Raises:
        NoCluster: there is none.
        FAPoolConfigError: there is one, and it wants a token that this process has not.
    """
    ray = library()
    if not ray.is_initialized():
        where = address or "auto"
        try:
            where = _led_to_by_auto(ray) if where == "auto" else where
            if where == "local":
                raise ValueError("Ray would start another one")
            _check_reachable(where)
            ray.init(address=address or "auto", log_to_driver=False, configure_logging=False)
        except (OSError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            if _is_refused(error):
                raise FAPoolConfigError(
                    f"the Ray cluster at ray_address {where!r} did not take the token of this process: set "
                    "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH where the cluster's token is not in ~/.ray/auth_token"
                ) from None
            why = " ".join((str(error) or type(error).__name__).split())[:300]
            raise NoCluster(
                f"no Ray cluster was found at ray_address {where!r} ({why}): start one with `fapool pool up` or `ray "
                "start --head`, or give its address"
            ) from None
    return ray


def _is_refused(error: BaseException | None) -> bool:
    """Whether it is the token: Ray says so in the text of a cause."""
    return error is not None and ("AuthenticationError" in repr(error) or _is_refused(error.__cause__))


def _led_to_by_auto(ray: Any) -> str:
    """The address that Ray's RAY_ADDRESS says, or that of the last cluster of this machine, even if it was killed.
    Raises OSError if there was none."""
    find = getattr(ray._private.services, "get_ray_address_from_environment", None)  # none of Ray's public functions
    return str(find("auto", None)) if find is not None else "auto"


def _check_reachable(address: str) -> None:
    """Ray itself takes half a minute to find out. Raises OSError."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _ANSWER_S).close()


def never_joining(function: Any) -> Any:
    """A function of Ray's that raises where this process is in no cluster. As it is, it would start one: a script may
    leave the cluster at any moment, while threads of ours look for ranks."""
    return getattr(function, "__wrapped__", function)


def asked(method: Any, *arguments: Any) -> Any:
    """What an actor's method will answer, which is called now, if this process is in a cluster."""
    return never_joining(type(method)._remote)(method, arguments, {})


def standing(ray: Any, pool: str) -> dict[int, Any]:
    """The actors of a pool by rank number."""
    found = {}
    for actor in never_joining(ray.util.list_named_actors)(all_namespaces=True):
        name, _, number = actor["name"].rpartition("/")
        if actor["namespace"] == NAMESPACE and name == pool and number.isdecimal():
            with suppress(ValueError):  # it has ended meanwhile
                found[int(number)] = never_joining(ray.get_actor)(actor["name"], namespace=NAMESPACE)
    return dict(sorted(found.items()))


def pools(ray: Any) -> list[str]:
    """Names of the pools that stand."""
    named = never_joining(ray.util.list_named_actors)(all_namespaces=True)
    return sorted({one["name"].rpartition("/")[0] for one in named if one["namespace"] == NAMESPACE})


def place(ray: Any) -> tuple[str, dict[str, str]]:
    """(Ray's name, labels) of the node that this process is on."""
    context = never_joining(ray.get_runtime_context)()
    return context.get_node_id(), dict(context.get_node_labels())


class _Rank(StandingRank):
    """A rank that knows the node it is on, by Ray's name and labels."""

    def described(self) -> dict[str, Any]:
        node, labels = place(library())
        return super().described() | {"node": node[:8], "labels": labels}


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
        made.append(ray.remote(_Rank).options(**options).remote(*told))
    return made


def told(ray: Any, actors: dict[int, Any], within_s: float = _ANSWER_S) -> dict[int, dict[str, Any]]:
    """What each rank says of itself; those that are not placed yet, or do not answer, are missing."""
    answers = {asked(actor.described): number for number, actor in actors.items()}
    wait, get = never_joining(ray.wait), never_joining(ray.get)
    ready: list[Any] = []
    for some, patience_s in ((1, within_s), (len(answers), _OTHERS_S)):
        ready, _ = wait(list(answers), num_returns=some, timeout=patience_s) if answers else ([], [])
    found = {}
    for reference in ready:
        try:
            said = get(reference)
        except ray.exceptions.RayError:
            continue  # it died, or is being made anew
        protocol = said.get("protocol")
        found[answers[reference]] = said if protocol == PROTOCOL_VERSION else {"state": OTHER, "protocol": protocol}
    return dict(sorted(found.items()))


def figures(actors: Iterable[int], said: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each rank says, without how it was made and is reached; those that say nothing wait for a place."""
    nothing = {"state": "waiting"}
    return [
        {"rank": number, **{key: value for key, value in said.get(number, nothing).items() if key not in _HIDDEN}}
        for number in actors
    ]
