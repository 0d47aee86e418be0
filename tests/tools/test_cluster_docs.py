"""The tables of docs/paper.md, row by row what the planner gives today, and of docs/simulation.md what files say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from fapool_plugin.plan.alternatives import Outlook
from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.hardware import Hardware, Kind
from fapool_plugin.tools.cluster import SLOW, read_model

ROOT = Path(__file__).resolve().parents[2]
# Before each table: <!-- plan: hardware config base batch pool kind -->
TABLES = re.findall(
    r"<!-- plan: (\S+) (\S+) (\d+) (\d+) (\d+) (\w+) -->\n\|.*\n\|[-|]+\|\n((?:\|.*\n)+)",
    (ROOT / "docs" / "paper.md").read_text(encoding="utf-8"),
)


def shown(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def row(near: Outlook, far: Outlook) -> str:
    """As it stands in the document."""
    others = {one.name: one for one in near.others()}
    assert near.pooled is not None
    assert far.pooled is not None
    shape = near.cluster.shape(1)
    keys = near.batch * near.tokens * shape.layers * shape.kv_heads * 2 * shape.head_dim * 2
    holds = "yes" if near.alone_holds else "no, the pool's GPUs with it do" if near.memory.holds else "no, nor all GPUs"
    cells = [
        f"{near.tokens}{' ~' if near.marks() else ''}",
        f"{keys / 1e9:.0f}",
        f"{near.alone_s / near.linear_s - 1:.2f}",
        shown(near.alone_s),
        shown(near.pooled.seconds),
        f"{near.alone_s / near.pooled.seconds:.2f}",
        shown(far.pooled.seconds),
        shown(others["replicas"].seconds),
        shown(others["keys divided" if near.kind == "decode" else "ring"].seconds),
        holds,
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: "-".join(table[:1] + table[3:6]))
def test_rows_are_the_planners(table: tuple[str, ...]) -> None:
    name, config, base, batch, pool, kind, text = table
    assert kind in get_args(Kind)
    model, _ = read_model(ROOT / "configs" / config, int(base))
    hardware = Hardware.load(ROOT / "configs" / "hardware" / f"{name}.json")
    made = [Cluster(hardware, model, int(base), link) for link in ("between-nodes", SLOW)]
    lengths = [int(line.split()[1]) for line in text.splitlines()]
    pairs = [
        [Outlook(one, "decode" if kind == "decode" else "prefill", int(batch), n, int(pool)) for one in made]
        for n in lengths
    ]
    expected = [row(near, far) for near, far in pairs]
    assert text.splitlines() == expected, "it is now\n" + "\n".join(expected)


def test_there_are_tables() -> None:
    assert {table[5] for table in TABLES} == {"decode", "prefill"}
    assert len(TABLES) >= 4


def error_rows() -> list[str]:
    """As they stand in the document."""
    made = [Hardware.load(path) for path in sorted((ROOT / "configs" / "hardware").glob("*.json"))]
    parts = dict.fromkeys((kind, part) for one in made for kind, of in one.errors.items() for part in of)
    found = []
    for kind, part in sorted(parts, key=lambda at: ("prefill", "decode", "gemm").index(at[0])):
        cells = [kind, part]
        for one in made:
            off = one.errors[kind].get(part)
            figures = "{points:.0f}: {median:.1%}, {p95:.0%}, {largest:.0%}; {within:.0%}"
            cells.append(figures.format(within=off["within 10 %"], **off) if off else "–")
        found.append(f"| {' | '.join(cells)} |")
    return found


def test_differences_are_the_files() -> None:
    text = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8")
    missing = [one for one in error_rows() if one not in text.splitlines()]
    assert not missing, "not in the document:\n" + "\n".join(missing)


def test_figures_in_the_papers_text() -> None:
    model, base = read_model(ROOT / "configs" / "paper_8base_32pool.json", None)
    hardware = Hardware.load(ROOT / "configs" / "hardware" / "a100-sxm.json")
    made = Cluster(hardware, model, base, "between-nodes")
    slow = Cluster(hardware, model, base, "between-nodes", ask_s=50e-6)
    for tokens, expected in ((1024, 11.4), (4096, 15), (8192, 18.3)):
        found = slow.pooled("decode", 1024, tokens, 32).seconds * 1e3
        assert found == pytest.approx(expected, rel=0.03), f"{tokens}: {found} ms with 50 us for each rank"
    assert made.threshold("decode", 1024, 32, 1 << 18) == 768
    assert made.threshold("prefill", 1, 32, 1 << 18) == 80_064
    products = sum(hardware.gemm_s(8192, n, k) for n, k in ((1536, 4096), (4096, 512), (4096, 4096), (4096, 2048)))
    assert products == pytest.approx(2.31e-3, rel=0.01)
    at = [made.alone_s("decode", 1024, tokens) / made.linear_s(1024, 1024) - 1 for tokens in (560, 640)]
    assert at[0] < 1 < at[1], f"attention passes the rest near 600 tokens: {at}"
    assert model.parameters * 2 / 1e9 == pytest.approx(2.7, abs=0.05)
    many = 4 * hardware.attention_s("prefill", 4, 4, 128, 16, 4096) / made.linear_s(16 * 4096, 16)
    assert many == pytest.approx(0.08, abs=0.005), "with 16 prompts at a time"


def test_many_lanes_cost_less_each() -> None:
    """Why 1.35 ns a key and sequence, of 256 lanes, is too much for the 4,096 of the paper's batch."""
    hardware = Hardware.load(ROOT / "configs" / "hardware" / "a100-sxm.json")
    for heads, batch, keys, expected in (
        (4, 64, 8192, 1.65), (4, 128, 8192, 1.37), (8, 128, 8192, 1.28), (4, 64, 32_768, 1.35), (4, 1024, 512, 1.34),
        (4, 1024, 1024, 1.19), (4, 1024, 8192, 1.14),
    ):  # fmt: skip
        seconds = hardware.attention_s("decode", heads, heads, 128, batch, keys) * 4 / heads
        assert seconds / batch / keys * 1e9 == pytest.approx(expected, abs=0.006), f"{heads} x {batch} x {keys}"


