"""What came out of a benchmark: medians, spread and speed-ups, as a table, as JSON and as a picture.

Numbers are reported as they came. How they were measured is not known here.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fapool_plugin.tools.bench.contenders import Contender

_WIDTH = 100
"""Characters of the table in a file or a pipe."""


@dataclass
class Result:
    """What one contender did, turn by turn."""

    contender: Contender
    seconds: list[float] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    refused: str | None = None
    """Why this peer has no numbers."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that its processes have had, if that is known."""
        return max((facts["peak_bytes"] for facts in self.facts if "peak_bytes" in facts), default=None)


@dataclass(frozen=True)
class Report:
    """A finished benchmark; the first result is the baseline, and a speed-up is its seconds over another's."""

    bench: str
    options: dict[str, Any]
    unit: str
    """What takes the seconds: "a prompt"."""
    results: list[Result]

    def speedups(self, result: Result) -> list[float]:
        """Over the baseline, turn by turn: both were measured one shortly after the other."""
        pairs = zip(self.results[0].seconds, result.seconds, strict=True)
        return [baseline / seconds for baseline, seconds in pairs]

    def ceiling(self, result: Result) -> float | None:
        """What its threads allow over the baseline; where only attention is shared, no more than the time of all the
        rest allows. What says itself how fast it could be at best is believed. None for the baseline itself."""
        baseline = self.results[0]
        if result is baseline:
            return None
        if result.facts and "least_s" in result.facts[0]:
            return baseline.median_s / statistics.median(facts["least_s"] for facts in result.facts)
        threads = min(result.contender.working_threads, max(os.cpu_count() or 1, baseline.contender.working_threads))
        by_threads = threads / baseline.contender.working_threads
        attention = [facts["attention_s"] for facts in baseline.facts if "attention_s" in facts]
        if result.contender.claims != "pooled" or len(attention) < len(baseline.seconds):
            return by_threads
        return min(by_threads, baseline.median_s / (baseline.median_s - statistics.median(attention)))

    def show(self) -> None:
        """Prints the table; peers that refused stand below it."""
        table = Table("", f"seconds, {self.unit}", "speed-up", "at most", "peak GB")
        for column in table.columns[1:]:
            column.justify = "right"
        for result in self._measured():
            ceiling = self.ceiling(result)
            table.add_row(
                result.contender.label,
                _shown(result.seconds, 2 if result.median_s >= 10 else 4),
                _shown(self.speedups(result), 3),
                "" if ceiling is None else f"{ceiling:.2f}",
                "" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.2f}",
            )
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, _WIDTH)
        console.print(table)
        console.print("median (smallest to largest); speed-ups are over the first line, turn by turn", highlight=False)
        for note in self._notes():
            console.print(note, markup=False, highlight=False, soft_wrap=True)

    def _notes(self) -> Iterable[str]:
        for result in self.results:
            label, facts = result.contender.label, result.facts
            if result.refused is not None:
                yield f"{label}: refused: {result.refused}"
            elif result.contender.claims is None and "pooled_calls" in facts[0]:
                pooled, local = (sum(fact[key] for fact in facts) for key in ("pooled_calls", "local_calls"))
                yield f"{label}: {pooled} of {pooled + local} attention calls were pooled"

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        contenders = []
        for result in self.results:
            contender = result.contender
            values: dict[str, Any] = {
                "label": contender.label,
                "threads": contender.threads,
                "processes": contender.processes,
                "pool_threads": contender.pool_threads,
                "refused": result.refused,
            }
            if result.refused is None:
                values["seconds"] = _spread(result.seconds) | {"turns": result.seconds}
                values["speedup"] = _spread(self.speedups(result))
                values["ceiling"] = self.ceiling(result)
                values["peak_bytes"] = result.peak_bytes
                values["facts"] = result.facts
            contenders.append(values)
        about = {"bench": self.bench, "options": self.options, "unit": self.unit, "machine": _machine()}
        return about | {"contenders": contenders}

    def write(self, path: Path) -> None:
        """Writes :meth:`as_dict`."""
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def draw(self, path: Path) -> None:
        """A bar for each median, a dot for each turn, and a line at the best time that the ceiling allows."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        measured = list(self._measured())
        figure = Figure(figsize=(8.0, 1.2 + 0.5 * len(measured)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.barh(
            range(len(measured)), [result.median_s for result in measured], height=0.6, color="tab:blue", alpha=0.5
        )
        for row, result in enumerate(measured):
            axes.plot(result.seconds, [row] * len(result.seconds), "k.", markersize=5)
            ceiling = self.ceiling(result)
            if ceiling is not None:
                best = self.results[0].median_s / ceiling
                axes.plot([best, best], [row - 0.3, row + 0.3], color="tab:red")
        axes.set_yticks(range(len(measured)), [result.contender.label for result in measured])
        axes.invert_yaxis()
        axes.set_xlabel(f"seconds, {self.unit} (bar: median; dots: turns; red: what the ceiling allows)")
        axes.set_title(f"{self.bench}: " + ", ".join(f"{key} {value}" for key, value in self.options.items()))
        figure.savefig(path)

    def _measured(self) -> Iterable[Result]:
        return (result for result in self.results if result.refused is None)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _shown(values: list[float], digits: int) -> str:
    median, smallest, largest = (f"{value:.{digits}f}" for value in _spread(values).values())
    return f"{median} ({smallest} to {largest})"


def _machine() -> dict[str, Any]:
    """Where and when it ran, and how busy the machine was."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "transformers", "deepspeed")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()),
        "python": platform.python_version(),
        "fapool": sys.modules["fapool_plugin"].__version__,
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
