"""Base ranks that launchers start, on a standing pool: losses and tokens of the same scripts without the plugin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fapool_plugin.ranks import directory
from tests.conftest import child_processes
from tests.launches import (
    SCRIPTS,
    Launched,
    Setting,
    accelerate,
    by_runner,
    deepspeed,
    launched,
    run,
    torchrun,
    until,
)
from tests.models import save_model
from tests.ranks.test_launch_inference import EVEN, answers, arguments, only_long_prompts_were_pooled
from tests.ranks.test_launch_training import (
    LAYERS,
    alike,
    everything_was_pooled,
    settings,
    without_the_plugin,
    write,
)
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


def test_zero_while_a_rank_joins_and_another_leaves(tmp_path: Path, pool: str) -> None:
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


def test_torchrun_and_a_model_in_two_parts(tmp_path: Path, pool: str) -> None:
    """Both have the one rank at once, which no two jobs would."""
    folder = save_model("llama", tmp_path / "model", **EVEN)
    section = {"pool": "ray", "pool_name": POOL, "ray_address": pool, "base": {"tensor_parallel": "deepspeed"}}
    config = Setting(tmp_path, {"tensor_parallel": {"tp_size": 2}}, section).write()
    done = run(tmp_path, [*torchrun(2), *by_runner("infer.py"), *arguments(config, folder, tmp_path)])
    assert done.code == 0, done.said[-4000:]
    for rank in range(2):
        told = done.base(rank)
        assert told["answers"] == answers(folder), f"base rank {rank}"
        only_long_prompts_were_pooled(told["stats"])
        assert told["stats"]["faults"] == 0, told["stats"]


@pytest.mark.parametrize("by_deepspeed", [False, True])
def test_accelerate(tmp_path: Path, pool: str, by_deepspeed: bool) -> None:
    """Two models of one job, which share its rank."""
    folder = save_model("llama", tmp_path / "model", max_position_embeddings=2048)
    found = [accelerated(folder, tmp_path / name, pool, by_deepspeed, name == "pooled") for name in ("plain", "pooled")]
    alike(found[1].base(), found[0].base())
    for rank in range(2):
        assert found[0].base(rank)["stats"] is None
        told = found[1].base(rank)
        assert told["processes"] == 2
        everything_was_pooled(told["stats"], 4)


def accelerated(folder: Path, place: Path, pool: str, by_deepspeed: bool, enabled: bool) -> Launched:
    """A training script under Accelerate's launcher, on two base ranks."""
    place.mkdir()
    section = {"pool": "ray", "pool_name": POOL, "ray_address": pool, "enabled": enabled}
    training = {key: value for key, value in settings(1).items() if key != "optimizer"}  # it is the script's own
    config = write(Setting(place, training | {"gradient_accumulation_steps": 1}, section))
    given = ["--model", str(folder), "--out", str(place)]
    if by_deepspeed:
        options, script = ["--use_deepspeed", "--deepspeed_config_file", config], by_runner("accelerated.py")
    else:
        options, script = ["--multi_gpu"], [str(SCRIPTS / "accelerated.py"), "--fa_pool", config]
    done = run(place, [*accelerate(*options, "--num_processes", "2"), *script, *given])
    assert done.code == 0, done.said[-4000:]
    return done
