"""Where both ends of a link meet: a store, and how one end asks for a link that the other then opens.

Knows keys of a store; not what a link is for, nor who comes.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist

_FOREVER = timedelta(days=365)
"""A store that is gone ends a wait, too."""


def open_store(host: str, timeout: timedelta, port: int = 0) -> dist.TCPStore:
    """A store on ``port`` (0: a free one) of ``host`` alone: by itself a TCPStore listens on every interface. Raises
    OSError if the port is not to be had."""
    listener = socket.create_server((host, port))
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, None, True, timeout, False, master_listen_fd=listener.detach())


def request_link(store: dist.Store, worker: str) -> str:
    """Asks a worker for one more link; returns its name at both ends."""
    name = f"{worker}/link{store.add(f'{worker}/links', 1)}"
    store.set(f"{name}/wanted", "")
    return name


def wait_for_link_request(store: dist.Store, worker: str, number: int) -> str:
    """A worker's side: the name of the ``number``-th link asked for, from 1, when it is. Raises RuntimeError once the
    store is gone."""
    name = f"{worker}/link{number}"
    store.wait([f"{name}/wanted"], _FOREVER)
    return name
