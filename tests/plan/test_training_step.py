"""A planned training step against sums by hand, on hardware whose every cost is one number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.hardware import Hardware
from fapool_plugin.plan.training import BACKWARD, FORWARD, Part, Training
from fapool_plugin.tools.cluster import read_model
from tests.simple_hardware import (
    BANDWIDTHS,
    BASE,
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
BATCH, TOKENS = 6, 4096
PASSES = {False: [(1, 1.0), (2, 2.5)], True: [(1, 1.0), (1, 1.0), (2, 2.5)]}
"""Products and attention of each, by whether activations are recomputed."""


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster(simple(), MODEL, BASE, "between-nodes")


def linear(recompute: bool, batch: float = BATCH, ranks: int = BASE) -> float:
    tokens = int(batch * TOKENS)
    return sum(linear_by_hand(tokens, tokens, ranks, products) for products, _ in PASSES[recompute])


def attention(recompute: bool, batch: float = BATCH, lanes: int = LANES) -> float:
    """Of one base rank, half of the square of a causal mask."""
    pairs = batch * lanes * TOKENS**2 / 2
    return sum(work for _, work in PASSES[recompute]) * MODEL.layers * pairs * PAIR_S


@pytest.mark.parametrize("recompute", [False, True])
def test_the_base_alone(cluster: Cluster, recompute: bool) -> None:
    step = Training(cluster, BATCH, TOKENS, 0, recompute)
    assert step.linear_s == pytest.approx(linear(recompute), rel=1e-6)
    assert step.alone_s == pytest.approx(linear(recompute) + attention(recompute), rel=0.01)
    assert step.pooled is None
    # All-reduces: two a layer in each pass; so without them it is three or four forwards.
    forward = linear_by_hand(BATCH * TOKENS, BATCH * TOKENS)
    reduced = MODEL.layers * 2 * BATCH * TOKENS * MODEL.hidden * 2 * 1e-10
    times = 4 if recompute else 3
    assert step.linear_s == pytest.approx(times * (forward - reduced) + (times - 1) * reduced, rel=1e-6)


def whole_by_hand(recompute: bool, ranks: int, link: str) -> float:
    """The best of all shares in thousandths, in one part: each rank's NIC takes from two base ranks at a time, a base
    rank's gives to all ranks; forward sends q, k, v and gets out with its LSE, backward sends out, dout and LSE too and
    gets dq, dk and dv."""
    best, width = float("inf"), 64 * 2
    for share in (step / 1000 for step in range(1000)):
        asked, total = (1 - share) / ranks * BATCH * TOKENS * LANES, 0.0
        for products, work in PASSES[recompute]:
            numbers = 4 * width + 4 if products == 1 else 8 * width + 4
            wire = asked * numbers * max(ranks, BASE) / BANDWIDTHS[link]
            mine = work * BATCH * LANES * TOKENS**2 / 2 * PAIR_S
            rank = 2 * LATENCY_S + wire + (1 - share) * mine * BASE / ranks
            total += linear_by_hand(BATCH * TOKENS, BATCH * TOKENS, BASE, products)
            total += MODEL.layers * max(share * mine, rank)
        best = min(best, total)
    return best


@pytest.mark.parametrize("ranks", [2, 6])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("link", BANDWIDTHS)
def test_a_pooled_step(ranks: int, recompute: bool, link: str) -> None:
    step = Training(Cluster(simple(), MODEL, BASE, link), BATCH, TOKENS, ranks, recompute)
    found, expected = step.pooled, whole_by_hand(recompute, ranks, link)
    assert found is not None
    assert found.whole_s == pytest.approx(expected, rel=0.03), f"{found} is not {expected}"
    assert found.seconds <= found.whole_s
    least = max(linear(recompute), step.alone_s / (1 + ranks / BASE))
    assert found.seconds >= 0.99 * least, f"{found} is faster than anything can be, {least}"


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("ranks", [1, 6, 12])
def test_messages_of_one_layer_by_hand(batch: int, ranks: int) -> None:
    """Half of the work goes away, of it half of the queries in this part; keys of all of them."""
    step = Training(Cluster(simple(), MODEL, BASE, "thin"), batch, TOKENS, ranks, False)
    part, lanes = Part(tokens=0.5, pairs=0.75, keys=1.0), batch * LANES * 0.5 / ranks
    queries, keys = lanes * TOKENS / 2, max(lanes, 1) * TOKENS
    a_byte, width = max(ranks, BASE) / BANDWIDTHS["thin"], 64 * 2
    for one, work, out, back in (
        (FORWARD, 1.0, (queries + 2 * keys) * width, queries * (width + 4)),
        (BACKWARD, 2.5, (3 * queries + 2 * keys) * width + queries * 4, (queries + 2 * keys) * width),
    ):
        found = step.layer(one, part, 0.5)
        # A rank works for two base ranks.
        rank_s = 2 * work * 0.75 * batch * LANES * TOKENS**2 / 2 * PAIR_S * 0.5 / ranks
        assert found.away_s == pytest.approx(2 * LATENCY_S + (out + back) * a_byte + rank_s, rel=1e-6)
        assert found.rank_s == pytest.approx(max(rank_s, out * a_byte, back * a_byte), rel=1e-6)
        assert found.own_s == pytest.approx(0.5 * 0.75 * work * batch * LANES * TOKENS**2 / 2 * PAIR_S, rel=1e-6)


def test_parts_in_turns_hide_what_is_linear(cluster: Cluster) -> None:
    step = Training(cluster, BATCH, 16_384, 6, False)
    found = step.pooled
    assert found is not None
    assert found.parts == 2
    least = max(step.linear_s, step.alone_s / (1 + 6 / BASE))
    assert found.seconds < 1.35 * least, f"{found}, at least {least}"


def test_a_single_row_goes_in_two_blocks(cluster: Cluster) -> None:
    """The second block has three quarters of the pairs, and sends the first one's keys again: less is hidden."""
    one, two = (Training(cluster, batch, 16_384, 6, False).pooled for batch in (1, 2))
    assert one is not None
    assert two is not None
    assert (one.parts, two.parts) == (2, 2)
    assert one.seconds < 0.95 * one.whole_s
    assert one.seconds / one.whole_s > 1.05 * two.seconds / two.whole_s


