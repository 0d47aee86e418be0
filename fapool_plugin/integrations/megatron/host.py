"""Megatron-core: what it does on a GPU only, done where the model is, so that a model runs on CPU.

Rotary embeddings, the static KV cache and gathered logits. Knows nothing of pools.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, distributed


def settle_on_cpu(model: Any) -> None:
    """Gives a GPTModel's modules classes that stay on the CPU; same weights, same results."""
    rotary = getattr(model, "rotary_pos_emb", None)
    if type(rotary) is RotaryEmbedding:
        rotary.__class__ = CPURotaryEmbedding
    if type(getattr(model, "output_layer", None)) is ColumnParallelLinear:
        model.output_layer.__class__ = CPUColumnParallelLinear


def allocate_cache(model: Any, context: Any) -> None:
    """Allocates what a static inference context keeps of every layer: left to Megatron, it would lie on a GPU."""
    for layer in model.decoder.layers:
        attention = layer.self_attention
        if attention.layer_number not in context.key_value_memory_dict:
            weight = attention.linear_qkv.weight
            shape = context.max_sequence_length, context.max_batch_size, attention.num_query_groups_per_partition
            context.key_value_memory_dict[attention.layer_number] = tuple(
                torch.empty(*shape, dim, dtype=weight.dtype, device=weight.device)
                for dim in (attention.key_hidden_size, attention.val_hidden_size)
            )


class CPURotaryEmbedding(RotaryEmbedding):
    """Megatron's moves its frequencies to the current GPU first."""

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        freqs_SD = self.get_freqs_non_repeated(max_seq_len, offset)
        if self.rotary_interleaved:
            return freqs_SD.repeat_interleave(2, dim=-1)[:, None, None, :]
        return torch.cat((freqs_SD, freqs_SD), dim=-1)[:, None, None, :]


class CPUColumnParallelLinear(ColumnParallelLinear):
    """Megatron's gathers its output into a tensor on the current GPU."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        output, bias = super().forward(input_, weight, runtime_gather_output=False)
        return (_Gathered.apply(output, self.tp_group) if gather else output), bias


class _Gathered(torch.autograd.Function):
    """The last dimension of all ranks, side by side; going back, each rank keeps its own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.rank, ctx.size = group.rank(), part.shape[-1]
        if group.size() == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
        distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.rank * ctx.size, ctx.size).contiguous(), None
