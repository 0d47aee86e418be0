"""One tiny Llama twice: as transformers has it, in eager attention, and as Megatron's GPTModel with pool ranks.

Knows how each is built and asked; the claims are made elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, distributed

from fapool_plugin.base.agreement import agree_over
from fapool_plugin.integrations.megatron import FAPoolGPTModel, get_fapool_layer_spec
from fapool_plugin.integrations.megatron.weights import llama_arguments, llama_config, llama_state
from tests.models import eager, save_model

THRESHOLD = 16
TOLERANCE = 1e-4
"""Of logits and gradients, relative to the largest."""
LAYERS, HEADS, KV_HEADS, DIM = 2, 8, 4, 8
LLAMA: dict[str, Any] = {
    "vocab_size": 100,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "max_position_embeddings": 512,
}
OURS: dict[str, Any] = {
    "activation": "length",
    "threshold": THRESHOLD,
    "pool_ranks": 1,
    "kv_block": 4,
    "memory_limit_mib": 64,
}


def save_llama(folder: Path, **settings: Any) -> Path:
    return save_model("llama", folder, **(LLAMA | settings))


@contextmanager
def alone() -> Iterator[ProcessGroupCollection]:
    """The groups of a job of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield groups()
    finally:
        distributed.destroy_process_group()


def groups() -> ProcessGroupCollection:
    """All ranks are tensor parallel."""
    me = distributed.group.WORLD
    if distributed.get_world_size() > 1:
        each = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
        me = each[distributed.get_rank()]
    return ProcessGroupCollection(tp=distributed.group.WORLD, cp=me, pp=me, embd=None)


def build(folder: Path, pg: Any, *, megatron: dict[str, Any] | None = None, **fa_pool: Any) -> Any:
    """This rank's part of the model, in eval mode; ``megatron`` and ``fa_pool`` change settings."""
    reference = eager(folder)
    settings = reference.config.to_dict()
    rank, size = pg.tp.rank(), pg.tp.size()
    config = llama_config(settings, tp_size=size, **(megatron or {}))
    agree = agree_over(pg.tp) if size > 1 else None
    spec = get_fapool_layer_spec(config, OURS | fa_pool, agree=agree)
    model = FAPoolGPTModel(config, spec, pg_collection=pg, **llama_arguments(settings))
    model.load_state_dict(llama_state(reference.state_dict(), config, tp_rank=rank, tp_size=size))
    return model.eval()


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def logits_of(model: Any, ids: Tensor, mask: Tensor | None = None, **others: Any) -> Tensor:
    """(B, S, V), of all tensor-parallel ranks."""
    return model(ids, positions(ids), mask, runtime_gather_output=True, **others)


def steps(model: Any, context: StaticInferenceContext, pieces: list[Tensor], masks: Any = None) -> list[Tensor]:
    """Logits (B, V) after each piece of a sequence, with Megatron's static KV cache."""
    found = []
    for index, ids in enumerate(pieces):
        mask = None if masks is None else masks[index]
        found.append(logits_of(model, ids, mask, inference_context=context)[:, -1])
        context.increment_sequence_len_offset(ids.shape[1])
        context.enable_decode_mode()
    return found


def pack(lengths: list[int], padded: list[int] | None = None) -> PackedSeqParams:
    """Documents of these lengths in one row; ``padded``: the room that each has."""

    def sums(numbers: list[int]) -> Tensor:
        return torch.tensor([0, *numbers]).cumsum(0).int()

    room = None if padded is None else sums(padded)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=sums(lengths),
        cu_seqlens_kv=sums(lengths),
        cu_seqlens_q_padded=room,
        cu_seqlens_kv_padded=room,
        max_seqlen_q=max(padded or lengths),
        max_seqlen_kv=max(padded or lengths),
    )


def causal_mask(starts: list[int], columns: int, stops: list[int] | None = None, past: int = 0) -> Tensor:
    """Megatron's mask (B, 1, S, T), True where nothing is seen, of rows padded before and after."""
    keys_T, queries_S1 = torch.arange(columns), torch.arange(past, columns)[:, None]
    rows = [
        (keys_T > queries_S1) | (keys_T < start) | (keys_T >= stop)
        for start, stop in zip(starts, stops or [columns] * len(starts), strict=True)
    ]
    return torch.stack(rows)[:, None]


def real(starts: list[int], stops: list[int]) -> Tensor:
    """(B, columns), True where rows have tokens."""
    columns = torch.arange(max(stops))
    return torch.stack([(columns >= start) & (columns < stop) for start, stop in zip(starts, stops, strict=True)])


def loss_of(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Of the next token, at every position."""
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten())
