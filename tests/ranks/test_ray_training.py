"""ZeRO training under DeepSpeed's launcher on a standing pool that changes meanwhile: the losses of the same script
without the plugin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fapool_plugin.ranks import directory
from tests.conftest import child_processes
from tests.launches import Setting, by_runner, deepspeed, launched, until
from tests.models import save_model
from tests.ranks.test_launch_training import LAYERS, alike, settings, without_the_plugin, write
from tests.ray_pools import end, grow, said

ray = pytest.importorskip("ray")
pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.processes, pytest.mark.full, pytest.mark.timeout(600)]
POOL, STEPS, JOINS_AT = "trained", 20, 5


@pytest.fixture
def pool() -> Iterator[str]:
    """One rank on a Ray cluster of this machine; the cluster's address."""
    before = set(child_processes())
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    grow(ray, POOL, range(1))
    yield ray.get_runtime_context().gcs_address
    end(ray, POOL)
    ray.shutdown()
    until(lambda: set(child_processes()) <= before, 20, lambda: "the cluster's processes end")


def test_a_rank_joins_and_another_leaves(tmp_path: Path, pool: str) -> None:
    folder = save_model("llama", tmp_path / "model", max_position_embeddings=2048)
    section = {"pool": "ray", "pool_name": POOL, "pool_ranks": 8, "ray_address": pool}
    config, more = write(Setting(tmp_path, settings(2), section)), ("--steps", str(STEPS), "--length", "600")
    command = [*deepspeed(2), *by_runner("train.py"), "--deepspeed_config", config, "--model", str(folder)]
    held = ("--hold", str(JOINS_AT), "--pause", "0.5")
    with launched(tmp_path, [*command, "--out", str(tmp_path), *more, *held]) as launch:

        def steps() -> int:
            assert launch.process.poll() is None, launch.wait().said[-4000:]
            there = tmp_path / "steps0"
            return int(there.read_text() or 0) if there.exists() else 0

        until(lambda: steps() >= JOINS_AT, 120, lambda: f"{steps()} steps")
        grow(ray, POOL, range(1, 2))
        (tmp_path / "go").touch()
        until(lambda: steps() >= JOINS_AT + 4, 60, lambda: f"{steps()} steps")
        leaves_at = steps()
        ray.get(directory.standing(ray, POOL)[0].leave.remote(30.0), timeout=40)
        left_at = steps()
        assert left_at < STEPS - 2, f"told to leave at {leaves_at}, left at {left_at}: too late to see anything"
        launch.wait()
        assert launch.code == 0, launch.said[-4000:]
    until(lambda: said(ray, POOL)[1]["state"] == "free", 10, lambda: "the lease is given back")
    worst = alike(launch.base(), without_the_plugin(folder, tmp_path / "plain", 2, *more))
    print(f"left at step {left_at}; largest relative difference of losses: {worst:.3g}")
    for rank in range(2):
        stats: dict[str, Any] = launch.base(rank)["stats"]
        assert (stats["local_reasons"], stats["faults"]) == ({}, 0), stats
        assert stats["backward"]["pooled_calls"] >= STEPS * LAYERS, stats
        calls = {one["rank"]: one["calls"] for one in stats["ranks"]}
        assert calls.keys() == {0, 1}, calls
        assert all(calls.values()), f"both have worked: {calls}"
        leases = [event["reason"].split()[0] for event in stats["events"] if event["kind"] == "active"]
        assert {"1", "2"} == set(leases), leases
