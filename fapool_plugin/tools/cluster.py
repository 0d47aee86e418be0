"""What `fapool plan --hardware` shows: a pool beside a base of GPUs, and what else the same GPUs could do.

Reads the model and the hardware's file, and shows numbers as they come. How they are predicted is not known here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fapool_plugin.plan.alternatives import Outlook
from fapool_plugin.plan.cluster import Cluster, Model
from fapool_plugin.plan.hardware import Hardware, Kind

_HOMES = Path(__file__).resolve().parents[2] / "configs", Path(sys.prefix) / "share" / "fapool_plugin"
FOLDERS = tuple(home / "hardware" for home in _HOMES)
"""Where hardware's files are: in a checkout, and where a wheel puts them."""
SLOW = "between-nodes-slow"
"""The second bound of what is between nodes."""
_TWO_MATRICES = ("gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi")
_THRESHOLD_UP_TO = 1 << 18


@dataclass(frozen=True)
class Found:
    """Predictions of one kind of forward."""

    kind: Kind
    outlooks: list[Outlook]
    slow: list[Outlook | None]
    """The same over the slow bound of a link between nodes, if that was asked for."""
    thresholds: dict[int, int | None]
    """By pool ranks."""


def find_hardware(name: str) -> Hardware:
    """A file of this name among those that come with the package, or any file.

    Raises:
        ValueError: there is none; names those that are there.
        ProfileError: it is damaged.
    """
    there = {path.stem: path for folder in FOLDERS for path in folder.glob("*.json")}
    path = Path(name) if Path(name).suffix == ".json" else there.get(name)
    if path is None or not path.is_file():
        known = ", ".join(sorted(there)) or "none"
        raise ValueError(
            f"--hardware {name} is not there; there are {known}, or give a file; fapool calibrate measures the machine "
            "that it runs on"
        )
    return Hardware.load(path)


