"""A verdict on cutting a model holds for the values it was shown with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fapool_plugin.integrations.huggingface.pieces import values
from tests.blocks import in_blocks, save_long
from tests.models import assert_close, eager, random_ids

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]
LENGTH = 200


class Gated(nn.Module):
    """An MLP that looks at all positions of a row, unless its gate is closed, as parts that are to be trained begin."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.share = mlp, 1.0
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_BSX: Tensor) -> Tensor:
        mixed: Tensor = self.mlp(x_BSX - self.share * self.gate * x_BSX.mean(1, keepdim=True))
        return mixed


def gated(model: Any) -> Any:
    layer = model.model.layers[0]
    layer.mlp = Gated(layer.mlp)
    return model


def opened(mlp: Gated) -> None:
    mlp.gate.data += 1.0  # past torch's count of versions, as some optimizers write


def replaced(mlp: Gated) -> None:
    mlp.gate = nn.Parameter(torch.ones(1))


def shared(mlp: Gated) -> None:
    mlp.share = 1.0


@torch.no_grad()
@pytest.mark.parametrize("change", [opened, replaced, shared])
def test_what_a_value_hides_is_tried_again_with_another_one(tmp_path: Path, change: Callable[[Gated], None]) -> None:
    """The same classes and configuration, and another verdict: by what a gate lets through."""
    folder, ids = save_long("llama", tmp_path), random_ids(1, LENGTH)
    with in_blocks(folder, None) as model:
        nets = [gated(net) for net in (eager(folder), model)]
        if change is shared:
            for net in nets:
                opened(net.model.layers[0].mlp)
                net.model.layers[0].mlp.share = 0.0
        assert_close(model(ids).logits, nets[0](ids).logits)
        assert model.fa_pool.stats()["prefill"]["overlapped_forwards"] == 1, "it may be cut while its gate is closed"
        for net in nets:
            change(net.model.layers[0].mlp)
        assert_close(model(ids).logits, nets[0](ids).logits)
        (reason,) = model.fa_pool.stats()["not_overlapped_reasons"]
        assert "hidden states differ" in reason, reason


def test_values_without_bits_are_like_no_others() -> None:
    module = Gated(nn.Linear(2, 2))
    assert values(module) == values(module)
    module.register_buffer("sparse", torch.eye(2).to_sparse())
    assert values(module) != values(module)


@torch.no_grad()
def test_values_of_known_code_are_not_looked_at(tmp_path: Path) -> None:
    folder, ids = save_long("llama", tmp_path), random_ids(1, LENGTH)
    with in_blocks(folder, None) as model:
        for _ in range(2):
            model(ids)
            model.model.layers[0].mlp.up_proj.weight += 0.01
        assert [event["kind"] for event in model.fa_pool.stats()["events"]].count("probe") == 1
