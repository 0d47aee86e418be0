"""Context parallelism by formula: groups of GPUs, each with a copy of the weights, that divide every sequence.

- *ring* (Liu, Zaharia and Abbeel 2023, with equal parts by Brandon et al. 2023): the prompt is cut into parts; all but
  one time keys and values of a part go on to the next group while attention of the last is computed.
- *ulysses* (Jacobs et al. 2023): the same parts, but two all-to-alls a layer give each group whole heads.
- *keys divided* (in decode): each group holds a part of each sequence's keys and computes all of what is linear;
  partial results with their LSE go to all others.

Formulas take full overlap and even parts for granted, so they are kind to it.
"""

from __future__ import annotations

from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.hardware import ELEMENT_BYTES

_LSE_BYTES = 4


def ring_s(cluster: Cluster, tokens: float, groups: int) -> float:
    """Prefill of one prompt."""
    return cluster.linear_s(tokens / groups, 1) + ring_attention_s(cluster, tokens, groups)


def ring_attention_s(
    cluster: Cluster, tokens: float, groups: int, batch: float = 1, work: float = 1.0, moved: float = 1.0
) -> float:
    """All layers' attention of a batch, with ``work`` times a forward's products and ``moved`` times its bytes."""
    shape, wire = cluster.shape(), cluster.wire
    cost, part = cluster.attention("prefill", batch, tokens), tokens / groups
    one = work * (cost.a + batch * (cost.b * tokens + cost.c * tokens**2) / groups**2)
    keys = moved * batch * 2 * shape.kv_heads * shape.head_dim * part * ELEMENT_BYTES
    return shape.layers * (one + (groups - 1) * max(one, wire.latency_s + keys / wire.bytes_per_s))


def ulysses_s(cluster: Cluster, tokens: float, groups: int) -> float:
    """Prefill of one prompt; groups have to divide a base rank's heads."""
    shape, wire = cluster.shape(), cluster.wire
    cost, part = cluster.attention("prefill", 1, tokens), tokens / groups
    attention = cost.a + (cost.b * tokens + cost.c * tokens**2) / groups
    numbers = (2 * shape.heads + 2 * max(shape.kv_heads, groups)) * shape.head_dim * part
    moved = 2 * wire.latency_s + numbers * ELEMENT_BYTES * (groups - 1) / groups / wire.bytes_per_s
    return cluster.linear_s(part, 1) + shape.layers * (attention + moved)


def keys_divided_s(cluster: Cluster, batch: float, tokens: float, groups: int) -> float:
    """A decode step."""
    shape, wire = cluster.shape(), cluster.wire
    cost = cluster.attention("decode", batch, tokens)
    attention = cost.a + cost.b * batch * tokens / groups
    result = batch * shape.heads * (shape.head_dim * ELEMENT_BYTES + _LSE_BYTES)
    moved = wire.latency_s + (groups - 1) * result / wire.bytes_per_s
    return cluster.linear_s(batch, batch) + shape.layers * (attention + moved)
