"""docs/simulation.md's tables of what others measured: what is planned for the same, recomputed row by row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fapool_plugin.plan.alternatives import Outlook
from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.hardware import Hardware, Kind
from fapool_plugin.tools.cluster import find_hardware, read_model

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8")


def rows_after(comment: str) -> list[list[str]]:
    """Cells of the table below a comment."""
    found = re.search(rf"<!-- {comment} -->\n\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT)
    assert found, f"no table below {comment}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def cluster(hardware: Hardware, model: str, gpus: int) -> Cluster:
    return Cluster(hardware, read_model(ROOT / "configs" / "models" / f"{model}.json", gpus)[0], gpus, "same-node")


def forward_rows(hardware: Hardware) -> list[list[str]]:
    """Planned and planned over measured, written anew."""
    made = []
    for source, model, gpus, forward, measured, *_ in rows_after("published: a100-sxm"):
        name, batch, _, length = forward.split()
        kind: Kind = "prefill" if name == "prefill" else "decode"
        on, rows, tokens = cluster(hardware, model, int(gpus)), int(batch), int(length.replace(",", ""))
        seconds = on.alone_s(kind, rows, tokens)
        planned = f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
        off = seconds * 1e3 / float(measured.replace(",", ""))
        made.append([source, model, gpus, forward, measured, planned, f"{off:.2f}"])
    return made


def context_rows(hardware: Hardware) -> list[list[str]]:
    """Of each length a prompt with tensor parallelism on all GPUs, and what context parallelism on them changes."""
    made = []
    for model, gpus, groups, *cells in rows_after("context parallelism: h100-sxm"):
        lengths = [256 * 2**power for power in range(len(cells))]
        each = int(gpus) // int(groups)
        whole, part = cluster(hardware, model, int(gpus)), cluster(hardware, model, each)
        changes = []
        for tokens in lengths:
            outlook = Outlook(part, "prefill", 1, tokens, int(gpus) - each)
            ring = {other.name: other.seconds for other in outlook.others()}["ring"]
            changes.append(f"{ring / whole.alone_s('prefill', 1, tokens) - 1:+.0%}")
        made.append([model, gpus, groups, *changes])
    return made


@pytest.mark.parametrize(
    ("hardware", "comment", "made"),
    [
        ("a100-sxm", "published: a100-sxm", forward_rows),
        ("h100-sxm", "context parallelism: h100-sxm", context_rows),
    ],
)
def test_planned_times_are_the_planners(hardware, comment, made) -> None:
    found = made(find_hardware(hardware))
    text = "\n".join(f"| {' | '.join(row)} |" for row in found)
    assert rows_after(comment) == found, f"it is now\n{text}"


def test_what_is_planned_is_near_what_engines_took() -> None:
    """Forwards that keep a GPU busy: no more than a quarter off, and never slower than planned by much."""
    rows = [(row, float(row[-1])) for row in rows_after("published: a100-sxm")]
    large = [(row, off) for row, off in rows if row[3].startswith("decode") or not row[3].endswith(" 128")]
    assert len(large) > 15
    off = max(large, key=lambda at: abs(at[1] - 1))
    assert abs(off[1] - 1) < 0.27, f"{off[0]}"
