"""DeepSpeed: two of its ways to use several ranks for one prompt, as peers in benchmarks.

AutoTP splits weights, Ulysses exchanges pieces of the sequence for heads around attention. Both run in the process
group that is there already. Knows no model and no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import groups
from torch import Tensor
from torch import distributed as dist


def split(model: Any) -> Any:
    """The model, its linear layers split over all ranks by DeepSpeed's AutoTP."""
    _join()
    engine = deepspeed.init_inference(
        model,
        tensor_parallel={"tp_size": dist.get_world_size()},
        dtype=torch.float32,
        # Its own kernels exist for CUDA only.
        replace_with_kernel_inject=False,
    )
    return engine.module


def exchange_heads(local: Callable[..., Tensor], kv_heads: int) -> Callable[..., Tensor]:
    """Attention of (q_BSHD, k_BTKD, v_BTKD) where each rank holds a piece of S and T, by DeepSpeed's own
    DistributedAttention: all-to-all to whole sequences of a part of the heads, ``local``, and back."""
    _join()
    # As its engine would for training; ranks with unequal numbers of heads find their own by it.
    groups.mesh_device = comm.initialize_mesh_device((1, dist.get_world_size()), ("data_parallel", "sequence_parallel"))
    ranks = groups.mesh_device.get_group(mesh_dim="sequence_parallel")
    attention = DistributedAttention(local, ranks, scatter_idx=2, gather_idx=1, num_kv_heads=kv_heads)

    def call(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        return attention(q_BSHD, k_BTKD, v_BTKD, batch_dim_idx=0)

    return call


def _join() -> None:
    if not torch.cuda.is_available():
        # It would be compiled at every start, and knows only ranks of one whole machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if not torch.cuda.is_available() else "nccl")