def read_model(path: Path, base: int | None) -> tuple[Model, int]:
    """The model's numbers and the base's size, from a launch's configuration or a model's config.json.

    Raises:
        OSError: there is no such file.
        ValueError: it names no model, or no size of the base and none was given.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path} is no file; give a launch's configuration or a model's config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--config {path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} holds no settings; give a launch's configuration or a model's config.json")
    model = content.get("model", content)
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [key for key in needed if not isinstance(model.get(key), int) or model[key] < 1]
    if missing:
        raise ValueError(f"--config {path} names no {', '.join(missing)} of a model; give them as whole numbers")
    ranks = base or content.get("fa_pool", {}).get("base", {}).get("tensor_parallel_size")
    if not ranks:
        raise ValueError(f"--config {path} does not say how many base ranks there are; give --base-ranks")
    hidden, layers, heads, ffn, vocab = (model[key] for key in needed)
    return Model(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=model.get("num_key_value_heads") or heads,
        head_dim=model.get("head_dim") or hidden // heads,
        intermediate=ffn,
        vocab=vocab,
        gated=model.get("model_type") not in _TWO_MATRICES,
    ), ranks


def elsewhere(tokens: int) -> list[str]:
    """What a prompt of this length, and a step of 64 such sequences, would take a larger model on GPUs: a line each.
    Nothing where the files for it are not."""
    found = [home / "models" / "llama3_8b.json" for home in _HOMES]
    if not any(path.is_file() for path in found):
        return []
    model, base = read_model(next(path for path in found if path.is_file()), 8)
    cluster, lines = Cluster(find_hardware("h100-sxm"), model, base, "same-node"), []
    kinds: tuple[tuple[Kind, int, str], ...] = (
        ("prefill", 1, f"a prompt of {tokens} tokens"),
        ("decode", 64, "a step of 64 such sequences"),
    )
    for kind, batch, what in kinds:
        row = Outlook(cluster, kind, batch, tokens, base)
        since = cluster.threshold(kind, batch, base, _THRESHOLD_UP_TO)
        assert row.pooled is not None
        lines.append(
            f"planned for Llama-3-8B on {base} H100 and {base} more as pool ranks, by public tables, not run: {what} "
            f"takes {row.alone_s * 1e3:.3g} ms alone and {row.pooled.seconds * 1e3:.3g} with the pool; attention takes "
            f"longer than all the rest {_since(since)}"
        )
    return lines


def predict(cluster: Cluster, lengths: Sequence[int], pool_ranks: Sequence[int], batch: int) -> list[Found]:
    """All lengths without a pool and with these numbers of pool ranks, a step of decode and the prefill of one
    sequence."""
    between = SLOW if cluster.link == "between-nodes" and SLOW in cluster.hardware.links else None
    kinds: tuple[Kind, ...] = ("decode", "prefill")
    found = []
    for kind in kinds:
        rows = [Outlook(cluster, kind, batch, tokens, ranks) for ranks in (0, *pool_ranks) for tokens in lengths]
        other = replace(cluster, link=between) if between else None
        slow = [Outlook(other, kind, batch, row.tokens, row.ranks) if other and row.ranks else None for row in rows]
        sequences = batch if kind == "decode" else 1
        thresholds = {ranks: cluster.threshold(kind, sequences, ranks, _THRESHOLD_UP_TO) for ranks in pool_ranks}
        found.append(Found(kind, rows, slow, thresholds))
    return found


def report(found: Sequence[Found], json_file: Path | None, plot: Path | None) -> None:
    """Shows predictions, and writes and draws them where files are named."""
    show(found)
    if json_file is not None:
        json_file.write_text(json.dumps(values(found), indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw(plot, found)


def show(found: Sequence[Found]) -> None:
    """Prints a table for each kind of forward and number of pool ranks, and what columns mean below all."""
    console, names = Console(), dict[str, None]()
    for one in found:
        for ranks in dict.fromkeys(row.ranks for row in one.outlooks):
            pairs = [(row, slow) for row, slow in zip(one.outlooks, one.slow, strict=True) if row.ranks == ranks]
            names |= dict.fromkeys(other.name for row, _ in pairs for other in row.others())
            console.print(_table(one, ranks, pairs))
            if ranks:
                console.print(f"attention > all the rest + overhead: {_since(one.thresholds[ranks])}")
            for mark in dict.fromkeys(mark for row, _ in pairs for mark in row.marks()):
                console.print(f"~ {mark}")
    console.print("\n".join([*_EXPLAINED, *(f"{_SHORT[name]}: {_OTHERS[name]}" for name in names)]), highlight=False)


def _table(found: Found, ranks: int, pairs: Sequence[tuple[Outlook, Outlook | None]]) -> Table:
    first = pairs[0][0]
    gpu, base, decode = first.cluster.hardware, first.cluster.base, found.kind == "decode"
    what = f"A decode step of {first.batch} sequences" if decode else "Prefill of one sequence"
    table_rows = []
    for row, slow in pairs:
        cells = {"tokens": f"{row.tokens}{'~' if row.marks() else ''}"}
        if not ranks:
            cells["A/L"] = f"{row.alone_s / row.linear_s - 1:.2f}"
        cells["alone"] = milliseconds(row.alone_s, row.alone_holds)
        if row.pooled:
            if decode:
                cells["whole"] = milliseconds(row.pooled.whole_s, row.memory.holds)
            cells["pool"] = milliseconds(row.pooled.seconds, row.memory.holds)
            cells["x"] = f"{row.alone_s / row.pooled.seconds:.2f}"
            if slow and slow.pooled:
                cells["slow"] = milliseconds(slow.pooled.seconds, row.memory.holds)
        cells |= {_SHORT[other.name]: milliseconds(other.seconds, other.holds) for other in row.others()}
        if not ranks:
            cells["all"] = f"{row.memory.alone / 1e9:.0f}"
        else:
            cells |= {"base": f"{row.memory.base / 1e9:.0f}", "rank": f"{row.memory.rank / 1e9:.0f}"}
        table_rows.append(cells)
    table = Table(
        *table_rows[0], box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left",
        title=f"{what}, ms\n{base} base and {ranks} pool ranks, {gpu.name}",
    )  # fmt: skip
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for cells in table_rows:
        table.add_row(*cells.values())
    return table


_SHORT = {"replicas": "repl", "ring": "ring", "ulysses": "ulys", "keys divided": "CP", "data parallel": "DP"}
_OTHERS = {
    "replicas": "a copy of the weights for each base's worth of GPUs; of a prompt, divided by copies",
    "ring": "context parallelism, a copy of the weights for each base's worth of GPUs",
    "ulysses": "the same by heads",
    "keys divided": "context parallelism, a copy of the weights for each base's worth of GPUs",
    "data parallel": "a copy of the weights on each GPU",
}
_EXPLAINED = [
    "* weights and keys of the batch do not fit: what it would take if they did",
    "A/L: attention over all the rest, alone",
    "whole: in one part; pool: the best way, in turns too; x: alone / pool",
    "slow: pool, over the slow bound of a link between nodes",
    "all: GB of a base rank that keeps every key; base, rank: GB with kv_home pool",
]


def milliseconds(seconds: float, holds: bool) -> str:
    """With a star where it does not fit into memory."""
    return (f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}") + ("" if holds else "*")


def _since(length: int | None) -> str:
    return f"not up to {_THRESHOLD_UP_TO} tokens" if length is None else f"from {length} tokens on"


def about(cluster: Cluster) -> dict[str, Any]:
    """What is planned on, as plain JSON values."""
    return {
        "hardware": cluster.hardware.model_dump(mode="json", exclude={"attention", "gemm", "all_reduce"}),
        "model": asdict(cluster.model),
        "base_ranks": cluster.base,
        "link": cluster.link,
        "ask_s": cluster.ask_s,
        "oversubscription": cluster.oversubscription,
    }


def values(found: Sequence[Found]) -> dict[str, Any]:
    """Predictions and what they were made of, as plain JSON values."""
    return about(found[0].outlooks[0].cluster) | {
        "plans": [
            {
                "kind": one.kind,
                "thresholds": one.thresholds,
                "rows": [
                    {
                        "tokens": row.tokens,
                        "batch": row.rows,
                        "pool_ranks": row.ranks,
                        "alone_s": row.alone_s,
                        "alone_holds": row.alone_holds,
                        "linear_s": row.linear_s,
                        "pooled": asdict(row.pooled) if row.pooled else None,
                        "slow_link": asdict(slow.pooled) if slow and slow.pooled else None,
                        "memory": row.memory._asdict(),
                        "others": [other._asdict() for other in row.others()],
                        "marks": row.marks(),
                    }
                    for row, slow in zip(one.outlooks, one.slow, strict=True)
                ],
            }
            for one in found
        ],
    }


def draw(path: Path, found: Sequence[Found]) -> None:
    """Draws times over length, one picture for each kind; what does not fit into memory is hollow, what is
    extrapolated dotted."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for axis, one in zip(figure.subplots(1, len(found)), found, strict=True):
        most = max(row.ranks for row in one.outlooks)
        first = [row for row in one.outlooks if row.ranks == most]
        lines: dict[str, list[tuple[Outlook, float, bool]]] = {
            f"{first[0].cluster.base} base ranks alone": [(row, row.alone_s, row.alone_holds) for row in first]
        }
        for row in one.outlooks:
            if row.pooled:
                label = f"with {row.ranks} pool ranks"
                lines.setdefault(label, []).append((row, row.pooled.seconds, row.memory.holds))
        for row in first:
            for other in row.others():
                label = f"{other.name}, {row.cluster.base + row.ranks} GPUs"
                lines.setdefault(label, []).append((row, other.seconds, other.holds))
        for index, (label, points) in enumerate(lines.items()):
            style, color = "--" if "GPUs" in label else "-", f"C{index}" if index else "k"
            axis.plot([row.tokens for row, _, _ in points], [s * 1e3 for _, s, _ in points], ":", color=color)
            known = [(float(row.tokens), s * 1e3) for row, s, _ in points if not row.marks()]
            axis.plot(*zip(*known or [(nan, nan)], strict=True), style, color=color, label=label)
            for holds in (True, False):
                some = [(row.tokens, s * 1e3) for row, s, held in points if held == holds]
                if some:
                    face = color if holds else "none"
                    axis.plot(*zip(*some, strict=True), "o", color=color, markerfacecolor=face)
        what = f"Decode step, batch {first[0].batch}" if one.kind == "decode" else "Prefill of one sequence"
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=f"{what}, predicted")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks([row.tokens for row in first], labels=[str(row.tokens) for row in first], rotation=45)
        axis.minorticks_off()
        axis.legend(fontsize="x-small")
    figure.supxlabel("hollow: does not fit into memory; dotted: extrapolated", fontsize="small")
    figure.savefig(path, dpi=110)
