"""What a launched pool rank's supervisor says of its worker, and when."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import pytest

from fapool_plugin.base.lease import RanksStarting
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.pool.process import start
from fapool_plugin.ranks import supervise
from fapool_plugin.ranks.launch import join
from fapool_plugin.ranks.launched import LaunchedPool
from tests.launches import free_port, until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

SETTINGS = FAPoolConfig(pool="launch", pool_ranks=1, memory_limit_mib=16, start_timeout_s=60)


def test_a_worker_that_is_being_started_again_is_neither_waited_for_nor_given_up(
    monkeypatch: pytest.MonkeyPatch, none_left: None
) -> None:
    known = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [known | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    with ThreadPoolExecutor(2) as team:
        (base, store), (rank, _) = team.map(lambda one: copy_context().run(join, SETTINGS, one), environments)
    started: list[subprocess.Popen[bytes]] = []

    def slowly(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        process = start(*arguments, **settings)
        process.send_signal(signal.SIGSTOP)
        started.append(process)
        return process

    monkeypatch.setattr(supervise, "start", slowly)
    # Handlers are for the main thread.
    names = {"signal": lambda *handler: None, "SIGTERM": 0, "SIGINT": 0, "SIG_IGN": 0}
    monkeypatch.setattr(supervise, "signal", SimpleNamespace(**names))
    thread, pool = threading.Thread(target=supervise.supervise, args=(rank, SETTINGS)), LaunchedPool(base, SETTINGS)
    thread.start()
    try:
        until(lambda: started, 30)
        pool._seen.add(0)  # it was here, and was lost
        with pytest.raises(RanksStarting, match="is being started"):
            pool.acquire(lambda text: None)
        os.kill(started[0].pid, signal.SIGCONT)
        pool._seen.clear()  # a base rank's first link waits for it
        assert list(pool.acquire(lambda text: None)) == [0]
        assert len(started) == 1, "it was given up while it was being started"
    finally:
        for process in started:
            process.send_signal(signal.SIGCONT)
        pool.close()
        store.add(base.over_key, 1)
        thread.join(30)
