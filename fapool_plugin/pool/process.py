"""A pool rank's process: started with the threads, memory and patience that the configuration gives it, and ended.

    started --> serves --> last word said and flushed --> os._exit, never the interpreter's own end

An interpreter that tears down while threads of stores and links are in C++ may abort (seen: exit code -6, a finished
job reported as failed). Knows how a process is called, not what it does, nor who asked for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from fapool_plugin.config import MIB, FAPoolConfig

_SILENCE_FACTOR = 6
"""A pool rank waits this many times ``timeout_s`` for its base: a base may be paused, a lost rank costs only time."""


def start(
    name: str, store: str, config: FAPoolConfig, *, device: str, bind: str = "", node: int = 0, stay: bool = False
) -> subprocess.Popen[bytes]:
    """Starts a pool rank that ends with this process, or when its standard input is closed.

    Args:
        name: by which links to it are asked for.
        store: HOST:PORT where base and pool ranks meet.
        config: threads, memory, patience.
        device: torch device to compute on.
        bind: address for its links; default: the store's host.
        node: number of the node it is on.
        stay: whether it outlives its first link.
    """
    command = [sys.executable, "-m", "fapool_plugin.pool.worker", "--store", store, "--name", name, "--device", device]
    command += ["--threads", str(config.threads_per_rank), "--parent", str(os.getpid()), "--node", str(node)]
    command += ["--memory-limit", str(config.memory_limit_mib * MIB), "--block", str(config.kv_block)]
    command += ["--silence", str(max(30.0, _SILENCE_FACTOR * config.timeout_s)), "--patience", str(config.timeout_s)]
    command += [*(["--bind", bind] if bind else []), *(["--stay"] if stay else [])]
    # The OpenMP runtime reads its team's size once, before torch can set it.
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads_per_rank)}
    # A store that is gone is how a job ends; torch would print a stack of its own for it.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A base that found this package by a path of its own must have ranks that find the same one.
    here = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (here, environment.get("PYTHONPATH"))))
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )


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


def end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Ends such a process, by a word and then by force, and collects it."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
