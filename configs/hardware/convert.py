"""Makes the hardware files of this folder from the tables of the wheel `aiconfigurator-core` 0.12.0.

    python -m venv .venv-tables && .venv-tables/bin/pip install pyarrow numpy pydantic
    PYTHONPATH=. .venv-tables/bin/python configs/hardware/convert.py aiconfigurator_core-0.12.0-*.whl

The wheel is read as a zip; it need not be installed. A file holds all points that were measured. To see how well they
predict what lies between and beyond, tables are also made without some: without lengths above 8,192 and batches 64 and
512, a rule that was fixed before anything was predicted (`held out` in a file's `errors`), then without each length and
each batch in turn (`left out`). Of several rows for one point the median counts. Knows the tables; what is planned with
them is not known here.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as parquet

from fapool_plugin.plan.attention_table import GROWTH, AttentionTable, Kind, Points
from fapool_plugin.plan.hardware import GemmTable, Hardware, Link

WHEEL = "aiconfigurator-core 0.12.0"
DATE = "2026-11-29"
LONGEST_KEPT = 8192
HELD_OUT_BATCHES = {64, 512}
SHORTEST = 16
COMPARED_FROM: dict[Kind, int] = {"prefill": 512, "decode": 128}
"""Shorter calls are little but their launch."""
HEADS = {1, 2, 4, 8, 16, 32, 64}
"""Others are scaled by their lanes."""
GIB = 1 << 30

# What is read of which GPU: folder, attention and GEMM of vLLM, the kernel, NCCL's version, what links are said to do.
SYSTEMS: dict[str, dict[str, Any]] = {
    "a100-sxm": {"folder": "a100_sxm", "vllm": "0.14.0", "kernel": "vllm_flash_attn", "nccl": "2.27.3"},
    "h100-sxm": {"folder": "h100_sxm", "vllm": "0.24.0", "kernel": "vllm_flash_attn_fa3", "nccl": "2.29.2"},
    "h200-sxm": {"folder": "h200_sxm", "vllm": "0.24.0", "kernel": "vllm_flash_attn_fa3", "nccl": "2.29.2"},
}
LINKS: dict[str, dict[str, Link]] = {
    "a100-sxm": {
        "same-node": Link(bytes_per_s=228e9, latency_s=8e-6, source="Vidur (MIT), measured on one A100 cluster"),
        "between-nodes": Link(bytes_per_s=25e9, latency_s=10e-6, source=f"{WHEEL}, a100_sxm.yaml, assumed"),
    },
    "h100-sxm": {
        "same-node": Link(bytes_per_s=450e9, latency_s=10e-6, source=f"{WHEEL}, h100_sxm.yaml, assumed"),
        "between-nodes": Link(bytes_per_s=50e9, latency_s=10e-6, source=f"{WHEEL}, h100_sxm.yaml, assumed"),
    },
}
LINKS["h200-sxm"] = LINKS["h100-sxm"]
SLOW = Link(bytes_per_s=7.8e9, latency_s=24e-6, source="Vidur (MIT), measured between nodes of one A100 cluster")
# gpu: and misc: of the wheel's systems/*.yaml.
MEMORY = {"a100-sxm": (80 * GIB, 2.039e12), "h100-sxm": (80 * GIB, 3.35e12), "h200-sxm": (141 * GIB, 4.8e12)}
RESERVE = 3758096384 + 411041792

Measured = dict[tuple[int, int], float]
"""Seconds by (batch, tokens)."""


def rows(wheel: zipfile.ZipFile, path: str) -> list[dict[str, Any]]:
    table = parquet.read_table(io.BytesIO(wheel.read(f"aiconfigurator_core/systems/data/{path}")))
    return list(table.to_pylist())


def measured(table: list[dict[str, Any]], kernel: str) -> dict[tuple[int, int, int], Measured]:
    """Of (heads, KV heads, head dim), bf16 without a window."""
    found: dict[tuple[int, int, int], dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in table:
        heads, kv_heads = row["num_heads"], row["num_key_value_heads"]
        plain = row["kv_cache_dtype"] == row["attn_dtype"] == "bfloat16" and not row.get("window_size")
        length = row["isl"] + row["step"]
        at_hand = {heads, kv_heads} <= HEADS and row["head_dim"] in (64, 128) and length >= SHORTEST
        if plain and at_hand and row["kernel_source"] == kernel:
            found[heads, kv_heads, row["head_dim"]][row["batch_size"], length].append(float(row["latency"]) / 1e3)
    return {shape: {at: statistics.median(all_) for at, all_ in points.items()} for shape, points in found.items()}


def points_of(known: Measured) -> Points:
    """Raises ValueError where a batch lacks a length that is shorter than its longest."""
    lengths = sorted({length for _, length in known})
    micros: dict[int, list[float]] = {}
    for batch in sorted({batch for batch, _ in known}):
        its = [length for length in lengths if (batch, length) in known]
        if its != lengths[: len(its)]:
            raise ValueError(f"batch {batch} was measured at {its} of {lengths}")
        if len(its) > 1:
            micros[batch] = [float(f"{known[batch, length] * 1e6:.4g}") for length in its]
    return Points(lengths=lengths, micros=micros)


def differences(known: Measured, kind: Kind) -> dict[str, list[float]]:
    """Relative differences of what is predicted for points that the table has, and for points that it lacks."""
    found: dict[str, list[float]] = defaultdict(list)

    def compare(part: str, kept: Iterable[tuple[int, int]], asked: Iterable[tuple[int, int]]) -> None:
        points = points_of({at: known[at] for at in kept})
        for batch, length in asked:
            if length >= COMPARED_FROM[kind]:
                seconds = points.seconds(batch, length, GROWTH[kind])
                found[part].append(abs(seconds / known[batch, length] - 1))

    compare("in this file", known, [at for at in known if at[0] in points_of(known).micros])
    held = [(batch, n) for batch, n in known if n <= LONGEST_KEPT and batch not in HELD_OUT_BATCHES]
    compare("batches 64 and 512 held out", held, [at for at in known if at[0] in HELD_OUT_BATCHES])
    longer = [(batch, n) for batch, n in known if n > LONGEST_KEPT and batch not in HELD_OUT_BATCHES]
    compare("8k to 16k held out", held, [at for at in longer if at[1] <= 2 * LONGEST_KEPT])
    compare("16k to 131k held out", held, [at for at in longer if at[1] > 2 * LONGEST_KEPT])
    few = max(batch * n for batch, n in known) // 4
    kept = [(batch, n) for batch, n in known if batch * n <= few]
    compare("4 times as many in all held out", kept, [at for at in known if at[0] * at[1] > few])
    batches, lengths = (sorted({at[axis] for at in known}) for axis in range(2))
    longest = {batch: max(n for one, n in known if one == batch) for batch in batches}
    for left in lengths[1:-1]:
        inside = [at for at in known if at[1] == left < longest[at[0]]]
        compare("each length left out", [at for at in known if at[1] != left], inside)
    for left in batches[1:-1]:
        compare("each batch left out", [at for at in known if at[0] != left], [at for at in known if at[0] == left])
    return {part: values for part, values in found.items() if values}


def summary(all_: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each kind how many points, the median, 95 %, the largest, and the part that is at most 10 % off."""
    return {
        kind: {
            "points": len(values),
            "median": round(statistics.median(values), 4),
            "p95": round(sorted(values)[int(0.95 * (len(values) - 1))], 4),
            "largest": round(max(values), 4),
            "within 10 %": round(sum(value <= 0.1 for value in values) / len(values), 4),
        }
        for kind, values in sorted(all_.items())
    }


