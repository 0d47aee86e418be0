"""Where pool ranks come from, by the configuration, and the manager that borrows them: opened alike for every host.

Knows all sources, what each needs, and what a configuration wants written or served; not what ranks are for.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from fapool_plugin.base.agreement import Agree
from fapool_plugin.base.lease import Pool
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError, check_machine
from fapool_plugin.observe.available_memory import left_for_job
from fapool_plugin.observe.prometheus import serve
from fapool_plugin.observe.trace import Trace
from fapool_plugin.ranks.directory import library
from fapool_plugin.ranks.launch import JOINED
from fapool_plugin.ranks.launched import LaunchedPool
from fapool_plugin.ranks.linked import check_nixl
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.ranks.ray import RayPool


def open_manager(config: FAPoolConfig, agree: Agree | None = None, base_ranks: int = 1) -> ResourceManager:
    """The manager of one model, with the trace and the endpoint that the configuration asks for. Both end with
    ``close()``, and for those who never call it with the manager itself, or the interpreter.

    Args:
        agree: makes base ranks that share the model decide alike; None: the model is this rank's alone.
        base_ranks: how many base ranks share the model.

    Raises:
        FAPoolConfigError: as :func:`pool_maker` does.
        OSError: the trace cannot be written, or the port not be had.
    """
    manager = ResourceManager(config, pool_maker(config), agree, base_ranks)
    if not config.enabled:
        return manager
    weakref.finalize(manager, _close, manager.closing, os.getpid())
    try:
        if config.pool == "ray" or (config.pool == "local" and config.warm_start):
            manager.leases.make_pool()
        if config.trace is not None:
            manager.timeline.trace = manager.closing.enter_context(Trace(config.trace))
        if config.metrics_port is not None:
            # What ends with the manager must not keep it.
            stats = functools.partial(_stats_of, weakref.ref(manager))
            server = manager.closing.enter_context(serve(stats, config.metrics_port))
            manager.counters.log("metrics", f"served on port {server.port}")
    except BaseException:
        manager.close()
        raise
    return manager


def _stats_of(manager: weakref.ref[ResourceManager]) -> dict[str, Any]:
    found = manager()
    return found.stats() if found is not None else {}


def _close(closing: ExitStack, owner: int) -> None:
    """A forked child has the files of its parent, too, and must not write their ends."""
    if os.getpid() == owner:
        closing.close()


def pool_maker(config: FAPoolConfig) -> Callable[[FAPoolConfig], Pool]:
    """Makes the pool that a configuration asks for, when it is first needed; it can be pickled.

    Raises:
        FAPoolConfigError: more local ranks than memory can hold, ranks of a launch that was not joined, a pool on
            Ray without Ray, or a carrier that such ranks cannot have.
    """
    if config.enabled and config.pool != "launch":
        check_nixl(config, one_machine=config.pool == "local")
    if config.pool == "local" or not config.enabled:
        if not torch.cuda.is_available():  # else ranks may be there; the model is not here yet to say so
            check_machine(config, left_for_job())
        return LocalPool
    if config.pool == "ray":
        library()
        return RayPool
    launch = JOINED.get()
    if launch is None:
        raise FAPoolConfigError(
            '"pool": "launch", but no launch was joined: start with `deepspeed --module fapool_plugin.run SCRIPT '
            "--deepspeed_config FILE`, call fapool_plugin.integrations.deepspeed.setup(FILE) first, or set "
            '"pool": "local"'
        )
    return functools.partial(LaunchedPool, launch)
