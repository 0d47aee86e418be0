"""Pool ranks of a launch are struck at random, in any way and at any moment: no logit changes, nothing hangs, nothing
is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launches import ROOT, Setting, by_runner, run, torchrun
from tests.strikes import LIMIT_S, STANDING_STILL, TIMEOUT_S, WAYS

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("bases", "pool_ranks", "models", "ways"),
    [(1, 2, 1, 3), *(pytest.param(*layout, len(WAYS), marks=pytest.mark.full) for layout in [(1, 3, 12), (2, 2, 3)])],
)
def test_ranks_of_a_launch_that_are_struck_at_random(
    folder: Path, tmp_path: Path, bases: int, pool_ranks: int, models: int, ways: int
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    settings = {"pool_ranks": pool_ranks, "threshold": 16, "kv_block": 4, "timeout_s": TIMEOUT_S}
    given = ["--deepspeed_config", Setting(tmp_path, fa_pool=settings).write(), "--model", str(folder)]
    command = [*torchrun(bases + pool_ranks), *by_runner("struck.py"), *given, "--models", str(models)]
    command += ["--ways", str(ways)]
    known = {"TMPDIR": str(temporary), "PYTHONPATH": f"{ROOT}{os.pathsep}{STANDING_STILL}"}
    done = run(tmp_path, [*command, "--out", str(tmp_path)], known, limit_s=60.0 + 120.0 * models)
    assert done.code == 0, done.said[-4000:]
    told = [done.base(rank) for rank in range(bases)]
    print(told)
    assert told[0]["trials"] >= models * (ways - 1)
    assert told[0]["longest_s"] < LIMIT_S
    for base in told:
        assert base["pooled"] > 0
        assert base["descriptors"][-1] <= base["descriptors"][0], f"descriptors are left: {base}"
    assert sum(base["faults"] for base in told) > 0
    assert not list(temporary.glob("fapool*")), "folders are left"