def test_as_many_lanes_as_processors() -> None:
    """27 rows of 4 heads on 108 processors take what 16 take, but no more than the best part of the bandwidth."""
    model, base = read_model(ROOT / "configs" / "paper_8base_32pool.json", None)
    hardware = Hardware.load(ROOT / "configs" / "hardware" / "a100-sxm.json")
    (table,) = [one for one in hardware.attention if (one.heads, one.kv_heads) == (4, 4)]
    points, lane = table.decode, 2 * 128 * 2
    at = {(b, n): us * 1e-6 for b, row in points.micros.items() for n, us in zip(points.lengths, row, strict=False)}
    best = max(b * 4 * n * lane / seconds for (b, n), seconds in at.items() if b * 4 * n * lane > 4e8)
    assert 0.8 < best / hardware.memory_bytes_per_s < 1, f"{best:.3g} bytes a second, with no cache that holds them"
    row = [max(at[16, n] * 1e6, 27 * 4 * n * lane / best * 1e6) for n in points.lengths if (16, n) in at]
    decode = points.model_copy(update={"micros": points.micros | {27: row}})
    others = [one for one in hardware.attention if one is not table]
    tables = [*others, table.model_copy(update={"decode": decode})]
    made = Cluster(hardware.model_copy(update={"attention": tables}), model, base, "between-nodes")
    for tokens, expected in ((8192, 11.8), (16_384, 19.8)):
        found = made.pooled("decode", 1024, tokens, 32).seconds * 1e3
        assert found == pytest.approx(expected, abs=0.05), f"{tokens}: {found} ms"
