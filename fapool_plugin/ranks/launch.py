"""A launch of several ranks, told apart into base ranks and pool ranks before torch.distributed starts.

Reads what the launcher says of each rank (deepspeed, torchrun, accelerate, Open MPI, MPICH, Slurm), lets all ranks meet
at a store that rank 0 hosts, and tells the base ranks the world that is theirs, as their launcher would have. The
trainer's world never contains a pool rank. It knows no framework and no model.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import warnings
from collections.abc import MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b

import torch
import torch.distributed as dist

from fapool_plugin.config import MIB, RANK_MIB, FAPoolConfig, FAPoolConfigError
from fapool_plugin.observe.available_memory import left_for_job
from fapool_plugin.ranks.placement import Placement, place
from fapool_plugin.wire.key_file import lease_token, read_key
from fapool_plugin.wire.sockets import address_towards, machine

_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_WORLD = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_NODE = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")
"""Variables of the launchers, in the order in which they are believed."""
_LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Launch:
    """This rank's place in a launch. Plain values: it can be copied and pickled."""

    host: str
    port: int
    """Where the store is."""
    run: str
    """Begins every key of this run in the store."""
    token: int
    """Names the job to pool ranks: all its base ranks share one lease."""
    bind: str
    """This machine's address for links."""
    base_ranks: int
    pool_ranks: int
    number: int
    """Among the base ranks, or in the pool."""
    is_pool: bool
    node: int
    device: str
    """For a pool rank."""
    one_machine: bool
    """Whether all ranks are on one machine, and can meet in its file system."""

    def store(self, timeout_s: float) -> dist.TCPStore:
        """A client of the store; each thread that may wait needs one of its own."""
        return dist.TCPStore(self.host, self.port, None, False, timedelta(seconds=timeout_s))

    def pool_key(self, rank: int) -> str:
        """Where a pool rank's supervisor writes the name of the worker it runs."""
        return f"{self.run}/pool{rank}"

    @property
    def over_key(self) -> str:
        """Counts the base ranks that have ended."""
        return f"{self.run}/over"

    @property
    def gone_key(self) -> str:
        """Counts the pool ranks that have ended."""
        return f"{self.run}/gone"


JOINED: ContextVar[Launch | None] = ContextVar("fapool_launch", default=None)
"""What this process joined: what loads a model in the user's script has no other way to it."""


