"""Real launches of small scripts: what they print and write, and that every process of theirs ends.

Knows launchers' command lines and processes, not what a script computes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "tests" / "scripts"
BIN = Path(sys.executable).parent
LIMIT_S = 150.0
MARK = "FAPOOL_TEST_LAUNCH"
"""In the environment of every process of a launch, whatever its parent is by now."""


def free_port() -> int:
    """A port that is free, and the next one, too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return int(port)
            except OSError:
                continue


def deepspeed(ranks: int, *more: str) -> list[str]:
    """The beginning of a command line of DeepSpeed's launcher."""
    return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), *more]


def torchrun(ranks: int) -> list[str]:
    """The beginning of a command line of torchrun."""
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), *address]


def accelerate(*options: str) -> list[str]:
    """The beginning of a command line of Accelerate's launcher."""
    port = ["--main_process_port", str(free_port())]
    return [str(BIN / "accelerate"), "launch", *port, "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", *options]  # fmt: skip


def by_runner(script: str) -> list[str]:
    """The script, started by the plugin's runner."""
    return ["--module", "fapool_plugin.run", str(SCRIPTS / script)]


@dataclass
class Launched:
    """A launch that runs, or has ended."""

    folder: Path
    process: subprocess.Popen[str]
    mark: str
    code: int | None = None
    said: str = ""

    def wait(self, limit_s: float = LIMIT_S) -> Launched:
        """Waits for its end."""
        said, _ = self.process.communicate(timeout=limit_s)
        self.code, self.said = self.process.returncode, said
        return self

    def base(self, rank: int = 0) -> dict[str, Any]:
        """What a base rank wrote at its end."""
        path = self.folder / f"base{rank}.json"
        assert path.exists(), f"base rank {rank} wrote nothing; exit code {self.code}:\n{self.said[-4000:]}"
        return dict(json.loads(path.read_text()))

    def processes(self, holding: str = "") -> list[psutil.Process]:
        """Its living processes with this word in their command line, wherever they are adopted by now."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark
                if ours and any(holding in word for word in process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def workers(self) -> set[int]:
        """Process ids of pool ranks' workers."""
        return {process.pid for process in self.processes("fapool_plugin.pool.rank")}

    def all_gone(self, within_s: float = 10.0) -> float:
        """Seconds until no process was left; fails if one is."""
        began = time.monotonic()
        until(lambda: not self.processes(), within_s, lambda: f"left: {[p.cmdline() for p in self.processes()]}")
        return time.monotonic() - began


def until(true: Callable[[], object], within_s: float, told: Callable[[], str] = lambda: "") -> None:
    """Waits for something, and fails if it does not come."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s:g} s; {told()}"
        time.sleep(0.05)


@contextmanager
def launched(folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Launched]:
    """Starts a launch. At the end no process of it may be left ten seconds after it; whatever is, is killed."""
    mark = f"{folder}.{time.monotonic_ns()}"
    known = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: mark, "DS_ACCELERATOR": "cpu"}
    known = {name: value for name, value in known.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        command, cwd=folder, env=known | dict(environment or {}), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    launch = Launched(folder, process, mark)
    try:
        yield launch
        launch.all_gone()
    finally:
        for left in launch.processes():
            left.send_signal(signal.SIGKILL)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def run(
    folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None, limit_s: float = LIMIT_S
) -> Launched:
    """A launch from beginning to end."""
    with launched(folder, command, environment) as launch:
        return launch.wait(limit_s)


@dataclass
class Setting:
    """A folder with a DeepSpeed config that has a "fa_pool" section."""

    folder: Path
    deepspeed: dict[str, Any] = field(default_factory=dict)
    fa_pool: dict[str, Any] = field(default_factory=dict)

    def write(self) -> str:
        """Writes the config; returns its path."""
        section = {"pool": "launch", "activation": "length", "threshold": 64, "memory_limit_mib": 64} | self.fa_pool
        path = self.folder / "ds.json"
        path.write_text(json.dumps({"dtype": "float32"} | self.deepspeed | {"fa_pool": section}))
        return str(path)
