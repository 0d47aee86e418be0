"""The contenders of a benchmark: processes that load, stand idle, and take their turn when they are told.

Each has its own number of threads, set before its libraries start. A line of JSON goes to its stdin, one comes back.
Knows neither what is computed in a turn nor what becomes of the numbers.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import psutil
    from torch import Tensor

    Turn = tuple[float, Tensor | None, dict[str, Any]]
    """Seconds, what was computed (None: another rank has it), and whatever else is worth knowing."""

LIMIT_S = 1800.0
"""Seconds that a start or a turn may take before its processes are given up."""
_GRACE_S = 10.0
_VALUES = 64


class ContenderError(RuntimeError):
    """A contender cannot start, or broke down in its turn."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    ``make`` names a function, by its full name, that is called in the contender's process with ``options`` and
    returns its turn: a function without arguments.
    """

    label: str
    make: str
    options: dict[str, Any]
    threads: int = 1
    """CPU threads of each of its processes."""
    processes: int = 1
    pool_threads: int = 0
    """Threads of the pool ranks that it starts by itself, all together."""
    idle_threads: int = 0
    """How many of its threads only wait."""
    claims: str | None = None
    """"pooled" or "local": what its forwards have to be."""
    starts_anew: bool = False
    """Starts for each of its turns and ends after it, so that its memory never stands beside another's."""
    is_peer: bool = False
    """Another system: shown with its reason if it cannot do the work, where one of ours is an error."""

    @property
    def all_threads(self) -> int:
        """CPU threads of everything it runs."""
        return self.threads * self.processes + self.pool_threads

    @property
    def working_threads(self) -> int:
        """Those that can make it faster."""
        return self.all_threads - self.idle_threads


@dataclass
class Team:
    """The processes of one contender, or of several that share them and take turns inside.

    A context manager: at its end every process has ended, by a word if it is idle, else by force.
    """

    contenders: list[Contender]
    folder: Path
    """For what the processes leave behind: their stderr, and the file where they meet."""
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _answers: queue.Queue[tuple[int, bytes]] = field(default_factory=queue.Queue)
    _is_idle: bool = True

    @property
    def label(self) -> str:
        return " / ".join(contender.label for contender in self.contenders)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the processes and waits until they are ready; after close(), once more. Raises ContenderError."""
        self.folder.mkdir(exist_ok=True)
        meet = self.folder / "meet"
        meet.unlink(missing_ok=True)
        # The ends of earlier processes' output stand in the old one.
        self._answers = queue.Queue()
        first = self.contenders[0]
        for rank in range(first.processes):
            with (self.folder / f"stderr{rank}").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "fapool_plugin.tools.bench.contenders"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=os.environ | _environment(first, rank),
                    # An interrupt is the benchmark's to handle: it ends them all.
                    start_new_session=True,
                )
            self._processes.append(process)
            threading.Thread(target=self._read, args=(rank, process, self._answers), daemon=True).start()
        makes = [{"label": c.label, "make": c.make, "options": c.options} for c in self.contenders]
        told = {"contenders": makes, "threads": first.threads, "ranks": first.processes, "meet": str(meet)}
        self._ask([told | {"rank": rank} for rank in range(first.processes)])

    def turn(self, contender: Contender) -> dict[str, Any]:
        """One turn: "seconds" of the slowest process, "checksum" and "facts", among them "peak_bytes": the most
        memory that each of its processes, pool ranks too, has had so far, added up. Raises ContenderError."""
        answers = self._ask([{"run": contender.label}] * len(self._processes))
        return {
            "seconds": max(answer["seconds"] for answer in answers),
            "checksum": next(answer["checksum"] for answer in answers if answer["checksum"]),
            "facts": answers[0]["facts"] | {"peak_bytes": sum(answer["peak_bytes"] for answer in answers)},
        }

    def close(self) -> None:
        """Ends the processes; harmless when repeated."""
        for process in self._processes:
            assert process.stdin is not None
            if not self._is_idle:
                process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []

    @staticmethod
    def _read(rank: int, process: subprocess.Popen[bytes], answers: queue.Queue[tuple[int, bytes]]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                answers.put((rank, line))
        answers.put((rank, b""))

    def _ask(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Tells each process its message, waits for all answers."""
        self._is_idle = False
        for process, message in zip(self._processes, messages, strict=True):
            assert process.stdin is not None
            # A broken pipe is noticed at the end of its output, too, and there its last words are known.
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(message).encode() + b"\n")
                process.stdin.flush()
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + LIMIT_S
        while len(answers) < len(messages):
            try:
                rank, line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise ContenderError(f"no answer within {LIMIT_S:g} s") from None
            if not line:
                raise ContenderError(self._last_words(rank))
            answers[rank] = json.loads(line)
            if "error" in answers[rank]:
                raise ContenderError(answers[rank]["error"])
        self._is_idle = True
        return [answers[rank] for rank in sorted(answers)]

    def _last_words(self, rank: int) -> str:
        code = self._processes[rank].wait(_GRACE_S)
        said = _error_in((self.folder / f"stderr{rank}").read_text(errors="replace"))
        # Nothing else ends a contender so.
        why = "killed, perhaps for want of memory: give less work, or free some; its last words: " if code == -9 else ""
        return f"its process ended with exit code {code}: {why}{said or 'none'}"


