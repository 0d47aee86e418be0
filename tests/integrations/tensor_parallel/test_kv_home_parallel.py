"""Keys on the pool under tensor parallelism: one base rank loses an owner in mid-layer, and all of them go back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fapool_plugin.base.admission import PoolMemoryError
from fapool_plugin.base.agreement import agree_over
from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from fapool_plugin.integrations.tensor_parallel.parallel import load_parallel
from tests.base_ranks import BaseRanks, base_ranks
from tests.models import (
    THRESHOLD,
    assert_clear_choices,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    logits_too,
    padded_batch,
    save_model,
    workers,
)

pytest.importorskip("megatron.core")
NEW = 6


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseRanks]:
    with base_ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def answers(
    group: ProcessGroup, folder: Path, ids: Tensor, mask: Tensor, lose_at: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """generate() by a base rank. The first one's pool rank is killed when its second layer is called for the
    ``lose_at``-th time."""
    from fapool_plugin.integrations.megatron import layers as megatron_layers

    ours = {"threshold": THRESHOLD, "pool_ranks": 2, "activation": "length", "timeout_s": 3.0, "kv_home": "pool"}
    whole = load_parallel(folder, group, megatron_layers)
    model = FAPoolForCausalLM.wrap(whole, ours | settings, agree=agree_over(group), base_ranks=group.size())
    calls = 0

    def lose(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == lose_at and group.rank() == 0:
            psutil.Process(min(workers())).kill()

    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(lose)
    with model.fa_pool, torch.no_grad():
        refused = ""
        try:
            answer = model.generate(ids, **greedily(NEW, mask), **logits_too())
        except PoolMemoryError as error:
            return {"refused": str(error)}
        stats = model.fa_pool.stats()
    hook.remove()
    return {
        "tokens": answer.sequences,
        "steps": torch.stack(answer.logits, 1),
        "faults": stats["faults"],
        "replays": stats["replays"],
        "held": stats["kv_bytes"],
        "refused": refused,
    }


@pytest.mark.processes
@pytest.mark.parametrize("lose_at", [0, 1, 4])
def test_a_loss_of_one_base_rank_is_replayed_by_all(tmp_path: Path, ranks: BaseRanks, lose_at: int) -> None:
    folder, (ids, mask) = save_model("llama", tmp_path), padded_batch([60, 44])
    expected = eager(folder).generate(ids, **greedily(NEW, mask), **logits_too())
    assert_clear_choices(expected.logits)
    parts = ranks.run(2, answers, folder, ids, mask, lose_at, {})
    for part in parts:
        assert_close(part["steps"], torch.stack(expected.logits, 1), what="logits of steps")
        assert_same_tokens(part["tokens"], expected.sequences)
        # In the prompt nothing is there yet that could be replayed.
        assert part["replays"] == (lose_at > 1)
    assert [part["faults"] for part in parts] == [int(lose_at > 0), 0]
    # Two of the three KV heads are the first base rank's.
    first, second = (part["held"]["base"] + sum(part["held"]["ranks"].values()) for part in parts)
    assert first == 2 * second


@pytest.mark.processes
def test_what_does_not_fit_is_refused_by_all(tmp_path: Path, ranks: BaseRanks) -> None:
    """The second base rank's keys would fit; the first one's, which has two heads, do not."""
    folder, (ids, mask) = save_model("llama", tmp_path, max_position_embeddings=4096), padded_batch([2000] * 6)
    for part in ranks.run(2, answers, folder, ids, mask, 0, {"memory_limit_mib": 2, "base_share": 0.0}):
        assert "need" in part["refused"]
