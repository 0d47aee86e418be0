"""A launched pool rank: runs a worker in a process of its own, starts another if that dies, ends with the base ranks.

Launchers end a whole job at the first rank that fails. So the launched rank itself computes nothing and cannot fail by
computing. It knows processes and a few keys of the launch's store.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import FrameType

from fapool_plugin.config import FAPoolConfig
from fapool_plugin.pool.process import end, start
from fapool_plugin.ranks.launch import Launch

_LOOK_S = 0.25
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
    worker, began = "", 0.0
    try:
        while store.add(launch.over_key, 0) < launch.base_ranks:
            if process is not None and store.check([f"{worker}/discarded"]):
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
                worker, began = f"{key}.{lives}", time.monotonic()
                process = _start(launch, config, worker)
                store.set(key, worker)
            time.sleep(_LOOK_S)
        if process is not None:
            end(process, 1.0)
        store.add(launch.gone_key, 1)
    except RuntimeError:
        pass  # the store ended, and with it rank 0
    finally:
        if process is not None:
            end(process, 1.0)


def _start(launch: Launch, config: FAPoolConfig, worker: str) -> subprocess.Popen[bytes]:
    store = f"{launch.host}:{launch.port}"
    return start(worker, store, config, device=launch.device, bind=launch.bind, node=launch.node, stay=True)


def _stop(signum: int, frame: FrameType | None) -> None:
    """Unwinds the stack, so that the worker is ended; exit code 0 disturbs no launcher."""
    raise SystemExit(0)


def _say(launch: Launch, what: str) -> None:
    print(f"fa_pool: pool rank {launch.number}: {what}", file=sys.stderr, flush=True)
