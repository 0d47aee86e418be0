"""Pool ranks are struck at random, in any way and at any step of a model's work, which has to stay exact and in time.

Knows leases, links and processes; where ranks come from is told.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.base.lease import PoolRank
from tests.models import assert_close, random_ids

TIMEOUT_S = 1.0
OWN_S = 12.0
"""A machine that is busy with other tests takes a few seconds for the work alone."""
LIMIT_S = 3 * max(TIMEOUT_S, 2.0) + OWN_S
"""Of one trial; a rank that beats and does not get on is given two seconds, whatever the timeout."""
_STEPS = 20
"""Requests and answers of one rank in ``work``, at least."""
_NONE_S = 60.0
STANDING_STILL = Path(__file__).parent / "standing_still"
"""To be in the PYTHONPATH of ranks that are to be frozen."""

Way = Callable[[PoolRank, int, ExitStack], None]
"""Strikes a rank whose process has this id; what is to be done at the end of all trials goes on the stack."""

_HOLD = """
import ctypes, os, sys
pid, trace = int(sys.argv[1]), ctypes.CDLL(None).ptrace
trace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
SEIZE, INTERRUPT = 0x4206, 0x4207
held = trace(SEIZE, pid, None, None) == 0 and trace(INTERRUPT, pid, None, None) == 0
print("held" if held else "not allowed", flush=True)
while held and not os.WIFSIGNALED(os.waitpid(pid, 0x40000000)[1]):
    pass
"""


def work(model: Any) -> Iterator[Tensor]:
    """A prompt with steps, then a step of training."""
    with torch.no_grad():
        out = model(random_ids(2, 150), use_cache=True)
        yield out.logits
        for step in range(4):
            yield model(random_ids(2, 1, seed=step), past_key_values=out.past_key_values).logits
    ids = random_ids(1, 150)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    yield from (parameter.grad for parameter in model.parameters())


def held_main_thread(pid: int, afterwards: ExitStack) -> subprocess.Popen[str] | None:
    """Holds the main thread of a process, and no other thread of it, until it is killed. Returns what holds it; None if
    this machine does not allow that."""
    command = [sys.executable, "-I", "-S", "-c", _HOLD, str(pid)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    afterwards.callback(holder.communicate)
    afterwards.callback(holder.kill)
    assert holder.stdout is not None
    return holder if holder.stdout.readline() == "held\n" else None


def threads_can_be_held() -> bool:
    """Whether a process may hold a thread of another one here."""
    with ExitStack() as afterwards:
        child = subprocess.Popen(["sleep", "60"])
        afterwards.callback(child.wait)
        afterwards.callback(child.kill)
        return held_main_thread(child.pid, afterwards) is not None


def killed(rank: PoolRank, pid: int, afterwards: ExitStack) -> None:
    os.kill(pid, signal.SIGKILL)


def stopped(rank: PoolRank, pid: int, afterwards: ExitStack) -> None:
    os.kill(pid, signal.SIGSTOP)


def held(rank: PoolRank, pid: int, afterwards: ExitStack) -> None:
    """Its main thread stands still wherever it is: while it polls for all, and then no heartbeat is answered."""
    assert held_main_thread(pid, afterwards), f"the main thread of process {pid} could not be held"


def frozen(rank: PoolRank, pid: int, afterwards: ExitStack) -> None:
    """Its main thread stands still in the middle of its next computation, and heartbeats are answered all the time."""
    os.kill(pid, signal.SIGUSR1)


def paused(rank: PoolRank, pid: int, afterwards: ExitStack) -> None:
    """Not for long enough to be lost."""
    _stutters(pid, 1, TIMEOUT_S / 4, afterwards)


def slow(rank: PoolRank, pid: int, afterwards: ExitStack) -> None:
    """Stopped and let go, many times."""
    _stutters(pid, 10, 0.05, afterwards)


def cut(rank: PoolRank, pid: int, afterwards: ExitStack) -> None:
    rank.link._socket.shutdown(2)


def half_cut(rank: PoolRank, pid: int, afterwards: ExitStack) -> None:
    """The base can be heard no more, and hears."""
    rank.link._socket.shutdown(1)


WAYS: list[Way] = [killed, frozen, stopped, held, paused, slow, cut, half_cut]


def possible_ways() -> list[Way]:
    """All that this machine allows."""
    return [way for way in WAYS if way is not held or threads_can_be_held()]


def strike_at_random(model: Any, want: Sequence[Tensor], ways: Sequence[Way], random_: random.Random) -> float:
    """Works once for each of these ways, in any order, and strikes one rank at any step. Results are those that are
    wanted, and no trial takes longer than LIMIT_S. Returns what the longest took, in seconds."""
    longest, pool = 0.0, model.fa_pool.leases.make_pool()
    with ExitStack() as afterwards:
        for way in random_.sample(ways, len(ways)):
            ranks = _ranks_of(pool)
            at = random_.randint(1, _STEPS * ranks)
            case = f"{way.__name__} at step {at} of {ranks} ranks"
            with _struck(way, at, pool, afterwards) as struck, warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                began = time.monotonic()
                for number, (got, expected) in enumerate(zip(work(model), want, strict=True)):
                    assert_close(got, expected, what=f"{case}: result {number}")
                took = time.monotonic() - began
            assert struck, f"{case}: there were not so many steps"
            assert took < LIMIT_S, f"{case}: {took:.1f} s"
            longest = max(longest, took)
    return longest


@contextmanager
def _struck(way: Way, at: int, pool: Any, afterwards: ExitStack) -> Iterator[list[PoolRank]]:
    """Inside, that rank is struck which is asked, or whose answer is waited for, as the ``at``-th."""
    seen, struck = 0, list[PoolRank]()

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(rank: PoolRank, *arguments: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at:
                struck.append(rank)
                way(rank, _pid_of(pool, rank.number), afterwards)
            return real(rank, *arguments)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in ("ask", "answer"):
            patch.setattr(PoolRank, name, wrapped(getattr(PoolRank, name)))
        yield struck


def _ranks_of(pool: Any) -> int:
    """How many ranks are there; waits for the first. Those of a launch that were lost may come back at any moment."""
    deadline = time.monotonic() + _NONE_S
    while True:
        try:
            return len(pool.acquire(lambda text: None))
        except RuntimeError:
            assert time.monotonic() < deadline, f"no rank within {_NONE_S:g} s"
            time.sleep(0.1)


def _pid_of(pool: Any, number: int) -> int:
    return int(pool.pids()[number] if hasattr(pool, "pids") else pool._ranks[number].pid)


def _stutters(pid: int, times: int, stop_s: float, afterwards: ExitStack) -> None:
    def stutter() -> None:
        with suppress(ProcessLookupError):
            for _ in range(times):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(stop_s)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.02)

    thread = threading.Thread(target=stutter, daemon=True)
    afterwards.callback(thread.join)
    thread.start()
