"""A pool rank's process: started with the threads, memory and patience that the configuration gives it, and ended.

    started --> serves --> last word said and flushed --> os._exit, never the interpreter's own end

An interpreter that tears down while threads are in C++ may abort (seen: exit code -6, a finished job reported as
failed). Knows how a process is called, not what it does, nor who asked for it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NoReturn, Protocol

from fapool_plugin.config import MIB, FAPoolConfig

_SILENCE_FACTOR = 6
"""A pool rank waits this many times ``timeout_s`` for its base: a base may be paused, a lost rank costs only time."""

_KILLED_S = 1.0
"""What has not ended so long after it was killed sleeps in the kernel, as when a page of a file does not come, or a
debugger has it. A base that waited for it would stand still, too."""


def start(
    use: Literal["link", "listen"],
    socks: Sequence[socket.socket],
    config: FAPoolConfig,
    *,
    device: str,
    node: int = 0,
    together: int = 1,
    key_file: str | None = None,
    report: str | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a pool rank that ends with this process.

    Args:
        use: whether it serves one base rank at the other end of the socket and ends with it, or all that come to
            these listeners. This process keeps its own descriptors.
        config: threads, memory, patience.
        device: torch device to compute on.
        node: number of the node it is on.
        together: processes that compute on that device.
        key_file: with the key of its links to other machines.
        report: a file that it tells of itself in.
    """
    command = [sys.executable, "-m", "fapool_plugin.pool.rank", f"--{use}", *(str(sock.fileno()) for sock in socks)]
    command += [*arguments(config, device, node, together), *(["--link-key", key_file] if key_file is not None else [])]
    command += ["--report", report] if report is not None else []
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment(config),
        pass_fds=[sock.fileno() for sock in socks],
        start_new_session=True,
    )


def arguments(config: FAPoolConfig, device: str, node: int = 0, together: int = 1) -> list[str]:
    """What a pool rank of this process is told, but whom it serves; ``together``: processes on its device."""
    told = ["--device", device, "--threads", str(config.threads_per_rank), "--parent", str(os.getpid())]
    told += ["--memory-limit", str((config.memory_limit_mib or 0) * MIB), "--block", str(config.kv_block)]
    told += ["--together", str(together)]
    told += ["--silence", str(max(30.0, _SILENCE_FACTOR * config.timeout_s)), "--node", str(node)]
    told += ["--nixl"] if config.carrier == "nixl" else []
    # The base gives a rank up that stands still for timeout_s: one that waits for another must have given up before.
    return [*told, "--patience", str(config.timeout_s / 2)]


def environment(config: FAPoolConfig) -> dict[str, str]:
    """Of a pool rank's process."""
    # The OpenMP runtime reads its team's size once, before torch can set it.
    found = os.environ | {"OMP_NUM_THREADS": str(config.threads_per_rank)}
    # A base that found this package by a path of its own must have ranks that find the same one.
    here = str(Path(__file__).resolve().parents[2])
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, (here, found.get("PYTHONPATH"))))}


def run_to_end(serve: Callable[[], object]) -> NoReturn:
    """Does what a process of ours is for, and ends it: with 0, with the code of a SystemExit, or with 1 and a traceback
    after another error. Handlers of ``atexit`` do not run."""
    code = 0
    try:
        serve()
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


class Process(Protocol):
    """A pool rank's, whatever started it."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def terminate(self) -> None:
        """Tells it to end."""

    def kill(self) -> None:
        """Ends it."""

    def wait(self, timeout: float | None = None) -> object:
        """Waits until it has ended. Raises subprocess.TimeoutExpired."""


def end(process: Process, patience_s: float) -> None:
    """Ends such a process, by a word and then by force, and collects it if it has ended then."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILLED_S)
