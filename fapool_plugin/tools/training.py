"""What `fapool plan --hardware ... --train` shows: a training step with a pool, and what else the same GPUs could do.

Shows numbers as they come. How they are predicted is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.training import Training
from fapool_plugin.tools.cluster import about, milliseconds

_SHORT = {"replicas": "repl", "ring": "ring", "data parallel": "DP"}
ASSUMED = "backward is twice a forward's products and 2.5 times its attention"
_EXPLAINED = [
    "* does not fit into a base rank's memory: what it would take if it did",
    "A/L: attention over all the rest, alone; x: alone / pool",
    "GB: a base rank's: weights, gradients, optimizer's state, activations; pool or not",
    "repl: copies of all that on as many bases; ring: the same, context parallel",
    "DP: a copy on each GPU",
    f"assumed: {ASSUMED}",
]


def predict(
    cluster: Cluster, lengths: Sequence[int], pool_ranks: Sequence[int], batch: int, recompute: bool
) -> list[Training]:
    """All lengths without a pool and with these numbers of pool ranks."""
    return [Training(cluster, batch, tokens, ranks, recompute) for ranks in (0, *pool_ranks) for tokens in lengths]


def report(found: Sequence[Training], json_file: Path | None) -> None:
    """Shows predictions, and writes them where a file is named."""
    console = Console()
    for ranks in dict.fromkeys(row.ranks for row in found):
        rows = [row for row in found if row.ranks == ranks]
        console.print(_table(rows))
        for mark in dict.fromkeys(mark for row in rows for mark in row.marks()):
            console.print(f"~ {mark}")
    again = ["activations recomputed: two forwards and a backward"] if found[0].recompute else []
    console.print("\n".join([*again, *_EXPLAINED]), highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(values(found), indent=1) + "\n", encoding="utf-8")


def _table(rows: Sequence[Training]) -> Table:
    first = rows[0]
    lines = []
    for row in rows:
        cells = {"tokens": f"{row.tokens}{'~' if row.marks() else ''}", "A/L": f"{row.alone_s / row.linear_s - 1:.2f}"}
        cells["alone"] = milliseconds(row.alone_s, row.holds)
        if row.pooled:
            cells |= {
                "pool": milliseconds(row.pooled.seconds, row.holds),
                "x": f"{row.alone_s / row.pooled.seconds:.2f}",
            }
        cells |= {_SHORT[other.name]: milliseconds(other.seconds, other.holds) for other in row.others()}
        lines.append(cells | {"GB": f"{row.alone_bytes / 1e9:.0f}"})
    table = Table(
        *lines[0], box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left",
        title=f"Training, sequences: {first.batch}, ms\n"
        f"{first.cluster.base} base and {first.ranks} pool ranks, {first.cluster.hardware.name}",
    )  # fmt: skip
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for cells in lines:
        table.add_row(*cells.values())
    return table


def values(found: Sequence[Training]) -> dict[str, Any]:
    """Predictions and what they were made of, as plain JSON values."""
    return about(found[0].cluster) | {
        "kind": "training",
        "recompute": found[0].recompute,
        "assumed": ASSUMED,
        "rows": [
            {
                "tokens": row.tokens,
                "batch": row.batch,
                "pool_ranks": row.ranks,
                "alone_s": row.alone_s,
                "linear_s": row.linear_s,
                "holds": row.holds,
                "base_bytes": row.alone_bytes,
                "pooled": asdict(row.pooled) if row.pooled else None,
                "others": [other._asdict() for other in row.others()],
                "marks": row.marks(),
            }
            for row in found
        ],
    }
