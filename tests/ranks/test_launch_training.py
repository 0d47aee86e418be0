"""Ordinary training scripts under real launchers: the losses of the same script without the plugin, and long
evaluations on the pool."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.launches import (
    BIN,
    SCRIPTS,
    Launched,
    Setting,
    accelerate,
    by_runner,
    deepspeed,
    free_port,
    launched,
    run,
    torchrun,
)
from tests.models import save_model

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]
pytest.importorskip("deepspeed")
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


def settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
    }


def without_the_plugin(folder: Path, place: Path, stage: int, *more: str) -> dict[str, Any]:
    """The same script on two ranks, with the section switched off."""
    place.mkdir()
    config = Setting(place, settings(stage), {"enabled": False})
    command = [*deepspeed(2), *by_runner("train.py"), "--deepspeed_config", write(config)]
    done = run(place, [*command, "--model", str(folder), "--out", str(place), *more])
    assert done.code == 0, done.said[-4000:]
    assert done.base()["stats"] is None
    return done.base()


def write(setting: Setting) -> str:
    """DeepSpeed's training config has no dtype."""
    path = Path(setting.write())
    content = json.loads(path.read_text())
    del content["dtype"]
    path.write_text(json.dumps(content))
    return str(path)


def alike(told: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of losses, relative to those without the plugin."""
    numbers = zip([*told["losses"], told["evaluated"]], [*expected["losses"], expected["evaluated"]], strict=True)
    worst = max(abs(one - other) / abs(other) for one, other in numbers)
    assert worst < 1e-5, f"losses differ by {worst:.3g}: {told['losses']}, {expected['losses']}"
    assert expected["losses"][0] != expected["losses"][-1], "nothing was trained"
    return worst


def everything_was_pooled(stats: dict[str, Any], steps: int, *, blocks: int = 3) -> None:
    """Steps of training, forward and backward, on a row of 200 tokens in blocks of 64 at least; a long evaluation."""
    assert stats["training"]["pooled_calls"] == steps * LAYERS * blocks, stats
    assert stats["backward"]["pooled_calls"] == steps * LAYERS * blocks, stats
    assert stats["prefill"]["pooled_forwards"] == 1, stats
    assert (stats["local_reasons"], stats["faults"]) == ({}, 0), stats


# The first stage is trained by two nodes, too.
@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 1, 2)), 3])
def test_zero(folder: Path, tmp_path: Path, stage: int) -> None:
    monitored = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"}}
    config = write(Setting(tmp_path, settings(stage) | monitored))
    command = [*deepspeed(3), *by_runner("train.py"), "--deepspeed_config", config]
    done = run(tmp_path, [*command, "--model", str(folder), "--out", str(tmp_path)])
    assert done.code == 0, done.said[-4000:]
    alike(done.base(), without_the_plugin(folder, tmp_path / "plain", stage))
    for rank in range(2):
        told = done.base(rank)
        number = str(rank)
        assert told["world"] == {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
        everything_was_pooled(told["stats"], 3, blocks=1 if stage == 3 else 3)
        not_overlapped = list(told["stats"]["not_overlapped_reasons"])
        assert not_overlapped == (["its weights are partitioned (ZeRO-3)"] if stage == 3 else []), not_overlapped
    files = sorted(path.name for path in (tmp_path / "csv").rglob("FAPool*training*pooled*calls*.csv"))
    assert files, sorted(path.name for path in (tmp_path / "csv").rglob("*"))
    rows = list(csv.reader((tmp_path / "csv" / "job" / files[0]).open()))
    assert len(rows) == 1 + 3, rows


MATRIX = [(stage, checkpointed, 2048) for stage in (1, 2, 3) for checkpointed in (False, True)]


@pytest.mark.parametrize(
    ("stage", "checkpointed", "tokens"),
    [(3, True, 1000), *(pytest.param(*case, marks=pytest.mark.full) for case in MATRIX)],
)
def test_twenty_steps_and_two_losses_of_a_rank(
    folder: Path, tmp_path: Path, stage: int, checkpointed: bool, tokens: int
) -> None:
    """A pool rank dies in the middle of forward at one step, and of backward at another: the losses stay."""
    config = write(Setting(tmp_path, settings(stage)))
    command = [*deepspeed(3), *by_runner("train.py"), "--deepspeed_config", config, "--model", str(folder)]
    more = ["--steps", "20", "--length", str(tokens), *(["--checkpointing"] if checkpointed else [])]
    # A worker takes some seconds to come back.
    kills = ["--kill-forward", "7", "--kill-backward", "13", "--pause", "0.8"]
    done = run(tmp_path, [*command, "--out", str(tmp_path), *more, *kills])
    assert done.code == 0, done.said[-4000:]
    worst = alike(done.base(), without_the_plugin(folder, tmp_path / "plain", stage, *more))
    print(f"largest relative difference of losses: {worst:.3g}")
    for rank in range(2):
        stats = done.base(rank)["stats"]
        assert stats["backward"]["pooled_calls"] > 10 * LAYERS, stats
        assert sum(event["kind"] == "fault" for event in stats["events"]) >= 2, stats["events"]
    assert done.said.count("ended with exit code -9") == 2, done.said[-4000:]


@pytest.mark.full
def test_two_nodes_with_the_pool_on_the_second(folder: Path, tmp_path: Path) -> None:
    by_nodes(folder, tmp_path, {"one": 2, "two": 1}, {}, local_ranks=["0", "1"], local_size="2")


@pytest.mark.full
def test_two_nodes_with_pool_ranks_on_each(folder: Path, tmp_path: Path) -> None:
    section = {"pool_placement": "per_node", "pool_ranks": 2}
    by_nodes(folder, tmp_path, {"one": 2, "two": 2}, section, local_ranks=["0", "0"], local_size="1")


def by_nodes(
    folder: Path,
    place: Path,
    slots: dict[str, int],
    section: dict[str, Any],
    *,
    local_ranks: list[str],
    local_size: str,
) -> None:
    """Two launchers without ssh, as two nodes start them; both are this machine."""
    hostfile = place / "hostfile"
    hostfile.write_text("".join(f"{node} slots={count}\n" for node, count in slots.items()))
    config, port = write(Setting(place, settings(1), section)), free_port()

    def node(rank: int) -> list[str]:
        launcher = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(rank)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        script = [*by_runner("train.py"), "--deepspeed_config", config, "--model", str(folder), "--out", str(place)]
        return [*launcher, *script]

    with launched(place, node(0)) as first, launched(place, node(1)) as second:
        ended: list[Launched] = [first.wait(), second.wait()]
    for one in ended:
        assert one.code == 0, one.said[-4000:]
    expected = without_the_plugin(folder, place / "plain", 1)
    alike(ended[0].base(0), expected)
    for rank, local_rank in enumerate(local_ranks):
        world, number = ended[0].base(rank)["world"], str(rank)
        assert world == {"RANK": number, "WORLD_SIZE": "2", "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
        everything_was_pooled(ended[0].base(rank)["stats"], 3)


@pytest.mark.full
def test_accelerate_with_deepspeed(folder: Path, tmp_path: Path) -> None:
    # The optimizer is the script's own.
    training = {key: value for key, value in settings(1).items() if key != "optimizer"}
    config = write(Setting(tmp_path, training | {"gradient_accumulation_steps": 1}))
    options = ["--use_deepspeed", "--deepspeed_config_file", config, "--num_processes", "3"]
    given = ["--model", str(folder), "--out", str(tmp_path)]
    done = run(tmp_path, [*accelerate(*options), *by_runner("accelerated.py"), *given])
    assert done.code == 0, done.said[-4000:]
    assert done.base()["processes"] == 2
    for rank in range(2):
        everything_was_pooled(done.base(rank)["stats"], 4)


def test_accelerate_without_deepspeed(folder: Path, tmp_path: Path) -> None:
    section = {"pool": "launch", "activation": "length", "threshold": 64, "memory_limit_mib": 64}
    config = tmp_path / "pool.json"
    config.write_text(json.dumps(section))
    given = ["--model", str(folder), "--out", str(tmp_path), "--fa_pool", str(config)]
    done = run(tmp_path, [*torchrun(3), str(SCRIPTS / "accelerated.py"), *given])
    assert done.code == 0, done.said[-4000:]
    assert done.base()["processes"] == 2
    for rank in range(2):
        everything_was_pooled(done.base(rank)["stats"], 4)
