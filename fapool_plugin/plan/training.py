"""A training step on a cluster: passes through all layers, each with the pool's part of its attention.

    forward         products       2 all-reduces a layer   attention         q, k, v  ─>  <─ out, lse
    once more       products       2                       attention         the same, where activations are recomputed
    backward    2 x products       2                       attention x 2.5   q, k, v, out, lse, dout  ─>  <─ dq, dk, dv

Keys go with every call and stay nowhere; who computed a tile in forward computes its gradients, so all passes are
shared alike. Rows, or the halves of a single one, take turns. Backward has five products of attention for two
(FlashAttention-2, Dao 2023, section 3). What the same GPUs could do without a pool stands beside it; a gradient's sum
over copies of the weights is hidden behind backward as far as that lasts. The optimizer's own time is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import NamedTuple

from fapool_plugin.plan.alternatives import Other
from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.context_parallel import ring_attention_s
from fapool_plugin.plan.hardware import ELEMENT_BYTES
from fapool_plugin.plan.step import Layer, alternate_s

_STATE_BYTES = 16
"""Of a parameter: bf16 weight and gradient, fp32 weight and two moments (Rajbhandari et al. 2020, section 3.1)."""
_LSE_BYTES = 4
_SHARES = 50


class Pass(NamedTuple):
    """One pass through the layers, in forwards' work and in tensors of a head dim for each query head and KV head."""

    products: float
    attention: float
    queries_out: int
    queries_back: int
    keys_back: int
    keys_out: int = 2
    lse_out: int = 0
    lse_back: int = 0


FORWARD = Pass(1, 1, queries_out=1, queries_back=1, keys_back=0, lse_back=1)
BACKWARD = Pass(2, 2.5, queries_out=3, queries_back=1, keys_back=2, lse_out=1)


class Part(NamedTuple):
    """What takes a turn, as parts of a batch: of its positions, and of its pairs; with how many times its keys."""

    tokens: float
    pairs: float
    keys: float


@dataclass(frozen=True)
class Way:
    """The best found."""

    seconds: float
    whole_s: float
    """In one part."""
    base_share: float
    parts: int


