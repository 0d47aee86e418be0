"""Pool ranks are struck at random, in any way and at any moment: no logit changes, nothing hangs, nothing is left."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.ranks import local
from fapool_plugin.wire.ring import RING_BYTES
from tests.models import assert_close, eager, load_pooled, random_ids, workers

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]

TIMEOUT_S, OWN_S = 1.0, 12.0
"""A machine that is busy with other tests takes a few seconds for the work alone."""


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


def killed(rank: PoolRank, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stopped(rank: PoolRank, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def paused(rank: PoolRank, pid: int) -> None:
    """Not for long enough to be lost."""
    os.kill(pid, signal.SIGSTOP)
    goes_on = threading.Timer(TIMEOUT_S / 4, os.kill, (pid, signal.SIGCONT))
    goes_on.daemon = True
    goes_on.start()


def cut(rank: PoolRank, pid: int) -> None:
    rank.link._socket.shutdown(2)


def half_cut(rank: PoolRank, pid: int) -> None:
    """The base can be heard no more, and hears."""
    rank.link._socket.shutdown(1)


def slow(rank: PoolRank, pid: int) -> None:
    """Stopped and let go, many times."""

    def stutter() -> None:
        for _ in range(10):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.05)
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)

    threading.Thread(target=stutter, daemon=True).start()


WAYS: list[Callable[[PoolRank, int], None]] = [killed, stopped, paused, cut, half_cut, slow]


@pytest.mark.parametrize("trials", [12, pytest.param(300, marks=pytest.mark.full)])
def test_ranks_that_are_struck_at_random_change_nothing(
    folder: Path, trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_ = random.Random(trials)
    want = [x.clone() for x in work(eager(folder))]
    names = ["ask", "answer"]
    real = {name: getattr(PoolRank, name) for name in names}
    struck: dict[str, Any] = {}

    def wrapped(name: str) -> Callable[..., Any]:
        def step(rank: PoolRank, *arguments: Any) -> Any:
            struck["seen"] += 1
            if struck["seen"] == struck["at"]:
                pid = struck["model"].fa_pool.leases.pool.pids().get(rank.number)
                if pid is not None:
                    struck["way"](rank, pid)
            return real[name](rank, *arguments)

        return step

    for name in names:
        monkeypatch.setattr(PoolRank, name, wrapped(name))
    before, longest = workers(), 0.0
    for trial in range(trials):
        ranks, way, at = random_.randint(1, 3), WAYS[trial % len(WAYS)], random_.randint(1, 60)
        case = f"trial {trial}: {way.__name__} at step {at} of {ranks} ranks"
        model = load_pooled(folder, pool_ranks=ranks, timeout_s=TIMEOUT_S, start_timeout_s=60.0)
        # Bodies of a small model go over the socket, unless the ring is small, too.
        monkeypatch.setattr(local, "RING_BYTES", (2**16, RING_BYTES)[trial // len(WAYS) % 2])
        struck.update(model=model, way=way, at=at, seen=0)
        with model.fa_pool, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            model.fa_pool.leases.make_pool().acquire(lambda text: None)  # starting is another test's
            began = time.monotonic()
            for number, (got, expected) in enumerate(zip(work(model), want, strict=True)):
                assert_close(got, expected, what=f"{case}: result {number}")
            took = time.monotonic() - began
        longest = max(longest, took)
        assert took < 3 * max(TIMEOUT_S, 2.0) + OWN_S, f"{case}: {took:.1f} s"
        assert workers() == before, f"{case}: ranks are left"
    print(f"longest trial: {longest:.1f} s")
