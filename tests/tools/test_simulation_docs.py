"""Tables of docs/simulation.md that are the planner's, row by row what it gives today."""

from __future__ import annotations

from pathlib import Path

import pytest

from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.training import Training
from fapool_plugin.tools.cluster import find_hardware, read_model

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8").splitlines()


def model(name: str):
    return read_model(ROOT / "configs" / "models" / f"{name}.json", 8)[0]


@pytest.mark.parametrize("tokens", [4096, 16_384, 32_768, 65_536, 131_072])
def test_a_training_step(tokens: int) -> None:
    made = Cluster(find_hardware("h100-sxm"), model("llama3_8b"), 4, "between-nodes")
    step = Training(made, 2, tokens, 4, recompute=True)
    assert step.pooled is not None
    others = {one.name: one.seconds for one in step.others()}
    star = "" if step.holds else " *"
    cells = [
        f"{tokens:,}",
        f"{step.alone_s / step.linear_s - 1:.2f}",
        f"{step.alone_s * 1e3:.0f}{star}",
        f"{step.pooled.seconds * 1e3:.0f}{star}",
        f"{step.alone_s / step.pooled.seconds:.2f}",
        *(f"{others[name] * 1e3:.0f}" for name in ("replicas", "ring")),
        f"{step.alone_bytes / 1e9:.0f}",
    ]
    row = f"| {' | '.join(cells)} |"
    assert row in LINES, f"it is now {row}"
