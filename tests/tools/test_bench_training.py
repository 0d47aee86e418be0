"""The benchmark of training at toy size: one model in memory at a time, attention timed both ways, rows of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fapool_plugin.integrations.huggingface import bench as huggingface_bench
from fapool_plugin.tools.bench.contenders import Team
from tests.benches import LIMIT_S, complete, run
from tests.models import save_model, save_tokenizer


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_training(monkeypatch, tmp_path, none_left) -> None:
    """Contenders start when it is their turn, and never beside another."""
    original, started = Team.start, []

    def start(team: Team) -> None:
        running = [" ".join(child.cmdline()) for child in psutil.Process().children()]
        assert not [words for words in running if "fapool_plugin.tools.bench.contenders" in words], running
        started.append(team.label)
        original(team)

    monkeypatch.setattr(Team, "start", start)
    file = tmp_path / "training.json"
    words = ["--model", "random", "--tokens", "300", "--batch", "2", "--threshold", "64", "--runs", "1"]
    done = run("training", *words, "--json", str(file))
    assert done.exit_code == 0, done.output
    found = complete(file, 1)
    assert list(found) == ["sdpa, 1 thread", "sdpa, 2 threads", "fapool, 1 + 1"]
    assert started == list(found)
    layers, parts = 4, 2
    for facts in found["fapool, 1 + 1"]["facts"]:
        assert (facts["pooled_calls"], facts["local_calls"], facts["faults"]) == (2 * layers * parts, 0, 0)
    baseline = found["sdpa, 1 thread"]
    for seconds, facts in zip(baseline["seconds"]["turns"], baseline["facts"], strict=True):
        assert 0 < facts["attention_s"] < seconds
    assert 1 < found["fapool, 1 + 1"]["ceiling"] <= 2
    # Of a model with 8.4 million parameters in fp32, and their gradients, at least.
    assert all(contender["peak_bytes"] > 2 * 4 * 8.4e6 for contender in found.values()), found
    assert "peak GB" in done.output


def test_attention_of_a_step_is_timed_both_ways(monkeypatch, tmp_path) -> None:
    """By a clock that only attention, and its backward, moves on."""
    clock, original = [0.0], torch.nn.functional.scaled_dot_product_attention

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            clock[0] += 1.0
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            clock[0] += 10.0
            return gradient

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        return Slow.apply(original(*args, **kwargs))

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", slow)
    monkeypatch.setattr(huggingface_bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(huggingface_bench, "AttentionMaskInterface", SimpleNamespace(register=lambda *_: None))
    entries = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    try:
        folder = huggingface_bench.random_model(tmp_path)
        turn = huggingface_bench.plain_training(str(folder), list(range(64)), 2, 0, time_attention=True)
        seconds, _, facts = turn()
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._global_mapping.update(entries)
    assert (seconds, facts["attention_s"]) == (44.0, 44.0), "four layers"


def test_rows_of_a_batch_are_pieces_of_the_text(monkeypatch, tmp_path) -> None:
    """Each as long as asked for, and only one of them has to fit the model's positions."""
    folder = save_tokenizer(save_model("llama", tmp_path, max_position_embeddings=256))
    ids = huggingface_bench.prompt(folder, 200, 3, is_random=False)
    assert len(ids) == 600
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_bench, "demo_prompt", lambda: "w1 " * 250 + "w2 " * 250 + "w3 " * 250)
        ids = huggingface_bench.prompt(folder, 200, 3, is_random=False)
    assert ids == [1] * 200 + [2] * 200 + [3] * 200, "each row has a piece of its own"
    with pytest.raises(ValueError, match="300 prompt tokens"):
        huggingface_bench.prompt(folder, 300, 3, is_random=False)
    with pytest.raises(ValueError, match=r"for each of 100000 row\(s\)"):
        huggingface_bench.prompt(folder, 200, 100000, is_random=False)
