"""Megatron's static inference with keys on the pool over two tensor-parallel ranks: the first one loses owners, both
compute once more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

pytest.importorskip("megatron.core")

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection

from fapool_plugin.base.admission import PoolMemoryError
from tests import megatron_models as mm
from tests.base_ranks import BaseRanks, base_ranks
from tests.kv_home import ON_THE_POOL, kill
from tests.models import assert_close, assert_same_tokens, eager, greedily, logits_too, random_ids

pytestmark = pytest.mark.processes

LONG, NEW = 40, 5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseRanks]:
    with base_ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def answers(
    group: ProcessGroup, folder: Path, ids: Tensor, lose_at: int, lost: int, room: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Greedy tokens by a base rank; pool ranks of the first one are killed in mid-layer, in the ``lose_at``-th
    forward."""
    me = distributed.new_group([distributed.get_rank()], use_local_synchronization=True)
    groups = ProcessGroupCollection(tp=group, cp=me, pp=me, embd=None)
    model = mm.build(folder, groups, pool_ranks=2, **ON_THE_POOL | {"timeout_s": 5.0} | settings)
    calls = 0

    def lose(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == lose_at and group.rank() == 0:
            kill(lost)

    hook = model.decoder.layers[0].mlp.register_forward_hook(lose)
    context, tokens, logits = StaticInferenceContext(len(ids), room), ids, []
    with model.fa_pool as pool, torch.no_grad():
        try:
            for _ in range(NEW):
                logits += mm.steps(model, context, [tokens[:, context.sequence_len_offset :]])
                tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], 1)
        except PoolMemoryError as error:
            return {"refused": str(error)}
        stats = pool.stats()
    hook.remove()
    return {
        "tokens": tokens,
        "logits": torch.stack(logits, 1),
        "faults": stats["faults"],
        "replays": stats["replays"],
        "held": stats["kv_bytes"]["base"] + sum(stats["kv_bytes"]["ranks"].values()),
        "stored": len(context.key_value_memory_dict),
    }


@pytest.mark.parametrize(
    ("lose_at", "lost"), [(4, 1), *(pytest.param(*each, marks=pytest.mark.full) for each in ((0, 0), (1, 1), (4, 2)))]
)
def test_both_ranks_compute_lost_keys_once_more(ranks: BaseRanks, folder: Path, lose_at: int, lost: int) -> None:
    ids = random_ids(2, LONG)
    expected = eager(folder).generate(ids, **greedily(NEW, torch.ones_like(ids)), **logits_too())
    parts = ranks.run(2, answers, folder, ids, lose_at, lost, 64, {})
    for part in parts:
        assert_close(part["logits"], torch.stack(expected.logits, 1), tolerance=mm.TOLERANCE)
        assert_same_tokens(part["tokens"], expected.sequences)
        # In the prompt nothing is there yet that could be replayed.
        assert part["replays"] == (lose_at > 1)
        # Half of the KV heads, of all that was computed; none of it in Megatron's storage.
        if lost < 2:
            assert part["held"] == 2 * (LONG + NEW - 1) * mm.LAYERS * 2 * mm.KV_HEADS // 2 * mm.DIM * 4
        assert part["stored"] == 0
    assert [part["faults"] for part in parts] == [lost, 0]


@pytest.mark.full
def test_what_does_not_fit_is_refused_by_both(ranks: BaseRanks, folder: Path) -> None:
    little = {"memory_limit_mib": 1, "base_share": 0.0}
    for part in ranks.run(2, answers, folder, random_ids(4, LONG), 0, 0, 20000, little):
        assert "4 sequences of up to 20000 tokens need" in part["refused"]
