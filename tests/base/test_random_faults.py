"""Local pool ranks are struck at random, in any way and at any moment: no logit changes, nothing hangs, nothing is
left."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fapool_plugin.ranks import linked
from fapool_plugin.wire.ring import RING_BYTES
from tests.models import eager, load_pooled, workers
from tests.strikes import STANDING_STILL, TIMEOUT_S, Way, frozen, possible_ways, strike_at_random, work

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left there is ours. Ranks can be frozen."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(STANDING_STILL), prepend=os.pathsep)


def strike_models(folder: Path, models: int, ways: Sequence[Way], patch: pytest.MonkeyPatch) -> list[str]:
    """So many models, each struck once in every way. Returns why ranks were lost."""
    random_, longest, lost = random.Random(models), 0.0, list[str]()
    want = [x.clone() for x in work(eager(folder))]
    before, open_before, files_before = workers(), _descriptors(), os.listdir(tempfile.gettempdir())
    for number in range(models):
        settings: dict[str, Any] = {
            "pool_ranks": random_.randint(1, 3), "blocks": random_.choice([1, 3]),
            "kv_home": ["base", "pool"][number % 2], "timeout_s": TIMEOUT_S, "start_timeout_s": 60.0,
        }  # fmt: skip
        # Bodies of a small model go over the socket, unless the ring is small, too.
        patch.setattr(linked, "RING_BYTES", (2**16, RING_BYTES)[number // 2 % 2])
        with (model := load_pooled(folder, **settings)).fa_pool:
            took = strike_at_random(model, want, ways, random_)
            stats = model.fa_pool.stats()
        print(f"{settings}: longest trial {took:.1f} s, {stats['faults']} faults, {stats['stale']} stale")
        longest = max(longest, took)
        lost += [event["reason"] for event in stats["events"] if event["kind"] == "fault"]
        assert stats["faults"] > 0, stats["events"]
        assert workers() == before, f"{settings}: ranks are left"
        assert _descriptors() <= open_before, f"{settings}: descriptors are left"
    assert sorted(os.listdir(tempfile.gettempdir())) == sorted(files_before)
    print(f"{models * len(ways)} trials, the longest {longest:.1f} s")
    return lost


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("models", [2, pytest.param(43, marks=pytest.mark.full)])
def test_ranks_that_are_struck_at_random_change_nothing(
    folder: Path, models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    strike_models(folder, models, possible_ways(), monkeypatch)


@pytest.mark.full
def test_ranks_whose_main_thread_stands_still(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = strike_models(folder, 12, [frozen] * 5, monkeypatch)
    assert sum("it does not get on" in reason for reason in lost) >= 40, lost