def is_first(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this is the rank that speaks for all."""
    return not _number(environment, _RANK)


def join(config: FAPoolConfig, environment: MutableMapping[str, str] = os.environ) -> tuple[Launch, dist.TCPStore]:
    """Meets the other ranks and learns which of them are pool ranks. A base rank's environment then describes a world
    of base ranks; call it before anything starts torch.distributed. The store is to be kept: it ends with rank 0's.

    Raises:
        FAPoolConfigError: not launched, started already, no base rank left, too little memory, a busy port, or ranks
            that did not come within ``start_timeout_s``.
    """
    rank, world = _number(environment, _RANK), _number(environment, _WORLD)
    if rank is None or world is None:
        raise FAPoolConfigError(
            '"pool": "launch" takes pool ranks from a launch, and this process was not launched (no RANK and '
            "WORLD_SIZE): start it with `deepspeed --num_gpus N --module fapool_plugin.run SCRIPT ...` or torchrun, or "
            'set "pool": "local"'
        )
    if dist.is_available() and dist.is_initialized():
        raise FAPoolConfigError(
            "torch.distributed has started with the pool ranks in its world: call fapool's setup first, or start with "
            "--module fapool_plugin.run"
        )
    place([0] * world, config.pool_ranks, "last")  # refuses before anybody waits
    host = environment.get("MASTER_ADDR") or _only_node(environment, world)
    port = config.store_port or int(environment.get("MASTER_PORT", _DEFAULT_PORT)) + 1
    run = f"fapool/{environment.get('TORCHELASTIC_RUN_ID', 'run')}/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    local_rank = _number(environment, _LOCAL_RANK) or 0
    seat = {
        "machine": machine(),
        "node": _number(environment, _NODE),
        "local": local_rank,
        "host": socket.gethostname(),
        "free": left_for_job(),
        "on_gpu": torch.cuda.is_available(),
    }
    store = _meet(host, port, rank, config)
    if rank == 0:
        store.set(f"{run}/token", str(secrets.randbits(62)))
    store.set(f"{run}/seat{rank}", json.dumps(seat))
    try:
        seats = [json.loads(store.get(f"{run}/seat{other}")) for other in range(world)]
    except RuntimeError:
        missing = [other for other in range(world) if not store.check([f"{run}/seat{other}"])]
        raise FAPoolConfigError(
            f"{len(missing)} of {world} ranks (first: rank {missing[0] if missing else '?'}) did not come to "
            f"{host}:{port} within start_timeout_s = {config.start_timeout_s:g} s: is the section the same everywhere?"
        ) from None
    placement = place(_nodes(seats), config.pool_ranks, config.pool_placement)
    _check_memory(placement, seats, config)
    one_machine, bind = len({seat["machine"] for seat in seats}) == 1, address_towards(host, port)
    key = None if one_machine else link_key(config, bind, warns=rank == 0)
    is_pool, node = rank in placement.pool, placement.nodes[rank]
    launch = Launch(
        host=host,
        port=port,
        run=run,
        token=lease_token(key, run) if key is not None else int(store.get(f"{run}/token")),
        bind=bind,
        base_ranks=len(placement.base),
        pool_ranks=len(placement.pool),
        number=(placement.pool if is_pool else placement.base).index(rank),
        is_pool=is_pool,
        node=node,
        device=f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu",
        one_machine=one_machine,
    )
    if not is_pool:
        environment.update(_world_of_base_ranks(placement, launch, local_rank, host, environment))
        JOINED.set(launch)
    return launch, store


def job_token(environment: MutableMapping[str, str] = os.environ) -> int | None:
    """A lease that all base ranks of one launch name alike without a word between them, other launches differently;
    None: this process is alone. No secret: who may link to a rank does not depend on it."""
    world = _number(environment, _WORLD)
    if not world or world == 1:
        return None
    host = environment.get("MASTER_ADDR", "")
    where = host if host not in ("", "localhost", "127.0.0.1", "::1") else machine()
    names = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    run = "/".join([where, str(os.getuid()), *(environment.get(name, "") for name in names)])
    return int.from_bytes(blake2b(run.encode(), digest_size=8).digest(), "little") >> 2


def link_key(config: FAPoolConfig, bind: str, *, warns: bool = False) -> bytes | None:
    """The key of links between machines, at the address ``bind``; None: they have none.

    Raises:
        FAPoolConfigError: there is none and they would be open to others, or it cannot be used.
    """
    if config.link_key_file is not None:
        try:
            return read_key(config.link_key_file)
        except ValueError as error:
            raise FAPoolConfigError(f"link_key_file: {error}") from None
    if not config.insecure:
        raise FAPoolConfigError(
            f"ranks are on several machines and links at {bind} have no key: a process that reaches a port there could "
            "read keys and values, or answer in a rank's place. Make a key (head -c 64 /dev/urandom > FILE; chmod 600 "
            'FILE), copy it to every machine and set link_key_file to it; or set "insecure": true'
        )
    if warns:
        warnings.warn(
            f"fa_pool: links between machines, at {bind}, have no key (insecure: true): use this on networks where "
            "you trust every process",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def _number(environment: MutableMapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return None


def _only_node(environment: MutableMapping[str, str], world: int) -> str:
    """The master's address where the launcher names none: this machine, if all ranks are on it."""
    here = _number(environment, _LOCAL_SIZES)
    tasks = re.fullmatch(r"(\d+)", environment.get("SLURM_TASKS_PER_NODE", ""))
    if world in (here, int(tasks[1]) if tasks else None):
        return "127.0.0.1"
    raise FAPoolConfigError(
        f"MASTER_ADDR is not set, and {world} ranks may be on several nodes: set MASTER_ADDR to the host of rank 0 "
        "and MASTER_PORT to a free port there, for all ranks"
    )


def _meet(host: str, port: int, rank: int, config: FAPoolConfig) -> dist.TCPStore:
    timeout = timedelta(seconds=config.start_timeout_s)
    if rank:
        try:
            return dist.TCPStore(host, port, None, False, timeout)
        except RuntimeError as error:
            raise FAPoolConfigError(
                f"rank {rank} found no store at {host}:{port} within start_timeout_s = {config.start_timeout_s:g} s: "
                f"rank 0 opens it there; can it be reached? ({str(error).splitlines()[0][:120]})"
            ) from None
    try:
        # By itself a TCPStore listens on every interface.
        listener = socket.create_server((host, port))
        return dist.TCPStore(host, port, None, True, timeout, False, master_listen_fd=listener.detach())
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
        raise FAPoolConfigError(
            f"port {port} on {host}, where base and pool ranks meet, {why}: set store_port to a free port of rank 0's "
            "machine, or MASTER_PORT to one whose next is free"
        ) from None


def _nodes(seats: list[dict[str, int | str | None]]) -> list[int]:
    """Numbers nodes in the order of their first rank: as the launcher names them, else by host and by local ranks that
    begin anew."""
    names: list[tuple[object, ...]] = []
    fresh = 0
    for rank, seat in enumerate(seats):
        fresh += rank > 0 and seat["local"] == 0
        names.append((seat["node"],) if seat["node"] is not None else (seat["host"], fresh))
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names]


