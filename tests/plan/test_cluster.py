"""A cluster's plan against sums by hand, on hardware whose every cost is one number; and the paper's setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from fapool_plugin.plan.alternatives import Outlook
from fapool_plugin.plan.cluster import Cluster, Model
from fapool_plugin.plan.context_parallel import keys_divided_s, ring_s, ulysses_s
from fapool_plugin.plan.hardware import Hardware, Kind
from fapool_plugin.plan.training import Training
from tests.simple_hardware import (
    BANDWIDTHS,
    BASE,
    KEY_S,
    LANES,
    LATENCY_S,
    MEMORY,
    MODEL,
    PAIR_S,
    RESERVE,
    linear_by_hand,
    simple,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster(simple(), MODEL, BASE, "between-nodes")


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_linear_is_products_and_two_all_reduces_a_layer(cluster: Cluster, ranks: int) -> None:
    found, expected = cluster.linear_s(300, 7, ranks), linear_by_hand(300, 7, ranks)
    assert found == pytest.approx(expected, rel=1e-6), f"{found} is not {expected}"


def test_the_base_alone(cluster: Cluster) -> None:
    step = linear_by_hand(64, 64) + MODEL.layers * 64 * 1000 * LANES * KEY_S
    assert cluster.alone_s("decode", 64, 1000) == pytest.approx(step, rel=1e-6)
    prompt = linear_by_hand(2000, 1) + MODEL.layers * 2000**2 / 2 * LANES * PAIR_S
    assert cluster.alone_s("prefill", 1, 2000) == pytest.approx(prompt, rel=1e-3)


def decode_by_hand(batch: int, tokens: int, ranks: int, link: str) -> float:
    """The best of all shares in thousandths: the base's own keys beside the slowest rank's way and work.

    A rank's NIC takes from both base ranks at a time, a base rank's gives to all ranks; a query, a new key and a new
    value of each lane go out, a result and its LSE come back.
    """
    best, all_s = float("inf"), batch * tokens * LANES * KEY_S
    for share in (step / 1000 for step in range(1000)):
        lanes = (1 - share) / ranks * batch * LANES
        wire = (lanes * 3 * 64 * 2 + lanes * (64 * 2 + 4)) * max(ranks, BASE) / BANDWIDTHS[link]
        rank = 2 * LATENCY_S + wire + (1 - share) * all_s * BASE / ranks
        best = min(best, linear_by_hand(batch, batch) + MODEL.layers * max(share * all_s, rank))
    return best


@pytest.mark.parametrize("ranks", [1, 2, 6])
@pytest.mark.parametrize("tokens", [100, 3000])
@pytest.mark.parametrize("link", BANDWIDTHS)
def test_a_pooled_step(ranks: int, tokens: int, link: str) -> None:
    cluster = Cluster(simple(), MODEL, BASE, link)
    found, expected = cluster.pooled("decode", 600, tokens, ranks), decode_by_hand(600, tokens, ranks, link)
    assert found.whole_s == pytest.approx(expected, rel=0.02), f"{found} is not {expected}"
    attention = MODEL.layers * 600 * tokens * LANES * KEY_S
    assert found.seconds >= max(linear_by_hand(600, 600), attention / (1 + ranks / BASE))
    assert found.seconds <= found.whole_s


def test_turns_hide_what_is_linear_behind_the_pool(cluster: Cluster) -> None:
    """Where both halves have as much of each, nearly all of the linear part of one is hidden behind the other."""
    found = cluster.pooled("decode", 600, 2500, 6)
    assert found.blocks == 2
    assert found.seconds < 0.9 * found.whole_s, f"{found}"


def test_a_pooled_prompt_is_within_what_is_possible(cluster: Cluster) -> None:
    alone, linear = cluster.alone_s("prefill", 1, 16_384), linear_by_hand(16_384, 1)
    found = cluster.pooled("prefill", 1, 16_384, 6)
    least = max(linear, alone / (1 + 6 / BASE))
    assert least <= found.seconds < 1.25 * least, f"{found}, at least {least}, alone {alone}"


def test_all_ranks_are_used_and_asking_each_is_paid_in_every_layer(cluster: Cluster) -> None:
    slow = Cluster(cluster.hardware, MODEL, BASE, "between-nodes", ask_s=0.1)
    found = [one.pooled("decode", 600, 300, 6).whole_s for one in (cluster, slow)]
    assert found[1] - found[0] == pytest.approx(MODEL.layers * 6 * 0.1, rel=0.05), f"{found}"


def test_thresholds_by_the_papers_formula(cluster: Cluster) -> None:
    def rules(t: int) -> bool:
        lanes = 600 * LANES / (BASE + 6)
        wire = (lanes * 3 * 64 * 2 + lanes * 64 * 2) * 6 / BANDWIDTHS["between-nodes"]
        overhead = MODEL.layers * (2 * LATENCY_S + wire)
        return MODEL.layers * 600 * t * LANES * KEY_S > linear_by_hand(600, 600) + overhead

    expected = next(t for t in range(64, 1 << 16, 64) if rules(t))
    assert cluster.threshold("decode", 600, 6, 1 << 16) == expected
    assert cluster.threshold("decode", 600, 6, expected - 64) is None


def test_memory_by_hand(cluster: Cluster) -> None:
    keys = 100 * 1000 * 3 * LANES * 2 * 64 * 2  # bytes of one base rank that keeps its heads' keys
    weights = MODEL.parameters * 2 // BASE
    row = Outlook(cluster, "decode", 100, 1000, 6)
    assert row.memory.alone == weights + keys + RESERVE
    assert row.pooled is not None
    share = row.pooled.base_share
    assert row.memory.base == pytest.approx(weights + share * keys + RESERVE, abs=2)
    assert row.memory.rank == pytest.approx((1 - share) * keys * BASE / 6 + RESERVE, abs=2)
    assert (row.alone_holds, row.memory.holds) == (True, True)
    # A base rank has room for 996 MiB of keys, each pool rank for 1023.
    for batch, alone, pooled in ((320, True, True), (360, False, True), (1300, False, True), (1500, False, False)):
        row = Outlook(cluster, "decode", batch, 1000, 6)
        assert (row.alone_holds, row.memory.holds) == (alone, pooled), f"{batch}: {row.memory}"
        assert row.memory.base <= MEMORY
        assert {one.name: one.holds for one in row.others()}["data parallel"] == (batch <= 1300)
    row = Outlook(cluster, "decode", 1100, 1000, 1)
    assert row.memory.base == MEMORY, "a base rank gives to its one pool rank what it would like to keep"


@pytest.mark.parametrize("link", BANDWIDTHS)
def test_alternatives_by_hand(link: str) -> None:
    cluster, a_byte = Cluster(simple(), MODEL, BASE, link), 1 / BANDWIDTHS[link]
    decode = {one.name: one for one in Outlook(cluster, "decode", 600, 300, 6).others()}
    a_step = MODEL.layers * 300 * KEY_S
    assert decode["replicas"].seconds == pytest.approx(linear_by_hand(150, 150) + 150 * LANES * a_step)
    assert decode["data parallel"].seconds == pytest.approx(linear_by_hand(75, 75, 1) + 75 * 8 * a_step)
    moved = LATENCY_S + 3 * 600 * LANES * (64 * 2 + 4) * a_byte
    divided = linear_by_hand(600, 600) + 600 * LANES * a_step / 4 + MODEL.layers * moved
    assert decode["keys divided"].seconds == pytest.approx(divided)
    assert [one.copies for one in decode.values()] == [4, 4, 8]
    prompt = {one.name: one for one in Outlook(cluster, "prefill", 1, 4096, 6).others()}
    attention, part = 4096**2 / 2 * LANES * PAIR_S / 4, 4096 // 4
    moved = LATENCY_S + 2 * LANES * 64 * 2 * part * a_byte
    assert (moved > attention / 4) == (link == "thin"), "both sides of the ring's larger of two are tried"
    ring = linear_by_hand(part, 1) + MODEL.layers * (attention / 4 + 3 * max(attention / 4, moved))
    assert prompt["ring"].seconds == pytest.approx(ring)
    moved = 2 * LATENCY_S + 4 * LANES * 64 * part * 2 * 3 / 4 * a_byte
    assert prompt["ulysses"].seconds == pytest.approx(linear_by_hand(part, 1) + MODEL.layers * (attention + moved))
    assert prompt["replicas"].seconds == pytest.approx(cluster.alone_s("prefill", 1, 4096) / 4)


@pytest.mark.parametrize(
    ("kind", "batch", "tokens"), [("prefill", 1, 100_000), ("decode", 16, 1152), ("decode", 9, 300)]
)
def test_attention_on_measured_hardware_is_the_tables_at_that_length(kind: Kind, batch: int, tokens: int) -> None:
    """Kernels have steps there: what was made for another length would be off."""
    made = Cluster(Hardware.load(ROOT / "configs/hardware/a100-sxm.json"), PAPER, 8, "between-nodes")
    attention = PAPER.layers * made.hardware.attention_s(kind, 4, 4, 128, batch, tokens)
    linear = made.linear_s(batch * tokens if kind == "prefill" else batch, batch)
    found = {"base alone": made.alone_s(kind, batch, tokens)}
    # In a single group everything is at home.
    if kind == "prefill":
        found |= {"ring": ring_s(made, tokens, 1), "training": Training(made, 1, tokens, 0, False).alone_s}
        found["ulysses"] = ulysses_s(made, tokens, 1) - PAPER.layers * 2 * made.wire.latency_s
        found["training"] -= Training(made, 1, tokens, 0, False).linear_s - linear + 2.5 * attention
    else:
        found["keys divided"] = keys_divided_s(made, batch, tokens, 1) - PAPER.layers * made.wire.latency_s
    off = {name: seconds / (linear + attention) - 1 for name, seconds in found.items()}
    assert max(map(abs, off.values())) < 1e-6, f"{off}"


def test_heads_that_are_not_there_go_round_no_groups(cluster: Cluster) -> None:
    """Four heads a base rank: eight groups cannot have whole ones."""
    assert [one.name for one in Outlook(cluster, "prefill", 1, 4096, 14).others()] == ["replicas", "ring"]


@pytest.mark.parametrize(
    ("base", "link", "told"),
    [
        (3, "between-nodes", "cannot be shared by 3 base ranks"),
        (2, "string", "no link 'string'; give one of between-nodes"),
        (4, "between-nodes", "all-reduces of 2 GPUs, none of 4"),
    ],
)
def test_what_cannot_be_planned_is_refused(base: int, link: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Cluster(simple(), MODEL, base, link)


PAPER = Model(
    hidden=4096, layers=4, heads=32, kv_heads=32, head_dim=128, intermediate=16_384, vocab=32_000, gated=False
)  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "alone_ms", "pooled_ms"),
    [(1024, 7.9, 4.5), (4096, 24.6, 7.9), (8192, 48.8, 12.7), (32_768, 184.7, 39.9)],
)
def test_the_papers_decode_agrees_with_a_calculation_made_apart(tokens, alone_ms, pooled_ms) -> None:
    """Made before this planner, from the same public tables; without turns, on 8 base and 32 pool A100."""
    made = Cluster(Hardware.load(ROOT / "configs/hardware/a100-sxm.json"), PAPER, 8, "between-nodes")
    found = made.alone_s("decode", 1024, tokens) * 1e3, made.pooled("decode", 1024, tokens, 32).whole_s * 1e3
    assert found == pytest.approx((alone_ms, pooled_ms), rel=0.16), f"{found} ms, not {alone_ms} and {pooled_ms}"
