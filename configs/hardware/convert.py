"""Makes the hardware files of this folder from the tables of the wheel `aiconfigurator-core` 0.12.0.

    python -m venv .venv-tables && .venv-tables/bin/pip install pyarrow numpy pydantic
    PYTHONPATH=. .venv-tables/bin/python configs/hardware/convert.py aiconfigurator_core-0.12.0-*.whl

The wheel is read as a zip; it need not be installed. To see how well fits predict, each is first made without lengths
above 8,192 and without batches 64 and 512, a rule that was fixed before anything was fitted: `held out` in a file's
`errors`. What the file holds is then fitted to all lengths, the two batches still left out. Of several rows for one
point the median counts. Knows the tables; what is planned with them is not known here.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from fapool_plugin.plan.hardware import AttentionTable, Hardware, Kind
from fapool_plugin.plan.profile import Fit, least_squares

WHEEL = "aiconfigurator-core 0.12.0"
DATE = "2026-11-29"
LONGEST_FITTED = 8192
LONGEST = 1 << 17
HELD_OUT_BATCHES = {64, 512}
FEWEST_POINTS = 3
PREFILL_FROM, DECODE_FROM = 512, 128
HEADS = {1, 2, 4, 8, 16, 32, 64}
"""Others are scaled by their lanes."""
GEMM_SIDES = [128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
GIB = 1 << 30

# What is read of which GPU: folder, attention and GEMM of vLLM, the kernel, NCCL's version, what links are said to do.
SYSTEMS: dict[str, dict[str, Any]] = {
    "a100-sxm": {"folder": "a100_sxm", "vllm": "0.14.0", "kernel": "vllm_flash_attn", "nccl": "2.27.3"},
    "h100-sxm": {"folder": "h100_sxm", "vllm": "0.24.0", "kernel": "vllm_flash_attn_fa3", "nccl": "2.29.2"},
    "h200-sxm": {"folder": "h200_sxm", "vllm": "0.24.0", "kernel": "vllm_flash_attn_fa3", "nccl": "2.29.2"},
}
LINKS: dict[str, dict[str, dict[str, Any]]] = {
    "a100-sxm": {
        "same-node": {"bytes_per_s": 228e9, "latency_s": 8e-6, "source": "Vidur (MIT), measured on one A100 cluster"},
        "between-nodes": {"bytes_per_s": 25e9, "latency_s": 10e-6, "source": f"{WHEEL}, a100_sxm.yaml, assumed"},
    },
    "h100-sxm": {
        "same-node": {"bytes_per_s": 450e9, "latency_s": 10e-6, "source": f"{WHEEL}, h100_sxm.yaml, assumed"},
        "between-nodes": {"bytes_per_s": 50e9, "latency_s": 10e-6, "source": f"{WHEEL}, h100_sxm.yaml, assumed"},
    },
}
LINKS["h200-sxm"] = LINKS["h100-sxm"]
SLOW = {"bytes_per_s": 7.8e9, "latency_s": 24e-6, "source": "Vidur (MIT), measured between nodes of one A100 cluster"}
# gpu: and misc: of the wheel's systems/*.yaml.
MEMORY = {"a100-sxm": (80 * GIB, 2.039e12), "h100-sxm": (80 * GIB, 3.35e12), "h200-sxm": (141 * GIB, 4.8e12)}
RESERVE = 3758096384 + 411041792

Points = dict[tuple[int, int], float]
"""Seconds by (batch, tokens)."""


def rows(wheel: zipfile.ZipFile, path: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    table = parquet.read_table(io.BytesIO(wheel.read(f"aiconfigurator_core/systems/data/{path}")))
    return list(table.to_pylist())


def attention_points(table: list[dict[str, Any]], kernel: str) -> dict[tuple[int, int, int], Points]:
    """Seconds of (heads, KV heads, head dim), bf16 without a window."""
    found: dict[tuple[int, int, int], dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in table:
        heads, kv_heads = row["num_heads"], row["num_key_value_heads"]
        plain = row["kv_cache_dtype"] == row["attn_dtype"] == "bfloat16" and not row.get("window_size")
        if plain and row["kernel_source"] == kernel and {heads, kv_heads} <= HEADS and row["head_dim"] in (64, 128):
            at = row["batch_size"], row["isl"] + row["step"]
            found[heads, kv_heads, row["head_dim"]][at].append(float(row["latency"]) / 1e3)
    return {shape: {at: statistics.median(all_) for at, all_ in points.items()} for shape, points in found.items()}


def fits(points: Points, first: int, powers: tuple[int, ...], longest: int) -> dict[int, Fit]:
    """A fit for each batch that has points enough."""
    found = {}
    for batch in sorted({batch for batch, _ in points} - HELD_OUT_BATCHES):
        known = [(n, s) for (b, n), s in sorted(points.items()) if b == batch and first <= n <= longest]
        if len(known) >= FEWEST_POINTS:
            fit = least_squares(known, powers)
            found[batch] = Fit(**{key: float(f"{getattr(fit, key):.4g}") for key in ("a", "b", "c", "error")})
    return found


def table_of(shape: tuple[int, int, int], prefill: Points, decode: Points, longest: int) -> AttentionTable:
    """Fits of one shape up to so many tokens. Decode reads its keys once, so it has no square."""
    most: dict[Kind, int] = {
        "prefill": max(batch * n for batch, n in prefill),
        "decode": max(batch * n for batch, n in decode),
    }
    return AttentionTable(
        heads=shape[0],
        kv_heads=shape[1],
        head_dim=shape[2],
        prefill=fits(prefill, PREFILL_FROM, (0, 1, 2), longest),
        decode=fits(decode, DECODE_FROM, (0, 1), longest),
        most=most,
    )


def differences(table: AttentionTable, points: Points, first: int, kind: Kind) -> dict[str, list[float]]:
    """Relative differences of what is predicted, for what was fitted and what was not."""
    found: dict[str, list[float]] = defaultdict(list)
    most = max(getattr(table, kind))
    for (batch, n), seconds in sorted(points.items()):
        if n < first:
            continue
        off = abs(table.fit(kind, batch).at(n) / seconds - 1)
        if batch in HELD_OUT_BATCHES or batch > most:
            found["batches held out"].append(off)
        elif n > LONGEST_FITTED:
            found["up to 16k held out" if n <= 2 * LONGEST_FITTED else "longer held out"].append(off)
        else:
            found["up to 8k"].append(off)
    return found


def summary(all_: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each kind how many points, the median, 95 % and the largest."""
    return {
        kind: {
            "points": len(values),
            "median": round(statistics.median(values), 4),
            "p95": round(sorted(values)[int(0.95 * (len(values) - 1))], 4),
            "largest": round(max(values), 4),
        }
        for kind, values in sorted(all_.items())
    }


