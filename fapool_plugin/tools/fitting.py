"""What `fapool plan --kv-home pool` shows: the largest batches and lengths whose keys fit, by number of pool ranks.

Asks the machine for what is free; how keys are cut is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fapool_plugin.config import MIB
from fapool_plugin.observe.available_memory import left_for_job, left_for_process
from fapool_plugin.plan.memory import Room, largest_batch, longest
from fapool_plugin.plan.profile import Shape


@dataclass(frozen=True)
class Fitting:
    """What fits, by number of pool ranks; 0: the base alone."""

    batch: int
    rank_mib: int
    base_mib: int
    batches: dict[int, dict[int, int]]
    """The largest batch, by ranks and tokens."""
    longest: dict[int, int]
    """Tokens of each of ``batch`` sequences, by ranks."""


def outlook(
    shape: Shape, lengths: Sequence[int], batch: int, pool_ranks: Sequence[int], rank_mib: int, base_mib: int | None
) -> Fitting:
    """Counts what fits."""
    if base_mib is None:
        weights = shape.parameters * shape.element_bytes
        base_mib = max(0, min(left_for_job(), left_for_process()) - weights) // MIB
    rooms = {ranks: Room([rank_mib * MIB] * ranks, base_mib * MIB) for ranks in (0, *pool_ranks)}
    batches = {
        ranks: {tokens: largest_batch(shape, tokens, room) for tokens in lengths} for ranks, room in rooms.items()
    }
    return Fitting(batch, rank_mib, base_mib, batches, {at: longest(shape, batch, room) for at, room in rooms.items()})


def report(found: Fitting, json_file: Path | None) -> None:
    """Prints one table, a line for each number of pool ranks, and writes its numbers where a file is named."""
    lengths = list(next(iter(found.batches.values())))
    last = f"longest, batch {found.batch}"
    table = Table(
        "ranks", *map(str, lengths), last, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        title="Largest batch by tokens of each sequence, keys on base and pool",
    )  # fmt: skip
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for ranks, batches in found.batches.items():
        table.add_row(str(ranks), *map(str, batches.values()), str(found.longest[ranks]))
    table.caption = (
        f"each pool rank holds {found.rank_mib} MiB of keys (--memory-limit-mib), the base {found.base_mib} MiB "
        "(--base-memory-mib); 0 ranks: the base alone"
    )
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
