"""The picture of `fapool simulate --plot`: waiting and tokens by pool, and over time who computed and what was leased.

Knows outcomes and names, not how they came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fapool_plugin.plan.outcome import Outcome

_SPANS = 200
Array = npt.NDArray[np.float64]


def within(spans: Iterable[tuple[float, float]], edges: Array) -> Array:
    """How many of these spans of time there are, in the mean, between each two edges."""
    starts, stops = (np.sort(np.array(side, dtype=np.float64)) for side in zip(*spans, strict=True))

    def covered(ends: Array) -> Array:
        """Seconds that all before an edge have been over, or have begun."""
        sums = np.concatenate([[0.0], np.cumsum(ends)])
        before = np.searchsorted(ends, edges)
        return before * edges - sums[before]

    return np.diff(covered(starts) - covered(stops)) / np.diff(edges)


def draw(path: Path, rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome]) -> None:
    """Draws what is shown of each way, and below it, for those with a pool that is lent, how it was used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    (first, tokens), (busy, leased) = figure.subplots(2, 2)
    names = [row["name"] for row in rows]
    places = np.arange(len(names))
    for axis, what, label, unit in (
        (first, "ttft_s", "seconds to the first token", 1),
        (tokens, "tpot_s", "ms a token after it", 1e3),
    ):
        for shift, kind in ((-0.18, "short"), (0.18, "long")):
            for alpha, part in ((1.0, 0), (0.55, 1), (0.25, 2)):
                height = [unit * row[kind][what][part] for row in rows]
                share = ("50 %", "95 %", "99 %")[part]
                color = "C0" if kind == "short" else "C1"
                axis.bar(
                    places + shift, height, 0.34, color=color, alpha=alpha, label=f"{kind}, {share}", zorder=3 - part
                )
        axis.set(yscale="log", ylabel=label)
        axis.set_xticks(places, labels=names, rotation=30, ha="right")
        axis.legend(fontsize="x-small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for index, (row, found) in enumerate(zip(rows, outcomes, strict=True)):
        edges = np.linspace(0.0, found.seconds, _SPANS + 1)
        middle = (edges[1:] + edges[:-1]) / 2
        if found.busy:
            used = within(((one.start, one.stop) for one in found.busy), edges) / row["jobs"]
            busy.plot(middle, used, color=f"C{index}", linewidth=1, label=row["name"])
        if found.lent:
            lent = within(((one.start, one.stop) for one in found.lent), edges)
            leased.plot(middle, lent, color=f"C{index}", linewidth=1, label=f"{row['name']}, of {row['pool_ranks']}")
    busy.set(xlabel="seconds", ylabel="part of the bases that compute", ylim=(0, 1.05))
    leased.set(xlabel="seconds", ylabel="pool ranks under lease", ylim=(0, None))
    for axis in (busy, leased):
        if axis.get_lines():
            axis.legend(fontsize="x-small")
    figure.suptitle("Traffic, simulated by the plan", fontsize="medium")
    figure.savefig(path, dpi=110)