def products(table: list[dict[str, Any]]) -> dict[tuple[int, int, int], float]:
    """Seconds of [m, k] x [k, n] in bf16, of sides that models have."""
    return {
        (row["m"], row["n"], row["k"]): float(row["latency"]) / 1e3
        for row in table
        if row["gemm_dtype"] == "bfloat16" and min(row["n"], row["k"]) >= 128 and max(row["n"], row["k"]) <= 16_384
    }


def gemm(known: dict[tuple[int, int, int], float]) -> GemmTable:
    """Of those m that are a power of two or a multiple of 16; others, a tile's first rows, are compared with."""
    m, n, k = (sorted({at[axis] for at in known}) for axis in range(3))
    m = [rows for rows in m if rows & (rows - 1) == 0 or rows % 16 == 0]
    micros = [[[float(f"{known[i, j, o] * 1e6:.4g}") for o in k] for j in n] for i in m]
    return GemmTable(m=m, n=n, k=k, micros=micros)


def gemm_errors(known: dict[tuple[int, int, int], float]) -> dict[str, list[float]]:
    """Of products with an m between those that the file holds, and with each side left out in turn."""
    found: dict[str, list[float]] = defaultdict(list)

    def compare(part: str, made: GemmTable, points: Iterable[tuple[int, int, int]]) -> None:
        found[part] += [abs(made.seconds(*at) / known[at] - 1) for at in points]

    made = gemm(known)
    compare("m between", made, [at for at in known if at[0] not in made.m])
    for axis, name in enumerate("mnk"):
        for side in getattr(made, name)[1:-1]:
            without = {at: seconds for at, seconds in known.items() if at[axis] != side}
            its = [at for at in known if at[axis] == side and at[0] in made.m]
            compare(f"each {name} left out", gemm(without), its)
    return {part: values for part, values in found.items() if values}


