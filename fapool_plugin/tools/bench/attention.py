"""One causal attention call, done in two ways: alone, and through the pool.

Every maker returns a function that does the call once and answers (seconds, out_BSHD, facts). No model is known here,
and nothing is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.kernels.forward import attend
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.ranks.local import LocalPool

_WARM_TOKENS = 256
Turn = tuple[float, Tensor, dict[str, Any]]


def alone(tokens: int, heads: int, kv_heads: int, head_dim: int) -> Callable[[], Turn]:
    """The kernel by itself, with as many threads as this process has."""
    q_BSHD, k_BTKD, v_BTKD = inputs(tokens, heads, kv_heads, head_dim)

    def turn() -> Turn:
        began = time.perf_counter()
        out, _ = attend(q_BSHD, k_BTKD, v_BTKD, softmax_scale=head_dim**-0.5, causal=True)
        return time.perf_counter() - began, out, {}

    attend(*(x[:, :_WARM_TOKENS] for x in (q_BSHD, k_BTKD, v_BTKD)), softmax_scale=head_dim**-0.5, causal=True)
    return turn


def pool(tokens: int, heads: int, kv_heads: int, head_dim: int, fa_pool: dict[str, Any]) -> Callable[[], Turn]:
    """Through pool ranks that hold nothing beforehand: everything they need is sent within the turn."""
    manager = ResourceManager(FAPoolConfig.load(fa_pool), LocalPool)
    layer = FAPoolAttention(manager, 0, 1, stands_for="sdpa")
    # Heads first, as models hand them over.
    q_BHSD, k_BKTD, v_BKTD = (x.transpose(1, 2) for x in inputs(tokens, heads, kv_heads, head_dim))

    def call(new: int) -> Tensor:
        geometry = Geometry((0,), (new,), 0, new)
        decided = manager.begin("prefill", new, lambda: geometry, SequenceState(), lasting=False)
        try:
            qkv = (x[:, :, :new] for x in (q_BHSD, k_BKTD, v_BKTD))
            return layer(*qkv, decided=decided, softmax_scale=head_dim**-0.5)
        finally:
            manager.end(decided)

    def turn() -> Turn:
        before = manager.stats()
        began = time.perf_counter()
        out = call(tokens)
        seconds = time.perf_counter() - began
        after = manager.stats()
        facts = {key: after[key] - before[key] for key in ("bytes_sent", "bytes_received", "faults")}
        counted = ("pooled_calls", "local_calls", "pooled_forwards", "local_forwards")
        return seconds, out, facts | {key: after["prefill"][key] - before["prefill"][key] for key in counted}

    call(min(tokens, _WARM_TOKENS))
    return turn


def inputs(tokens: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same random q, k and v in every process: one sequence, BSHD, float32.

    Queries are long, so that each attends to a few keys: an average of many would be near zero, and so would errors.
    """
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, n, head_dim, generator=source) for n in (heads, kv_heads, kv_heads))
    return 8.0 * q, k, v
