"""Hardware whose every cost is one number, and a small model on it, for sums by hand."""

from __future__ import annotations

from fapool_plugin.plan.attention_table import AttentionTable, Points
from fapool_plugin.plan.cluster import Model
from fapool_plugin.plan.hardware import GemmTable, Hardware, Link

PAIR_S, KEY_S, PRODUCT_S, REDUCED_S = 1e-8, 4e-8, 1e-10, 1e-10
"""Of a pair of positions and of a key for one lane, of a product of two numbers, of a byte of an all-reduce."""
BANDWIDTHS = {"between-nodes": 1e9, "thin": 2e7}
LATENCY_S, MEMORY, RESERVE = 1e-5, 1 << 30, 1 << 20
MOVING = 1e18
MODEL = Model(
    hidden=512, layers=3, heads=8, kv_heads=8, head_dim=64, intermediate=1024, vocab=4096, gated=False
)  # fmt: skip
BASE = 2
LANES = MODEL.heads // BASE


def simple(kv_heads: int = 4) -> Hardware:
    def points(power: int, lane_s: float) -> Points:
        lengths = [2**at for at in range(31)]
        micros = {batch: [batch * 4 * lane_s * 1e6 * n**power for n in lengths] for batch in (1, 2, 1024)}
        return Points(lengths=lengths, micros=micros)

    sides = [2, 1 << 17]
    micros = [[[m * n * k * PRODUCT_S * 1e6 for k in sides] for n in sides] for m in [1, 1 << 20]]
    return Hardware(
        name="simple",
        device="none",
        source="by hand",
        licence="none",
        date="2026-11-29",
        measured=[],
        extrapolated=[],
        errors={},
        memory_bytes=MEMORY,
        reserve_bytes=RESERVE,
        memory_bytes_per_s=MOVING,
        attention=[
            AttentionTable(
                heads=4,
                kv_heads=kv_heads,
                head_dim=64,
                prefill=points(2, PAIR_S / 2),
                decode=points(1, KEY_S),
            )
        ],
        gemm=GemmTable(m=[1, 1 << 20], n=sides, k=sides, micros=micros),
        all_reduce={2: [(1.0, REDUCED_S), (1e9, 1e9 * REDUCED_S)]},
        links={
            name: Link(bytes_per_s=bytes_per_s, latency_s=LATENCY_S, source="by hand")
            for name, bytes_per_s in BANDWIDTHS.items()
        },
    )


def linear_by_hand(tokens: int, sequences: int, ranks: int = BASE, products: int = 1) -> float:
    """All that is not attention, with products and moves so often."""
    numbers = 3 * MODEL.heads * 64 // ranks + MODEL.heads * 64 // ranks + 2 * MODEL.intermediate // ranks
    reduced = 2 * tokens * MODEL.hidden * 2 * REDUCED_S if ranks > 1 else 0
    moving = 4 * 3e-6  # kernels that only move bytes: on this hardware nothing but their launch
    head = sequences * MODEL.vocab // ranks * MODEL.hidden * PRODUCT_S
    computed = MODEL.layers * (tokens * MODEL.hidden * numbers * PRODUCT_S + moving) + head
    return products * computed + MODEL.layers * reduced