def gemm(table: list[dict[str, Any]]) -> dict[str, Any]:
    known: dict[tuple[int, int, int], float] = {}
    for row in table:
        if row["gemm_dtype"] == "bfloat16" and row["n"] in GEMM_SIDES and row["k"] in GEMM_SIDES:
            known[row["m"], row["n"], row["k"]] = float(row["latency"]) * 1e3
    sizes = sorted({m for m, _, _ in known} & {2**power for power in range(18)} | {m for m, _, _ in known if m > 8192})
    full = [m for m in sizes if all((m, n, k) in known for n in GEMM_SIDES for k in GEMM_SIDES)]
    micros = [[[float(f"{known[m, n, k]:.3g}") for k in GEMM_SIDES] for n in GEMM_SIDES] for m in full]
    return {"m": full, "n": GEMM_SIDES, "k": GEMM_SIDES, "micros": micros}


def gemm_errors(made: Hardware, table: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of products between those that the file holds: m, n or k not in it."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in table:
        m, n, k = row["m"], row["n"], row["k"]
        inside = m <= made.gemm.m[-1] and min(n, k) >= GEMM_SIDES[0] and max(n, k) <= 16384
        if row["gemm_dtype"] != "bfloat16" or not inside:
            continue
        between = [m not in made.gemm.m, n not in GEMM_SIDES or k not in GEMM_SIDES]
        kind = {(True, False): "m between", (False, True): "n or k between"}.get(tuple(between))
        if kind:
            found[kind].append(abs(made.gemm_s(m, n, k) / (float(row["latency"]) / 1e3) - 1))
    return found


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
    prefill, decode = (attention_points(tables[kind], what["kernel"]) for kind in ("prefill", "decode"))
    attention, off = [], {kind: defaultdict[str, list[float]](list) for kind in ("prefill", "decode")}
    kinds: tuple[tuple[Kind, dict[tuple[int, int, int], Points], int], ...]
    kinds = (("prefill", prefill, PREFILL_FROM), ("decode", decode, DECODE_FROM))
    for shape in sorted(prefill.keys() & decode.keys()):
        tried, kept = (table_of(shape, prefill[shape], decode[shape], most) for most in (LONGEST_FITTED, LONGEST))
        attention.append(kept)
        for kind, points, first in kinds:
            for part, values in differences(tried, points[shape], first, kind).items():
                off[kind][part] += values
            for part, values in differences(kept, points[shape], first, kind).items():
                if part != "batches held out":
                    off[kind]["in this file"] += values
    reduced: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in tables["all_reduce"]:
        if row["op_name"] == "all_reduce" and row["nccl_dtype"] == "half":
            # A message's size is in elements there.
            reduced[row["num_gpus"]].append((2.0 * row["message_size"], float(row["latency"]) / 1e3))
    memory, bandwidth = MEMORY[name]
    made = Hardware(
        name=name,
        device=tables["gemm"][0]["device"],
        source=f"{WHEEL} (PyPI): {', '.join(paths.values())}",
        licence="Apache-2.0",
        date=DATE,
        measured=[
            f"attention of {what['kernel']} in bf16, fitted over {PREFILL_FROM} to 16,384 tokens (prefill) and "
            f"{DECODE_FROM} to 131,072 keys (decode)",
            "products of matrices in bf16",
            "all-reduces in fp16 within a node",
        ],
        extrapolated=[
            "longer sequences, and larger batches than the table's, by the fit of the largest",
            "norms, rotary embedding and activation: bytes over 0.8 of memory bandwidth, and 3 us each",
            "links between nodes",
        ],
        errors={kind: summary(values) for kind, values in off.items()},
        memory_bytes=memory,
        reserve_bytes=RESERVE,
        memory_bytes_per_s=bandwidth,
        attention=attention,
        gemm=gemm(tables["gemm"]),
        all_reduce={gpus: sorted(points) for gpus, points in sorted(reduced.items())},
        links=LINKS[name] | {"between-nodes-slow": SLOW},
    )
    return made.model_copy(update={"errors": made.errors | {"gemm": summary(gemm_errors(made, tables["gemm"]))}})


def main() -> None:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        for name in SYSTEMS:
            made = convert(wheel, name)
            path = Path(__file__).with_name(f"{name}.json")
            made.save(path)
            print(name, len(made.attention), "shapes,", path.stat().st_size, "bytes", json.dumps(made.errors, indent=1))


if __name__ == "__main__":
    main()
