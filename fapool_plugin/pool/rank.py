"""A pool rank's process: what it is told, its device, its links' loop, and the worker that serves them.

It ends with its links, or with its parent. Knows no request.
"""

from __future__ import annotations

import argparse
import os
import socket
from contextlib import suppress
from pathlib import Path

import torch

from fapool_plugin.devices.gpu import keys_limit, warm_up
from fapool_plugin.pool.exchange import Inbox
from fapool_plugin.pool.process import run_to_end
from fapool_plugin.pool.report import Report
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire import window
from fapool_plugin.wire.key_file import read_key
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.sockets import Listener
from fapool_plugin.wire.watch import watch_process

NAME = "fapool rank"
"""What the system's lists of processes say."""


def end_with_parent(loop: Loop, parent: int) -> None:
    """Ends this process once its parent is gone."""
    try:
        watch_process(loop, parent, lambda: os._exit(0))
    except ProcessLookupError:  # it was gone before it was watched
        os._exit(0)


def main(arguments: list[str] | None = None) -> None:
    """Entry of a pool rank's process."""
    parser = argparse.ArgumentParser(prog="python -m fapool_plugin.pool.rank", description=__doc__)
    served = parser.add_mutually_exclusive_group(required=True)
    served.add_argument("--link", type=int, help="descriptor of a socket to a base rank: serve it, and end with it")
    served.add_argument("--listen", type=int, nargs="+", help="listening descriptors: serve all who come, and stay")
    parser.add_argument("--threads", type=int, default=1, help="threads to compute with")
    parser.add_argument(
        "--memory-limit", type=int, default=0, help="bytes of keys and values to hold at most; 0: by the device"
    )
    parser.add_argument("--together", type=int, default=1, help="processes that compute on the device")
    parser.add_argument("--block", type=int, default=256, help="positions by which storage grows")
    parser.add_argument(
        "--silence", type=float, default=30.0, help="seconds without a word of a base rank after which its lease ends"
    )
    parser.add_argument("--patience", type=float, default=5.0, help="seconds to wait for what another pool rank sends")
    parser.add_argument("--node", type=int, default=0, help="number of the node this rank is on")
    parser.add_argument("--device", default="cpu", help="torch device to compute on")
    parser.add_argument("--link-key", metavar="FILE", help="with the key of all links; default: they have none")
    parser.add_argument("--nixl", action="store_true", help="links to other machines may use it, where it is installed")
    parser.add_argument("--report", metavar="FILE", help="where it tells of itself")
    parser.add_argument("--parent", type=int, default=0, help="process id to end with; 0: none")
    options = parser.parse_args(arguments)
    Path("/proc/self/comm").write_text(NAME)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    device = torch.device(options.device)
    warm_up(device)  # what a device needs at first is no standstill in a call
    limit = keys_limit(device, options.memory_limit, options.together)
    loop = Loop()
    if options.parent:
        end_with_parent(loop, options.parent)
    key = read_key(options.link_key) if options.link_key is not None else None
    inbox = Inbox(loop, options.patience, key)
    worker = Worker(inbox, limit, device, options.block, options.node, Report(options.report))
    if options.nixl:
        with suppress(ImportError):  # a base that asks for it is told
            worker.window = window.windows()

    def accepted(sock: socket.socket) -> Link:
        return worker.link(sock, options.silence)

    for descriptor in options.listen or ():
        Listener(socket.socket(fileno=descriptor), loop, accepted, key, options.patience)
    worker.serve(
        [accepted(socket.socket(fileno=options.link))] if options.link is not None else [], stay=options.link is None
    )


if __name__ == "__main__":
    run_to_end(main)
