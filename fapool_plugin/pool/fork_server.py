"""Pool ranks in milliseconds: a process that has imported all that they need, and becomes one by forking.

    base ── arguments, a socket ──▶ fork server ── fork ──▶ pool rank, at the other end of that socket
    base ◀── process id ─────────── fork server

It has a single thread and no CUDA, so that a fork of it is a whole process; where that does not hold it says so, and
the rank is started the long way. It ends with the base. Knows how processes begin, not what they do.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket

from fapool_plugin.pool import rank
from fapool_plugin.pool.process import run_to_end

_LONGEST = 65536


def main(arguments: list[str] | None = None) -> None:
    """Entry of the process. Serves until its base is gone."""
    parser = argparse.ArgumentParser(prog="python -m fapool_plugin.pool.fork_server", description=__doc__)
    parser.add_argument("--control", type=int, required=True, help="descriptor of a socket to the base")
    parser.add_argument("--base", type=int, required=True, help="process id to end with")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ranks that have ended are collected by the system
    control = socket.socket(fileno=options.control)
    watched = select.poll()
    for descriptor in (control.fileno(), os.pidfd_open(options.base)):
        watched.register(descriptor, select.POLLIN)
    while control.fileno() in dict(found := watched.poll()) and len(found) == 1:
        data, descriptors, _, _ = socket.recv_fds(control, _LONGEST, 1)
        if not data:
            break
        control.send(str(_forked(json.loads(data), descriptors, control)).encode())
    os._exit(0)


def _forked(arguments: list[str], descriptors: list[int], control: socket.socket) -> int:
    """Becomes a pool rank in a child; its process id, 0 if this process has more than a single thread."""
    alone = len(os.listdir("/proc/self/task")) == 1
    child = os.fork() if alone else 0
    if alone and not child:
        control.close()
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        run_to_end(lambda: rank.main([*arguments, "--link", str(descriptors[0])]))
    for descriptor in descriptors:
        os.close(descriptor)
    return child


if __name__ == "__main__":
    run_to_end(main)
