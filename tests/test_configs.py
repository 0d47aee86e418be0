"""Every configuration that is shipped: loaded, and started scaled down to this machine; the paper's planned in full."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fapool_plugin.config import FAPoolConfig, section_of
from fapool_plugin.plan.shares import Geometry, make_plan, speeds
from fapool_plugin.ranks.placement import place
from tests.launches import ROOT, by_runner, deepspeed, run
from tests.models import save_model

CONFIGS = sorted((ROOT / "configs").glob("*.json"))
TRAINING = [path for path in CONFIGS if path.name.startswith("ds_train")]
PAPER = ROOT / "configs" / "paper_8base_32pool.json"


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def small(path: Path, place_: Path, **changes: Any) -> str:
    """The configuration with a threshold and memory for tiny models."""
    config = read(path)
    config["fa_pool"] |= {"threshold": 64, "memory_limit_mib": 64, "activation": "length"}
    config |= changes
    copy = place_ / "config.json"
    copy.write_text(json.dumps(config))
    return str(copy)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_loads(path: Path) -> None:
    config = section_of(path)
    assert config is not None
    assert config == FAPoolConfig.load(path)
    assert config.enabled


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.name.startswith("ds_")], ids=lambda path: path.name)
def test_deepspeed_takes_the_rest(path: Path) -> None:
    deepspeed_config = pytest.importorskip("deepspeed.inference.config")
    rest = {key: value for key, value in read(path).items() if key != "fa_pool"}
    if path in TRAINING:
        runtime = pytest.importorskip("deepspeed.runtime.config")
        assert runtime.DeepSpeedConfig(rest | {"train_batch_size": 1}).zero_config.stage == int(path.name[13])
    else:
        assert deepspeed_config.DeepSpeedInferenceConfig(**rest).tensor_parallel.tp_size == 2


@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "path",
    # What a stage does is tested elsewhere.
    [pytest.param(path, marks=[] if "zero1" in path.name else pytest.mark.full, id=path.name) for path in TRAINING],
)
def test_training_configurations_start(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    folder = save_model("llama", tmp_path / "model", max_position_embeddings=512)
    given = ["--deepspeed_config", small(path, tmp_path), "--model", str(folder), "--out", str(tmp_path)]
    done = run(tmp_path, [*deepspeed(2), *by_runner("train.py"), *given, "--steps", "1", "--length", "100"])
    assert done.code == 0, done.said[-4000:]
    assert done.base()["stats"]["prefill"]["pooled_forwards"] == 1


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.timeout(240)
def test_the_inference_configuration_starts(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("megatron.core")
    folder = save_model("llama", tmp_path / "model", max_position_embeddings=512)
    config = small(ROOT / "configs" / "ds_inference_fapool.json", tmp_path)
    given = ["--deepspeed_config", config, "--model", str(folder), "--lengths", "100", "--out", str(tmp_path)]
    done = run(tmp_path, [*deepspeed(3), *by_runner("infer.py"), *given])
    assert done.code == 0, done.said[-4000:]
    assert done.base()["stats"]["prefill"]["pooled_forwards"] == 1


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_the_papers_setting_scaled_down(tmp_path: Path) -> None:
    """Two base ranks and two pool ranks, as its documentation shows, with the tokens of one process."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("megatron.core")
    out = tmp_path / "small.json"
    command = [sys.executable, str(ROOT / "examples" / "scale_config.py"), str(PAPER), str(out)]
    subprocess.run([*command, "--divide", "16", "--base", "2", "--pool", "2"], check=True, timeout=60)
    config = read(out)
    config["fa_pool"]["memory_limit_mib"] = 64
    out.write_text(json.dumps(config))
    script = ["--module", "fapool_plugin.run", str(ROOT / "examples" / "generate_deepspeed.py")]
    given = ["--deepspeed_config", str(out), "--prompt-tokens", "600", "--max-new-tokens", "4"]
    done = run(tmp_path, [*deepspeed(4), *script, *given])
    assert done.code == 0, done.said[-4000:]
    layers = config["model"]["num_hidden_layers"]
    assert f"decode: {3 * layers} attention calls pooled, 0 local" in done.said, done.said[-2000:]
    (tokens,) = [line for line in done.said.splitlines() if line.startswith("tokens: ")]
    assert json.loads(tokens.removeprefix("tokens: ")) == alone(config, 600, 4)


def alone(config: dict[str, Any], length: int, new: int) -> list[int]:
    """The same model's greedy tokens in one process without the plugin."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config["model"]), dtype=torch.float32).eval()
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, length:].tolist()


@pytest.mark.parametrize("length", [4097, 131_072])
def test_the_papers_setting_planned_in_full(length: int) -> None:
    """8 base ranks of 4 heads each, every head's queries in 33 runs: b = n / p each with the base's own."""
    config, model = FAPoolConfig.load(PAPER), read(PAPER)["model"]
    hosts = [line.split() for line in (ROOT / "configs" / "hostfile").read_text().splitlines() if line[0] != "#"]
    nodes = [node for node, (_, slots) in enumerate(hosts) for _ in range(int(slots.removeprefix("slots=")))]
    placement = place(nodes, config.pool_ranks, config.pool_placement)
    assert (len(placement.base), len(placement.pool)) == (config.base.tensor_parallel_size, 32) == (8, 32)
    assert placement.base_on(0) == list(range(8)), "the base ranks share a node"
    heads = model["num_key_value_heads"] // len(placement.base)
    # A pool rank works for eight base ranks at a time.
    share = len(placement.base) / (len(placement.base) + config.pool_ranks)
    relative = speeds(config.pool_ranks, share)
    plan = make_plan(Geometry((0,), (length,), 0, length), heads, relative, mode=config.partition)
    covered = sorted((t.head_start, t.head_stop, t.q_start, t.q_stop) for t in (*sum(plan.shares, ()), *plan.base))
    for head in range(heads):
        runs = [(start, stop) for first, last, start, stop in covered if first <= head < last]
        assert runs[0][0] == 0
        assert runs[-1][1] == length
        assert all(one[1] == other[0] for one, other in pairwise(runs)), runs
    pairs = [sum(pairs_of(tile) for tile in share) for share in plan.shares]
    mean = heads * length * (length + 1) / 2 * (1 - share) / config.pool_ranks
    off = max(abs(one / mean - 1) for one in pairs)
    assert off < (0.04 if length > 100_000 else 0.6), f"a rank is off by {off:.1%} of the mean"


def pairs_of(tile: Any) -> int:
    """(query, key) pairs of a causal tile whose keys begin at 0."""
    return tile.lanes * sum(range(tile.q_start + 1, tile.q_stop + 1))
