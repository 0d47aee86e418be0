"""Megatron-core: tensor-parallel linear layers, embedding and LM head over an explicit group of base ranks.

Each takes the weights that this rank holds, cut by the caller, and answers one tensor as nn.Linear and nn.Embedding
do. Ranks need not hold equally much, except of the vocabulary. Knows no model, and never initialises model
parallelism: a process's default groups stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class ColumnParallel(ColumnParallelLinear):
    """This rank's rows of a weight: the whole input in, this rank's features out."""

    # Megatron's would put an empty "_extra_state" beside the weight into every state dict.
    get_extra_state = nn.Module.get_extra_state

    def __init__(self, weight_NI: Tensor, bias_N: Tensor | None, group: ProcessGroup) -> None:
        features, inputs = weight_NI.shape
        with torch.device("meta"):
            # Nothing is gathered, so only the local size counts: ranks may differ in it.
            super().__init__(
                inputs,
                features * group.size(),
                config=_config(weight_NI),
                init_method=_no_init,
                bias=bias_N is not None,
                tp_group=group,
            )
        _place(self, "weight", weight_NI, dim=0)
        if bias_N is not None:
            _place(self, "bias", bias_N, dim=0)

    def forward(self, input_BSI: Tensor) -> Tensor:
        """(B, S, I) to (B, S, N)."""
        output_BSN, _ = super().forward(input_BSI)
        return output_BSN


class RowParallel(RowParallelLinear):
    """This rank's columns of a weight: this rank's features in, the sum over all ranks, and the bias once, out."""

    get_extra_state = nn.Module.get_extra_state

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, group: ProcessGroup) -> None:
        outputs, features = weight_OI.shape
        with torch.device("meta"):
            super().__init__(
                features * group.size(),
                outputs,
                config=_config(weight_OI),
                init_method=_no_init,
                bias=bias_O is not None,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=group,
            )
        _place(self, "weight", weight_OI, dim=1)
        if bias_O is not None:
            _place(self, "bias", bias_O)

    def forward(self, input_BSI: Tensor) -> Tensor:
        """(B, S, I) to (B, S, O)."""
        # Megatron's sum is lost where it is not contiguous; a product is, in whatever order its input lies in memory.
        output_BSO, _ = super().forward(input_BSI)
        return output_BSO


class ParallelEmbedding(VocabParallelEmbedding):
    """This rank's rows of an embedding: all tokens in, all ranks' embeddings out.

    Args:
        weight_VI: the rows; every rank has equally many.
        scale: what the embeddings are multiplied with; None: nothing.
        padding_idx: the token whose embedding gets no gradient; None: none.
    """

    def __init__(
        self, weight_VI: Tensor, group: ProcessGroup, *, scale: Tensor | None = None, padding_idx: int | None = None
    ) -> None:
        rows, features = weight_VI.shape
        with torch.device("meta"):
            super().__init__(
                rows * group.size(), features, init_method=_no_init, config=_config(weight_VI), tp_group=group
            )
        _place(self, "weight", weight_VI, dim=0)
        self.padding_idx = padding_idx
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """(B, S) to (B, S, I)."""
        embedded_BSI = super().forward(ids_BS)
        if self.padding_idx is not None:
            is_padding_BS1 = (ids_BS == self.padding_idx)[..., None]
            embedded_BSI = torch.where(is_padding_BS1, embedded_BSI.detach(), embedded_BSI)
        return embedded_BSI if self.embed_scale is None else embedded_BSI * self.embed_scale.to(self.weight.dtype)


class ParallelHead(ColumnParallel):
    """This rank's rows of an LM head: the whole hidden state in, the logits of all ranks out.

    Megatron's own gathering needs CUDA. Rows beyond ``vocabulary``, the last ranks', are padding and left out.
    """

    def __init__(self, weight_VI: Tensor, bias_V: Tensor | None, group: ProcessGroup, *, vocabulary: int) -> None:
        super().__init__(weight_VI, bias_V, group)
        self.vocabulary = vocabulary

    def forward(self, input_BSI: Tensor) -> Tensor:
        """(B, S, I) to (B, S, vocabulary)."""
        return _Gather.apply(super().forward(input_BSI), self.tp_group, self.vocabulary)


class _Gather(torch.autograd.Function):
    """All ranks' last dimensions, side by side, as far as they are real. Backward: this rank's part of the gradient,
    which is the same everywhere."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup, total: int) -> Tensor:
        width = part.shape[-1]
        ctx.width, ctx.start = width, min(group.rank() * width, total)
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat([one[..., : max(0, total - rank * width)] for rank, one in enumerate(parts)], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        mine = grad[..., ctx.start : ctx.start + ctx.width]
        return nn.functional.pad(mine, (0, ctx.width - mine.shape[-1])).contiguous(), None, None


def _config(weight: Tensor) -> ModelParallelConfig:
    # Layers are made on meta and given their weights, wherever those are; so "cpu" holds on CUDA, too.
    return ModelParallelConfig(params_dtype=weight.dtype, use_cpu_initialization=True, perform_initialization=False)


def _no_init(weight: Tensor) -> None:
    raise AssertionError("weights are given, never drawn")


def _place(layer: nn.Module, name: str, value: Tensor, dim: int | None = None) -> None:
    """Gives a layer the weight that it was built to have; ``dim`` is the divided one, None if every rank has all."""
    built: Any = getattr(layer, name)
    assert built.shape == value.shape, f"{name} is {tuple(value.shape)}, {tuple(built.shape)} was to be"
    parameter = nn.Parameter(value)
    vars(parameter).update(vars(built))
    if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
        # Left undone by Megatron where it does not initialise.
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    setattr(layer, name, parameter)
