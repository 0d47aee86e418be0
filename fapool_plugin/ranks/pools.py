"""Where pool ranks come from, by the configuration: started on this machine, or out of the launch.

Knows both sources and what each needs; not what ranks are for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import psutil

from fapool_plugin.base.lease import Pool
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError, check_machine
from fapool_plugin.ranks.launch import JOINED
from fapool_plugin.ranks.launched import LaunchedPool
from fapool_plugin.ranks.local import LocalPool


def pool_maker(config: FAPoolConfig) -> Callable[[FAPoolConfig], Pool]:
    """Makes the pool that a configuration asks for, when it is first needed; it can be pickled.

    Raises:
        FAPoolConfigError: more local ranks than memory can hold, or ranks of a launch that was not joined.
    """
    if config.pool == "local" or not config.enabled:
        check_machine(config, psutil.virtual_memory().available)
        return LocalPool
    launch = JOINED.get()
    if launch is None:
        raise FAPoolConfigError(
            '"pool": "launch", but no launch was joined: start with `deepspeed --module fapool_plugin.run SCRIPT '
            "--deepspeed_config FILE`, call fapool_plugin.integrations.deepspeed.setup(FILE) first, or set "
            '"pool": "local"'
        )
    return functools.partial(LaunchedPool, launch)
