"""A launched pool rank: runs a worker in a process of its own, starts another if that dies, ends with the base ranks.

Launchers end a whole job at the first rank that fails. So the launched rank itself computes nothing and cannot fail by
computing. It knows processes and a few keys of the launch's store.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.pool import report
from fapool_plugin.pool.process import end, start
from fapool_plugin.ranks.launch import Launch
from fapool_plugin.ranks.own_folder import OwnFolder
from fapool_plugin.wire.sockets import listen

_LOOK_S, _START_LOOK_S = 0.25, 0.05
_STORE_S = 5.0
"""A store that does not answer for so long is gone."""
_SHORT_S = 5.0
_SHORT_LIVES = 5
"""A worker that dies so often within ``_SHORT_S`` of its start is not started again."""


def supervise(launch: Launch, config: FAPoolConfig) -> None:
    """Keeps a worker running until every base rank has ended, by whatever way, or this process is told to end."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all ranks: the base decides
    store, key = launch.store(_STORE_S), launch.pool_key(launch.number)
    lives, short_lives = 0, 0
    process: subprocess.Popen[bytes] | None = None
    worker, began, address, serves = "", 0.0, "", False
    folder = OwnFolder()
    try:
        while store.add(launch.over_key, 0) < launch.base_ranks:
            late = not serves and time.monotonic() - began > config.start_timeout_s
            if process is not None and (late or store.check([f"{worker}/discarded"])):
                end(process, 0.0)
            if process is not None and process.poll() is not None:
                _say(launch, f"its worker (pid {process.pid}) ended with exit code {process.returncode}")
                short_lives = short_lives + 1 if time.monotonic() - began < _SHORT_S else 0
                process = None
                if short_lives == _SHORT_LIVES:
                    why = f"its worker died {short_lives} times within {_SHORT_S:g} s of its start"
                    _say(launch, f"{why}, and is not started again")
                    store.set(f"{key}/gone", why)
            if process is None and short_lives < _SHORT_LIVES:
                lives += 1
                worker, began, serves = f"{key}.{lives}", time.monotonic(), False
                process, address = _start(launch, config, f"{folder.path}/{lives}")
                store.set(key, worker)
            if process is not None and not serves and report.read(Path(f"{folder.path}/{lives}.report")).serves:
                # Not before: a base rank would wait for it in the middle of a forward, and give it up.
                serves = True
                store.set(f"{worker}/ready", f"{process.pid} {address}")
            time.sleep(_LOOK_S if serves else _START_LOOK_S)
        if process is not None:
            end(process, 1.0)
        store.add(launch.gone_key, 1)
    except RuntimeError:
        pass  # the store ended, and with it rank 0
    finally:
        if process is not None:
            end(process, 1.0)
        folder.remove()


def _start(launch: Launch, config: FAPoolConfig, path: str) -> tuple[subprocess.Popen[bytes], str]:
    """(a worker, the address where it listens)."""
    listener, address = listen(f"unix:{path}" if launch.one_machine else f"tcp:{launch.bind}:0")
    key_file = None if launch.one_machine else config.link_key_file
    report.make(told := Path(f"{path}.report"))
    with listener:
        process = start(
            "listen", [listener], config, device=launch.device, node=launch.node, key_file=key_file, report=str(told)
        )
        return process, address


def _stop(signum: int, frame: FrameType | None) -> None:
    """Unwinds the stack, so that the worker is ended; exit code 0 disturbs no launcher."""
    raise SystemExit(0)


def _say(launch: Launch, what: str) -> None:
    print(f"fa_pool: pool rank {launch.number}: {what}", file=sys.stderr, flush=True)
