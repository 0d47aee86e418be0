"""The base's side of a fork server, and of the pool ranks that it makes.

Knows processes and a socket; what is said on it is in pool/fork_server.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from fapool_plugin.pool.process import end

_LONGEST = 65536


class ForkServer:
    """The base's handle on such a process. It is not waited for until the first rank is wanted.

    Args:
        environment: of the process, and so of its ranks.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        # Messages keep their ends, so that what is half done shows.
        self._control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "fapool_plugin.pool.fork_server"]
        command += ["--control", str(its.fileno()), "--base", str(os.getpid())]
        with its:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                pass_fds=(its.fileno(),),
                start_new_session=True,
            )

    def start(self, arguments: list[str], sock: socket.socket, timeout_s: float) -> ForkedRank | None:
        """A pool rank at the other end of ``sock``; None if the server cannot make it."""
        self._control.settimeout(timeout_s)
        try:
            socket.send_fds(self._control, [json.dumps(arguments).encode()], [sock.fileno()])
            child = int(self._control.recv(_LONGEST) or b"0")
            return ForkedRank(child) if child else None
        except OSError:
            return None
        except BaseException:
            self._control.close()  # its answer would be taken for the next one's
            raise

    def close(self) -> None:
        """Ends it; ranks end with their links."""
        self._control.close()
        end(self.process, 0.0)


class ForkedRank:
    """A process that is not this one's child: what :class:`subprocess.Popen` would be."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor: int | None = None
        with suppress(ProcessLookupError):  # it has ended already
            self._descriptor = os.pidfd_open(pid)

    def terminate(self) -> None:
        """Tells it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it."""
        self._signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> None:
        """Waits until it has ended. Raises TimeoutExpired."""
        if self._descriptor is None:
            return
        ended = select.poll()
        ended.register(self._descriptor, select.POLLIN)
        if not ended.poll(None if timeout is None else timeout * 1e3):
            raise subprocess.TimeoutExpired(f"pool rank {self.pid}", timeout or 0.0)
        os.close(self._descriptor)
        self._descriptor = None

    def _signal(self, number: int) -> None:
        if self._descriptor is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)