def _error_in(text: str) -> str:
    """Where an error begins in what a process said: after its traceback; else the last line."""
    _, traceback, after = text.rpartition("Traceback (most recent call last):")
    lines = after.strip("\n").splitlines()
    begins = (line for line in lines if line and not line.startswith(" ")) if traceback else reversed(lines)
    return next(begins, "")


def _environment(contender: Contender, rank: int) -> dict[str, str]:
    """What must be known before a process's libraries start."""
    here = str(Path(__file__).resolve().parents[3])
    paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    known = {"OMP_NUM_THREADS": str(contender.threads), "PYTHONPATH": paths}
    if contender.processes > 1:
        ranks = str(contender.processes)
        known |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        # LOCAL_SIZE is DeepSpeed's own; the master is never asked, for the processes meet in a file.
        known |= {"LOCAL_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        known |= {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    return known


def _maker(name: str) -> Callable[..., Callable[[], Turn]]:
    """The function of this name. Frameworks are imported by the contenders that need them, and by no other."""
    home, _, function = name.rpartition(".")
    return getattr(importlib.import_module(home), function)


def checksum(computed_BV: Tensor) -> dict[str, Any]:
    """What is compared of a tensor: where its largest value is and by how much it leads, and a few values spread
    over the whole."""
    flat = computed_BV.detach().float().flatten()
    first, second = flat.topk(2).values.tolist()
    at = [index * (len(flat) - 1) // (_VALUES - 1) for index in range(_VALUES)]
    return {"argmax": int(flat.argmax()), "margin": first - second, "values": [first, *flat[at].tolist()]}


def _peak_bytes() -> int:
    """The most memory that this process and each of its children have had, added up."""
    import psutil

    me = psutil.Process()
    return sum(_peak_of(process) for process in [me, *me.children(recursive=True)])


def _peak_of(process: psutil.Process) -> int:
    """0 for one that has just ended; where the system keeps no peaks, what it has now."""
    import psutil

    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _serve(lines: Iterator[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """A contender's process: its first line says what it is, every further one asks for a turn."""
    import torch

    told = json.loads(next(lines))
    torch.set_num_threads(told["threads"])
    if told["ranks"] > 1:
        from torch import distributed as dist

        store = dist.FileStore(told["meet"], told["ranks"])
        dist.init_process_group("gloo", store=store, rank=told["rank"], world_size=told["ranks"])
    turns = {c["label"]: _maker(c["make"])(**c["options"]) for c in told["contenders"]}
    answer({"ready": True})
    for line in lines:
        seconds, computed, facts = turns[json.loads(line)["run"]]()
        found = None if computed is None else checksum(computed)
        answer({"seconds": seconds, "checksum": found, "facts": facts, "peak_bytes": _peak_bytes()})


def _lines() -> Iterator[str]:
    """The lines of stdin. When they end, so does this process: soon, even if it is in the middle of a turn."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(line)
        waiting.put("")
        time.sleep(_GRACE_S / 2)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return iter(waiting.get, "")


def main() -> None:
    """The processes' entry."""
    # Libraries print to stdout as they like; answers have it for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        _serve(_lines(), answer)
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
        raise


if __name__ == "__main__":
    main()
