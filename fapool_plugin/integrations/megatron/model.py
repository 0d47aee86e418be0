"""Megatron-core: its own GPT models, whose attention layers may borrow pool ranks.

A layer spec and a thin adapter of GPTModel. How a forward is decided is in forward, what a layer computes in
attention; what the CPU lacks is in host.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from fapool_plugin.base.agreement import Agree
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.integrations.megatron.attention import FAPoolCoreAttention, FAPoolSelfAttention
from fapool_plugin.integrations.megatron.forward import run
from fapool_plugin.integrations.megatron.host import allocate_cache, settle_on_cpu
from fapool_plugin.ranks.pools import open_manager


def get_fapool_layer_spec(
    config: Any,
    fa_pool: FAPoolConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    agree: Agree | None = None,
) -> Any:
    """Megatron's local layer spec (no TransformerEngine, no CUDA) with attention that borrows pool ranks.

    All layers built from one spec share one pool; build one model from it.

    Args:
        config: the model's TransformerConfig.
        fa_pool: configuration, or a JSON file's path; None: the defaults.
        agree: makes tensor-parallel ranks decide alike, ``agree_over(pg_collection.tp)``; needed where there are
            several.

    Returns:
        A ModuleSpec for :class:`FAPoolGPTModel`.

    Raises:
        FAPoolConfigError: the configuration is not valid, asks for more than this machine has, or for a measurement
            that there is none of for Megatron's own models.
        ValueError: the layers cannot be pooled exactly; raised when they are built.
    """
    settings = FAPoolConfig.load(fa_pool)
    if settings.threshold == "auto" or settings.profile is not None:
        raise FAPoolConfigError(
            f"threshold = {settings.threshold!r}, profile = {settings.profile!r}: nothing measures Megatron's own "
            "models yet; give the threshold as a number, and no profile"
        )
    if settings.kv_home == "pool" and (config.num_moe_experts or config.sequence_parallel):
        what = "num_moe_experts" if config.num_moe_experts else "sequence_parallel"
        raise FAPoolConfigError(
            f'kv_home = "pool" with {what} = {getattr(config, what)}: that a replay of lost keys gives the same there '
            'has not been shown; set kv_home to "base"'
        )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    manager = open_manager(settings, agree, config.tensor_model_parallel_size)
    core = functools.partial(FAPoolCoreAttention, manager=manager, agrees=agree is not None)
    spec.submodules.self_attention.submodules.core_attention = core
    if settings.kv_home == "pool":
        spec.submodules.self_attention.module = FAPoolSelfAttention
    return spec


class FAPoolGPTModel(GPTModel):
    """Megatron's GPTModel, with the same arguments, built from :func:`get_fapool_layer_spec`.

    ``model.fa_pool`` is its :class:`ResourceManager`: ``stats()``, ``close()``. Without a GPU it runs on the CPU,
    where Megatron's own does not.

    Raises:
        ValueError: the layers are others, or cannot be pooled exactly.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = {id(m.core.manager): m.core.manager for m in self.modules() if isinstance(m, FAPoolCoreAttention)}
        if len(managers) != 1 or self.mtp_process:
            raise ValueError(
                f"FAPoolGPTModel has layers of {len(managers)} pools{', and of mtp_block_spec' * self.mtp_process}: "
                "build all of its layers from one get_fapool_layer_spec(config, fa_pool), without mtp_block_spec"
            )
        (self.fa_pool,) = managers.values()
        if not torch.cuda.is_available():
            settle_on_cpu(self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As GPTModel's. Raises ValueError, too, for what cannot be computed exactly; where keys live on the pool,
        PoolMemoryError for what does not fit, and RuntimeError if lost keys cannot be computed once more."""
        given = inspect.signature(super().forward).bind(*args, **kwargs).arguments
        context = given.get("inference_context")
        context = given.get("inference_params") if context is None else context
        stored = context is not None and context.is_static_batching() and self.fa_pool.config.kv_home == "base"
        if stored and not torch.cuda.is_available():
            allocate_cache(self, context)
        enter = functools.partial(super().forward, *args, **kwargs)
        return run(self, self.fa_pool, given | {"inference_context": context}, enter)