@dataclass(frozen=True)
class Training:
    """A step of ``batch`` sequences of ``tokens`` on a base with ``ranks`` pool ranks. ``recompute``: activations
    within a layer are not kept but computed once more."""

    cluster: Cluster
    batch: int
    tokens: int
    ranks: int
    recompute: bool

    @property
    def passes(self) -> Sequence[Pass]:
        return (FORWARD, FORWARD, BACKWARD) if self.recompute else (FORWARD, BACKWARD)

    @cached_property
    def linear_s(self) -> float:
        """All passes without attention; the head sees every position."""
        return sum(self._linear_s(one) for one in self.passes)

    @cached_property
    def alone_s(self) -> float:
        """Seconds of the base alone."""
        return self.linear_s + sum(self._attention_s(one) for one in self.passes)

    @cached_property
    def pooled(self) -> Way | None:
        """The best way that uses all pool ranks."""
        if not self.ranks:
            return None
        shares = [step / _SHARES for step in range(_SHARES)]

        def best(parts: Sequence[Part]) -> tuple[float, float, int]:
            return min((sum(self._pass_s(one, parts, x) for one in self.passes), x, len(parts)) for x in shares)

        whole = best([Part(1.0, 1.0, 1.0)])
        if self.batch > 1:
            first = (self.batch - self.batch // 2) / self.batch
            turns = best([Part(x, x, x) for x in (first, 1 - first)])
        else:
            # The second half of a row sees, and sends, all keys.
            turns = best([Part(0.5, 0.25, 0.5), Part(0.5, 0.75, 1.0)])
        seconds, share, parts = min(whole, turns)
        return Way(seconds, whole[0], share, parts)

    @property
    def alone_bytes(self) -> float:
        """Of a base rank: weights, gradients, the optimizer's state, and activations; a pool rank has none of them."""
        cluster, model, shape = self.cluster, self.cluster.model, self.cluster.shape()
        ffn = model.intermediate // cluster.base
        # Inputs of two norms and of two products; q, k, v; attention's output; the FFN's inner numbers. As Korthikanti
        # et al. 2022, section 4.1, count them, without dropout, and without scores, which are not kept.
        split = 2 * (shape.heads + shape.kv_heads) * model.head_dim + (3 if model.gated else 2) * ffn
        layer = (4 * model.hidden + split) * ELEMENT_BYTES
        kept = layer + (model.layers - 1) * model.hidden * ELEMENT_BYTES if self.recompute else model.layers * layer
        return shape.parameters * _STATE_BYTES + self.batch * self.tokens * kept + cluster.hardware.reserve_bytes

    @property
    def holds(self) -> bool:
        """Whether a base rank has room for it."""
        return self.alone_bytes <= self.cluster.hardware.memory_bytes

    def marks(self) -> list[str]:
        """What of it is not measured."""
        shape, gpu = self.cluster.shape(), self.cluster.hardware
        return gpu.marks("prefill", shape.heads, shape.kv_heads, shape.head_dim, self.batch, self.tokens)

    def others(self) -> list[Other]:
        """Alternatives that exist for these numbers."""
        cluster, gpus = self.cluster, self.cluster.base + self.ranks
        groups, found = gpus // cluster.base, list[Other]()
        if groups > 1 and self.batch > 1:
            found.append(self._copies("replicas", cluster, groups))
        if groups > 1:
            seconds = self._summed_s(self._ring_s(FORWARD, groups), self._ring_s(BACKWARD, groups), groups)
            seconds += self._ring_s(FORWARD, groups) * self.recompute
            part = replace(self, tokens=ceil(self.tokens / groups), ranks=0)
            found.append(Other("ring", seconds, part.holds, groups))
        if self.batch > 1 and gpus > 1:
            found.append(self._copies("data parallel", replace(cluster, base=1), gpus))
        return found

    def _copies(self, name: str, cluster: Cluster, groups: int) -> Other:
        """Each with its part of the batch."""
        one = replace(self, cluster=cluster, batch=ceil(self.batch / groups), ranks=0)
        backward_s = one._linear_s(BACKWARD) + one._attention_s(BACKWARD)
        return Other(name, one._summed_s(one.alone_s - backward_s, backward_s, groups), one.holds, groups)

    def _summed_s(self, forward_s: float, backward_s: float, groups: int) -> float:
        """With gradients summed over copies by a ring, behind backward."""
        gradients = self.cluster.shape().parameters * ELEMENT_BYTES
        sum_s = 2 * (groups - 1) / groups * gradients / self.cluster.wire.bytes_per_s
        return forward_s + max(backward_s, sum_s)

    def _ring_s(self, one: Pass, groups: int) -> float:
        tokens = self.batch * self.tokens / groups
        moved = (one.keys_out + one.keys_back) / 2
        attention = ring_attention_s(self.cluster, self.tokens, groups, self.batch, one.attention, moved)
        return self.cluster.linear_s(tokens, tokens, products=one.products) + attention

    def _linear_s(self, one: Pass, part: float = 1.0) -> float:
        tokens = part * self.batch * self.tokens
        return self.cluster.linear_s(tokens, tokens, products=one.products)

    def _attention_s(self, one: Pass) -> float:
        """All layers', of one base rank's heads."""
        cost = self.cluster.attention("prefill", self.batch, self.tokens)
        return self.cluster.model.layers * one.attention * (cost.a + self.batch * self._work(cost.b, cost.c))

    def _work(self, b: float, c: float) -> float:
        return self.tokens * (b + self.tokens * c)

    def _pass_s(self, one: Pass, parts: Sequence[Part], share: float) -> float:
        """One pass with so much of the attention on the base."""
        layers = [self.layer(one, part, share) for part in parts]
        return alternate_s(layers, self.cluster.model.layers)

    def layer(self, one: Pass, part: Part, share: float) -> Layer:
        """A pool rank's NIC takes from all base ranks, a base rank's gives to all pool ranks; each base rank's request
        waits for those of the others."""
        cluster, shape, wire = self.cluster, self.cluster.shape(), self.cluster.wire
        rows = part.tokens * self.batch
        asked_rows = rows / (cluster.base + self.ranks)
        mine, theirs = (cluster.attention("prefill", max(1.0, n), self.tokens) for n in (rows, asked_rows))
        own, away = (one.attention * self.batch * part.pairs * self._work(cost.b, cost.c) for cost in (mine, theirs))
        rank_s = cluster.base * one.attention * theirs.a + cluster.base * away * (1 - share) / self.ranks
        asked = self.batch * self.tokens * (1 - share) / self.ranks
        # A rank that has a part of a lane needs up to all of its keys.
        queries, keys = asked * part.tokens * shape.heads, max(asked * shape.kv_heads, self.tokens) * part.keys
        width = shape.head_dim * ELEMENT_BYTES
        out = queries * (one.queries_out * width + one.lse_out * _LSE_BYTES) + keys * one.keys_out * width
        back = queries * (one.queries_back * width + one.lse_back * _LSE_BYTES) + keys * one.keys_back * width
        a_byte = max(self.ranks, cluster.base) / wire.bytes_per_s
        return Layer(
            linear_s=self._linear_s(one, part.tokens) / cluster.model.layers,
            asking_s=self.ranks * cluster.ask_s,
            own_s=share * own + (one.attention * mine.a if share else 0.0),
            away_s=2 * wire.latency_s + (out + back) * a_byte + rank_s,
            # What the next part waits for: a rank, or either way of a NIC.
            rank_s=max(rank_s, out * a_byte, back * a_byte),
            leaving_s=0.0,
            merging_s=0.0,
        )
