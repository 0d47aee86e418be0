"""A link to a pool rank over a socket that is there, made alike for ranks from every source.

Knows what a configuration says of links; not how a rank is found or reached.
"""

from __future__ import annotations

import functools
from typing import Any

from fapool_plugin.base.lease import Outstanding
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.wire import window
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.ring import RING_BYTES
from fapool_plugin.wire.watch import watch_process


def linked(sock: Any, loop: Loop, config: FAPoolConfig, number: int, pid: int | None, address: str = "") -> Link:
    """The base's end; it may not have been heard yet.

    Args:
        sock: connected; the link's from now on.
        loop: serves it.
        config: patience and carrier.
        number: the rank's.
        pid: of its process, with which the link ends; None: that is on another machine.
        address: where other ranks reach it; empty: nowhere.
    """
    link = Link(
        sock,
        loop,
        name=f"pool rank {number}",
        timeout_s=config.timeout_s,
        asks=True,
        check=Outstanding(),
        address=address,
        ring_bytes=0 if pid is None or config.carrier == "inline" else RING_BYTES,
        window=window.windows() if pid is None and config.carrier == "nixl" else None,
    )
    if pid is not None:
        ended = f"its process {pid} has ended"
        try:
            watch_process(loop, pid, functools.partial(link.fail, ended))
        except ProcessLookupError:
            link.fail(ended)
    return link


def check_nixl(config: FAPoolConfig, *, one_machine: bool) -> None:
    """Refuses the carrier nixl where it cannot be, before anything starts.

    Args:
        config: as configured.
        one_machine: whether all ranks are on one.

    Raises:
        FAPoolConfigError: it is asked for, and not to be had.
    """
    if config.carrier != "nixl":
        return
    if one_machine or config.pool != "launch":
        raise FAPoolConfigError(
            f"carrier is nixl, which moves bodies between machines of a launch, and pool is {config.pool}"
            f"{', on one machine' if config.pool == 'launch' else ''}; use auto"
        )
    if config.link_key_file is not None or not config.insecure:
        raise FAPoolConfigError(
            "carrier is nixl: what it moves is not encrypted, and links between machines are, by link_key_file; leave "
            'that out and set "insecure": true where you trust every process of the network, or use auto'
        )
    try:
        window.agents()
    except ImportError as error:
        raise FAPoolConfigError(f"carrier is nixl: {error}; or use auto") from None
