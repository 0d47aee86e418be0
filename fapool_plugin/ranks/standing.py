"""A rank of a standing pool: runs a worker, says where it listens, and outlives the jobs that borrow it.

    made ──▶ starts a worker ──▶ it serves job after job, and grants its own lease ──▶ leave ──▶ free ──▶ ended
                  ▲                          │ it died, or was given up
                  └──────────────────────────┘

The rank itself computes nothing and imports no torch, so nothing that is computed can end it. Knows processes and
sockets; neither who made it nor what its worker is asked.
"""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from typing import Any

from fapool_plugin.config import MIB, FAPoolConfig
from fapool_plugin.pool import report
from fapool_plugin.pool.process import end, start
from fapool_plugin.ranks.own_folder import OwnFolder
from fapool_plugin.wire import PROTOCOL_VERSION
from fapool_plugin.wire.sockets import address_towards, listen, machine

_LOOK_S = 0.1
_SHORT_S = 5.0
_SHORT_LIVES = 5
"""A worker that dies so often within ``_SHORT_S`` of its start is not started again."""
_WORD_S = 1.0
"""A worker that is told to end gets so long to do it."""


class StandingRank:
    """One rank, until :meth:`leave`. Its methods may be called by several threads.

    Args:
        settings: of the pool, as ``FAPoolConfig.to_dict`` gives them: threads, memory, patience and key of a rank.
        device: torch device to compute on.
        towards: HOST:PORT of a machine on the network by which jobs on other machines come, if they may: with a key,
            or where the settings say ``insecure``.
        wanted: what it was asked for by, told again when another like it is made.
    """

    def __init__(
        self, settings: dict[str, Any], device: str = "cpu", towards: str = "", wanted: dict[str, Any] | None = None
    ) -> None:
        self._config, self._device, self._wanted = FAPoolConfig.load(settings), device, wanted
        host, _, port = towards.rpartition(":")
        is_open = towards and (self._config.link_key_file is not None or self._config.insecure)
        self._host = address_towards(host, int(port)) if is_open else ""
        self._folder = OwnFolder()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._addresses: list[str] = []
        self._lives = self._short_lives = 0
        self._began = 0.0
        self._leaves_by: float | None = None
        self._ended = threading.Event()
        self._start()
        threading.Thread(target=self._watch, name="fapool rank", daemon=True).start()

    def described(self) -> dict[str, Any]:
        """Plain values: where it listens, what it does, and since when."""
        with self._lock:
            told = report.read(self._report) if self._process is not None else report.Told()
            return {
                "protocol": PROTOCOL_VERSION,
                "machine": machine(),
                "host": socket.gethostname(),
                "pid": self._process.pid if self._process is not None else 0,
                "addresses": list(self._addresses),
                "state": self._state(told),
                "lives": self._lives,
                "up_s": time.monotonic() - self._began,
                "leased_s": max(0.0, time.time() - told.leased_ns / 1e9) if told.leased_ns else 0.0,
                "job": told.job.decode(),
                "requests": told.requests,
                "busy_s": told.busy_ns / 1e9,
                "held_bytes": told.held_bytes,
                "memory_bytes": self._config.cpu_limit_mib * MIB,
                "settings": self._config.to_dict(),
                "wanted": self._wanted,
            }

    def give_up(self, pid: int) -> None:
        """A job found that this worker stands still or is wrong: another takes its place."""
        with self._lock:
            if self._process is not None and self._process.pid == pid:
                end(self._process, 0.0)

    def leave(self, patience_s: float) -> None:
        """The worker takes no new lease and tells the job that has one, which gives it back at its next forward; the
        rank ends then, at the latest after ``patience_s``. Returns when it has ended."""
        with self._lock:
            self._leaves_by = time.monotonic() + patience_s
            if self._process is not None:
                report.leave(self._report)
        self._ended.wait(patience_s + 2 * _WORD_S)

    def _state(self, told: report.Told) -> str:
        if self._ended.is_set():
            return "ended"
        if self._process is None:
            return "failed"
        if self._leaves_by is not None:
            return "leaving"
        if not told.serves:
            return "starting"
        return "leased" if told.leased_ns else "free"

    def _start(self) -> None:
        """Starts a worker; jobs that connect before it serves wait."""
        self._lives += 1
        self._began = time.monotonic()
        self._report = self._folder.path / f"{self._lives}.report"
        report.make(self._report)
        with ExitStack() as mine:
            wanted = [f"unix:{self._folder.path}/{self._lives}", *([f"tcp:{self._host}:0"] if self._host else [])]
            listeners, addresses = zip(*(listen(address) for address in wanted), strict=True)
            for listener in listeners:
                mine.enter_context(listener)
            self._process = start(
                "listen",
                listeners,
                self._config,
                device=self._device,
                key_file=self._config.link_key_file,
                report=str(self._report),
            )
            self._addresses = list(addresses)

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            with self._lock:
                self._look()

    def _look(self) -> None:
        process = self._process
        if self._leaves_by is not None:
            leased = process is not None and process.poll() is None and report.read(self._report).leased_ns
            if not leased or time.monotonic() > self._leaves_by:
                if process is not None:
                    end(process, _WORD_S)
                self._folder.remove()
                self._process, self._addresses = None, []
                self._ended.set()
        elif process is not None and process.poll() is not None:
            self._short_lives = self._short_lives + 1 if time.monotonic() - self._began < _SHORT_S else 0
            self._process, self._addresses = None, []
            if self._short_lives < _SHORT_LIVES:
                self._start()
