"""A link to a pool rank over a socket that is there, made alike for ranks from every source.

Knows what a configuration says of links; not how a rank is found or reached.
"""

from __future__ import annotations

import functools
from typing import Any

from fapool_plugin.base.lease import Outstanding
from fapool_plugin.config import FAPoolConfig
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
    )
    if pid is not None:
        ended = f"its process {pid} has ended"
        try:
            watch_process(loop, pid, functools.partial(link.fail, ended))
        except ProcessLookupError:
            link.fail(ended)
    return link