def test_memory_by_hand(cluster: Cluster) -> None:
    tokens, weights = BATCH * TOKENS, MODEL.parameters // BASE * 16
    # Numbers a token and layer: 2 norms' and 2 products' inputs; q, k, v and attention's output; the FFN's inner twice.
    layer = 4 * 512 + 4 * LANES * 64 + 2 * 1024 // BASE
    step = Training(cluster, BATCH, TOKENS, 6, False)
    assert step.alone_bytes == weights + tokens * MODEL.layers * layer * 2 + RESERVE
    assert step.holds == (step.alone_bytes <= MEMORY)
    again = replace(step, recompute=True)
    assert again.alone_bytes == weights + tokens * (layer + 2 * 512) * 2 + RESERVE, "a layer's, and two layers' inputs"


def test_alternatives_by_hand(cluster: Cluster) -> None:
    step = Training(cluster, BATCH, TOKENS, 6, True)
    found = {one.name: one for one in step.others()}
    assert {name: one.copies for name, one in found.items()} == {"replicas": 4, "ring": 4, "data parallel": 8}
    # Two rows each for three of four; gradients take less than backward.
    gradients = 2 * 3 / 4 * MODEL.parameters // BASE * 2 / BANDWIDTHS["between-nodes"]
    back = linear_by_hand(2 * TOKENS, 2 * TOKENS, BASE, 2) + attention(True, 2) * 2.5 / 4.5
    assert back > gradients
    assert found["replicas"].seconds == pytest.approx(linear(True, 2) + attention(True, 2), rel=0.01)
    each = linear(True, 1, 1) + attention(True, 1, MODEL.heads)
    assert found["data parallel"].seconds == pytest.approx(each, rel=0.01)
    # A ring of four: each has a quarter of the positions, and keys, or keys and their gradients, go round.
    tokens = BATCH * TOKENS // 4
    expected = 0.0
    for products, work in PASSES[True]:
        one = work * BATCH * LANES * TOKENS**2 / 2 * PAIR_S / 16
        moved = LATENCY_S + products * 2 * tokens * LANES * 64 * 2 / BANDWIDTHS["between-nodes"]
        expected += linear_by_hand(tokens, tokens, BASE, products) + MODEL.layers * (one + 3 * max(one, moved))
    assert found["ring"].seconds == pytest.approx(expected, rel=0.01)


def test_gradients_are_summed_behind_backward() -> None:
    thin = Training(Cluster(simple(), MODEL, BASE, "thin"), 2, 64, 2, False)
    (one,) = [one for one in thin.others() if one.name == "replicas"]
    gradients = 2 * 1 / 2 * (MODEL.parameters // BASE) * 2 / BANDWIDTHS["thin"]
    assert one.seconds == pytest.approx(linear_by_hand(64, 64) + gradients, rel=0.02), "longer than backward"


def test_a_long_document_of_an_8b_model_by_hand() -> None:
    """64k tokens of one row, two H100 and six pool ranks: flops over what the tables reach."""
    model, _ = read_model(ROOT / "configs" / "models" / "llama3_8b.json", 2)
    made = Cluster(Hardware.load(ROOT / "configs" / "hardware" / "h100-sxm.json"), model, 2, "between-nodes")
    step = Training(made, 1, 65_536, 6, True)
    # Forward, again and backward: 2 operations a parameter and token four times; 4 x head dim a pair, half masked.
    linear_flops = 4 * 2 * (model.parameters - 128_256 * 4096) * 65_536 / 2
    pair_flops = 4.5 * 4 * 128 * 16 * 65_536**2 / 2 * 32
    rates = linear_flops / step.linear_s, pair_flops / (step.alone_s - step.linear_s)
    assert 0.4e15 < rates[0] < 0.8e15, f"{rates[0] / 1e12:.0f} TFLOP/s of products, all-reduces in them"
    assert 0.4e15 < rates[1] < 0.8e15, f"{rates[1] / 1e12:.0f} TFLOP/s of attention"
