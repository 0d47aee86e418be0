"""Tables of attention: between and beyond measured points against sums by hand, and against points left out."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median
from typing import get_args

import pytest
from pydantic import ValidationError

from fapool_plugin.plan.attention_table import GROWTH, Kind, Points
from fapool_plugin.plan.hardware import Hardware

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = {64, 512}
SHAPES = {"a100": (4, 4, 128), "h100": (8, 1, 128)}
"""As in the public table (aiconfigurator-core 0.12.0, Apache-2.0): vLLM 0.14.0 on an A100, the heads that the paper's
model has on each of 8 base ranks; vLLM 0.24.0 on an H100, those of Llama-3-70B."""
Known = dict[tuple[int, int], float]


def known(name: str, kind: str) -> Known:
    """Seconds by (batch, tokens)."""
    with (Path(__file__).parent / f"{name}_attention.csv").open(encoding="utf-8") as file:
        return {
            (int(row["batch"]), int(row["tokens"])): float(row["seconds"])
            for row in csv.DictReader(file)
            if row["kind"] == kind
        }


def points_of(left: Known) -> Points:
    lengths = sorted({n for _, n in left})
    micros = {batch: [left[batch, n] * 1e6 for n in lengths if (batch, n) in left] for batch, _ in sorted(left)}
    return Points(lengths=lengths, micros={batch: row for batch, row in micros.items() if len(row) > 1})


def differences(name: str, kind: Kind) -> dict[str, list[float]]:
    """Relative, of points that a table was made without; the parts of docs/simulation.md."""
    every = known(name, kind)

    def off(kept: Known, asked: set[tuple[int, int]]) -> list[float]:
        points = points_of(kept)
        return [abs(points.seconds(*at, GROWTH[kind]) / every[at] - 1) for at in asked]

    held = {at: s for at, s in every.items() if at[1] <= 8192 and at[0] not in HELD_OUT}
    longer = {at for at in every if at[1] > 8192 and at[0] not in HELD_OUT}
    few = max(batch * n for batch, n in every) // 4
    found = {
        "8k to 16k held out": off(held, {at for at in longer if at[1] <= 16_384}),
        "16k to 131k held out": off(held, {at for at in longer if at[1] > 16_384}),
        "batches 64 and 512 held out": off(held, {at for at in every if at[0] in HELD_OUT}),
        "4 times as many in all held out": off(
            {at: s for at, s in every.items() if at[0] * at[1] <= few}, {at for at in every if at[0] * at[1] > few}
        ),
        "each length left out": [],
        "each batch left out": [],
    }
    for n in sorted({n for _, n in every})[1:-1]:
        inside = {
            (batch, one) for batch, one in every if one == n and any((batch, m) in every for m in range(n + 1, 8 * n))
        }
        found["each length left out"] += off({at: s for at, s in every.items() if at[1] != n}, inside)
    for batch in sorted({batch for batch, _ in every})[1:-1]:
        its = {at for at in every if at[0] == batch}
        found["each batch left out"] += off({at: s for at, s in every.items() if at[0] != batch}, its)
    return {part: values for part, values in found.items() if values}


@pytest.mark.parametrize("name", SHAPES)
def test_points_left_out_are_predicted_as_the_document_says(name: str) -> None:
    text = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8").splitlines()
    rows = []
    for kind in get_args(Kind):
        for part, off in differences(name, kind).items():
            within = sum(value <= 0.1 for value in off) / len(off)
            figures = f"{len(off)} | {median(off):.1%} | {max(off):.0%} | {within:.0%}"
            rows.append(f"| {name}, {kind} | {part} | {figures} |")
    missing = [row for row in rows if row not in text]
    assert not missing, "it is now\n" + "\n".join(rows)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_file_holds_what_was_measured(name: str, kind: Kind) -> None:
    hardware = Hardware.load(ROOT / "configs" / "hardware" / f"{name}-sxm.json")
    off = {
        at: abs(hardware.attention_s(kind, *SHAPES[name], *at) / seconds - 1)
        for at, seconds in known(name, kind).items()
    }
    assert max(off.values()) < 1e-3, f"{max(off, key=lambda at: off[at])}: {max(off.values()):.2%}"


def test_lines_between_points_by_hand() -> None:
    micros = {1: [1, 16, 256, 300, 400], 3: [5, 20, 260, 330, 450], 4: [7, 28, 100, 204]}
    points = Points(lengths=[16, 64, 256, 512, 1024], micros={batch: list(row) for batch, row in micros.items()})
    prefill, decode = GROWTH["prefill"], GROWTH["decode"]
    for batch, length, by_prefill, by_decode in (
        (1, 16, 1, 1),
        (1, 5, 1, 1),
        (1, 32, 4, 6),  # the mean of logarithms; a third of the way
        (2, 64, 18, 18),
        (0.5, 64, 16, 16),
        (1.5, 256, 257, 257),
        (8, 64, 56, 56),
        (8, 16, 14, 14),
        (4, 1024, 450 * 4 / 3, 7 + 197 * 1008 / 496),  # in proportion to 3; on from the first and the last of 4
    ):
        found = points.seconds(batch, length, prefill), points.seconds(batch, length, decode)
        assert found == pytest.approx((by_prefill * 1e-6, by_decode * 1e-6)), f"{batch} of {length}: {found}"


@pytest.mark.parametrize("processors", [1, 4, 32])
def test_beyond_the_longest_a_kernel_goes_on_as_it_was(processors: int) -> None:
    """Kernels that compute each sequence on one processor, or on all: both exactly, up to 16 times the length."""

    def undivided(batch: int, keys: int) -> float:
        return keys * -(-batch // processors)

    def divided(batch: int, keys: int) -> float:
        return 3.0 * batch * keys / processors

    for kernel in (undivided, divided):
        lengths = [2**power for power in range(4, 11)]
        points = Points(lengths=lengths, micros={2**p: [kernel(2**p, n) for n in lengths] for p in range(10)})
        for batch, keys in ((1, 2048), (2, 4096), (4, 16_384), (32, 16_384)):
            found = points.seconds(batch, keys, GROWTH["decode"]) * 1e6
            assert found == pytest.approx(kernel(batch, keys)), f"{kernel.__name__}({batch}, {keys})"


def test_long_prompts_near_what_pairs_alone_cost() -> None:
    """Of B n + C n^2 the first part counts for less and less: within a hundredth at 16 times the longest."""
    b, c, lengths = 3.0, 0.002, [2**power for power in range(9, 15)]
    points = Points(lengths=lengths, micros={k: [k * (b * n + c * n * n) for n in lengths] for k in (1, 2, 4, 8)})
    for more in (2, 4, 16):
        n = more * lengths[-1]
        off = points.seconds(1, n, GROWTH["prefill"]) * 1e6 / (b * n + c * n * n) - 1
        assert abs(off) < 0.01, f"{n} tokens: {off:.2%}"


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("tokens", [600, 4096, 50_000])
def test_a_polynomial_goes_through_the_length(kind: Kind, tokens: int) -> None:
    hardware = Hardware.load(ROOT / "configs" / "hardware" / "h100-sxm.json")
    for batch in (1, 13, 256):
        cost = hardware.attention_cost(kind, 8, 1, 128, batch, tokens)
        assert min(cost) >= 0
        found = cost.a + batch * tokens * (cost.b + tokens * cost.c)
        expected = hardware.attention_s(kind, 8, 1, 128, batch, tokens)
        assert found == pytest.approx(expected), f"{batch} of {tokens}: {found}, not {expected}"


@pytest.mark.parametrize(
    ("lengths", "micros", "told"),
    [
        ([16, 16, 32], {1: [1, 2, 3]}, "do not grow"),
        ([0, 16], {1: [1, 2]}, "do not grow"),
        ([16, 32], {1: [1]}, "batch 1 has 1 points at 2 lengths"),
        ([16, 32], {2: [1, 2, 3]}, "batch 2 has 3 points at 2 lengths"),
        ([16, 32], {1: [1, 0]}, "greater than 0"),
    ],
)
def test_points_that_are_none_are_refused(lengths, micros, told) -> None:
    with pytest.raises(ValidationError, match=told):
        Points(lengths=lengths, micros=micros)
