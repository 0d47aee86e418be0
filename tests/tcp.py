"""Both ends of a link between machines, on one: over TCP, and without a key."""

from __future__ import annotations

from functools import partial
from typing import Any

from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.sockets import connect, listen
from fapool_plugin.wire.window import Agents, Window


def tcp_pair(loops: tuple[Loop, Loop], ends: tuple[Agents | None, Agents | None], size: int, timeout_s: float) -> Any:
    """(base, rank), who make agents for NIXL by ``ends``."""
    listener, address = listen("tcp:127.0.0.1:0")
    with listener:
        mine = connect(address, 5.0)
        its, _ = listener.accept()
    windows = [None if agents is None else partial(Window, agents, size) for agents in ends]
    base = Link(mine, loops[0], name="test", timeout_s=timeout_s, asks=True, window=windows[0])
    return base, Link(its, loops[1], name="test", timeout_s=timeout_s, asks=False, window=windows[1])