def _check_memory(placement: Placement, seats: list[dict[str, int]], config: FAPoolConfig) -> None:
    for node in dict.fromkeys(placement.nodes):
        # A rank with a GPU keeps keys there, and no more than it finds free.
        ranks = [rank for rank in placement.pool_on(node) if not seats[rank]["on_gpu"]]
        free = min((seats[rank]["free"] // MIB for rank in ranks), default=0)
        needed = len(ranks) * (config.cpu_limit_mib + RANK_MIB)
        if ranks and needed > free:
            raise FAPoolConfigError(
                f"{len(ranks)} pool ranks of node {node} with memory_limit_mib = {config.cpu_limit_mib}, and "
                f"{RANK_MIB} MiB for each process, need {needed} MiB, and {free} MiB are available there; set it to "
                f"{max(0, free // len(ranks) - RANK_MIB)} or less, or use fewer ranks"
            )


def _world_of_base_ranks(
    placement: Placement, launch: Launch, local_rank: int, host: str, environment: MutableMapping[str, str]
) -> dict[str, str]:
    """What a launcher that started the base ranks alone would have said."""
    here = len(placement.base_on(launch.node))
    nodes = list(dict.fromkeys(placement.nodes[rank] for rank in placement.base))
    world = {
        "RANK": str(launch.number),
        "WORLD_SIZE": str(launch.base_ranks),
        "LOCAL_RANK": str(local_rank),
        # DeepSpeed's own; torchrun's is kept in step if it is there.
        "LOCAL_SIZE": str(here),
        "MASTER_ADDR": host,
        "MASTER_PORT": environment.get("MASTER_PORT", str(_DEFAULT_PORT)),
    }
    known = {"LOCAL_WORLD_SIZE": str(here), "CROSS_RANK": str(nodes.index(launch.node)), "CROSS_SIZE": str(len(nodes))}
    known |= {"GROUP_RANK": known["CROSS_RANK"], "GROUP_WORLD_SIZE": known["CROSS_SIZE"]}
    known |= {"ROLE_RANK": world["RANK"], "ROLE_WORLD_SIZE": world["WORLD_SIZE"]}
    return world | {name: value for name, value in known.items() if name in environment}