def convert(wheel: zipfile.ZipFile, name: str) -> Hardware:
    what = SYSTEMS[name]
    folder, version = what["folder"], what["vllm"]
    paths = {
        "prefill": f"{folder}/attention/vllm/{version}/context_attention_perf.parquet",
        "decode": f"{folder}/attention/vllm/{version}/generation_attention_perf.parquet",
        "gemm": f"{folder}/gemm/vllm/{version}/gemm_perf.parquet",
        "all_reduce": f"{folder}/comm/nccl/{what['nccl']}/nccl_perf.parquet",
    }
    tables = {kind: rows(wheel, path) for kind, path in paths.items()}
    known: dict[Kind, dict[tuple[int, int, int], Measured]]
    known = {kind: measured(tables[kind], what["kernel"]) for kind in get_args(Kind)}
    attention, off = [], {kind: defaultdict[str, list[float]](list) for kind in known}
    for heads, kv_heads, head_dim in sorted(known["prefill"].keys() & known["decode"].keys()):
        its = {kind: of[heads, kv_heads, head_dim] for kind, of in known.items()}
        prefill, decode = (points_of(its[kind]) for kind in get_args(Kind))
        attention.append(
            AttentionTable(heads=heads, kv_heads=kv_heads, head_dim=head_dim, prefill=prefill, decode=decode)
        )
        for kind, points in its.items():
            for part, values in differences(points, kind).items():
                off[kind][part] += values
    reduced: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in tables["all_reduce"]:
        if row["op_name"] == "all_reduce" and row["nccl_dtype"] == "half":
            # A message's size is in elements there.
            reduced[row["num_gpus"]].append((2.0 * row["message_size"], float(row["latency"]) / 1e3))
    memory, bandwidth = MEMORY[name]
    return Hardware(
        name=name,
        device=tables["gemm"][0]["device"],
        source=f"{WHEEL} (PyPI): {', '.join(paths.values())}",
        licence="Apache-2.0",
        date=DATE,
        measured=[
            f"attention of {what['kernel']} in bf16, up to 16,384 tokens (prefill) and 131,072 keys (decode)",
            "products of matrices in bf16",
            "all-reduces in fp16 within a node",
        ],
        extrapolated=[
            "longer sequences by how the kernel grows with as much work, larger batches in proportion",
            "norms, rotary embedding and activation: bytes over 0.8 of memory bandwidth, and 3 us each",
            "links between nodes",
        ],
        errors={kind: summary(values) for kind, values in off.items()}
        | {"gemm": summary(gemm_errors(products(tables["gemm"])))},
        memory_bytes=memory,
        reserve_bytes=RESERVE,
        memory_bytes_per_s=bandwidth,
        attention=attention,
        gemm=gemm(products(tables["gemm"])),
        all_reduce={gpus: sorted(points) for gpus, points in sorted(reduced.items())},
        links=LINKS[name] | {"between-nodes-slow": SLOW},
    )


def main() -> None:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        for name in SYSTEMS:
            made = convert(wheel, name)
            path = Path(__file__).with_name(f"{name}.json")
            made.save(path)
            print(name, len(made.attention), "shapes,", path.stat().st_size, "bytes", json.dumps(made.errors, indent=1))


if __name__ == "__main__":
    main()
