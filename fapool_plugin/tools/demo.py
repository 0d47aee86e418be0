"""What a generation run looks like: progress on the screen, its numbers as a table and as JSON, and the demo.

Numbers are shown as they came; nothing is measured here, and what computes them is not known.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich import progress as bars
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from fapool_plugin.config import FAPoolConfig

if TYPE_CHECKING:
    from fapool_plugin.integrations.huggingface.runs import Job, Run


class Screen:
    """Progress on stderr: a spinner and the time while the end is not known, a bar when it is.

    Where stderr is no terminal, one line for each stage.
    """

    def __init__(self, console: Console | None = None) -> None:
        # The stream itself: it goes on showing while a library's own output is held back.
        self.console = console or Console(file=sys.stderr)
        self._bars = bars.Progress(
            bars.SpinnerColumn(),
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TextColumn("{task.fields[count]}"),
            bars.TimeElapsedColumn(),
            console=self.console,
            # The cores belong to the model.
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self._task: bars.TaskID | None = None
        self._stage = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_stage()
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Shows that ``done`` of ``total`` of ``stage`` is done; a new stage ends the one before."""
        if stage != self._stage:
            self._end_stage()
            self._stage, self._task = stage, self._bars.add_task(stage, total=total, count="")
            if self._bars.disable:
                self.console.print(f"{stage} ...", markup=False, highlight=False)
        if self._task is not None and total is not None:
            self._bars.update(self._task, completed=done, total=total, count=f"{done}/{total}")

    def _end_stage(self) -> None:
        if self._task is not None:
            seen = max(1.0, self._bars.tasks[-1].completed) if self._bars.tasks else 1.0
            self._bars.update(self._task, completed=seen, total=seen)


def execute(job: Job, config: FAPoolConfig, *, compare: bool) -> tuple[Run, Run | None]:
    """Runs ``job`` with the pool and then, if ``compare``, without it in the same process. Plain attention gets the
    threads of base and pool together, as far as there are cores: what its user would have without the plugin."""
    from fapool_plugin.integrations.huggingface.runs import plain_run, pooled_run

    with Screen() as screen:
        run = pooled_run(job, config, screen)
        together = max(run.threads, min(run.threads + run.pool_threads, os.cpu_count() or 1))
        return run, plain_run(replace(job, threads=together), screen) if compare else None


def show(run: Run, reference: Run | None) -> None:
    """Prints the numbers of a run, and of the run it is compared with, as a table."""
    table = Table("", "fapool", *(["plain sdpa"] if reference else []))
    for column in table.columns[1:]:
        column.justify = "right"
    runs = [run, reference] if reference else [run]
    stats = run.stats or {}

    def pooled(key: str) -> str:
        calls = stats[key]
        return f"{calls['pooled_calls']} / {calls['local_calls']}"

    if reference:
        table.add_row("tokens identical", "yes" if run.tokens == reference.tokens else "no")
    table.add_row("prompt + new tokens", *(f"{r.prompt_tokens} + {len(r.tokens)}" for r in runs))
    table.add_row("time to first token", *(f"{r.ttft_s:.2f} s" for r in runs))
    if stats["activations"]:
        table.add_row("  of it, getting the ranks", f"{_activation_s(stats):.2f} s")
    table.add_row("time per further token", *(_milliseconds(r.tpot_s) for r in runs))
    table.add_row("prefill calls, pooled / local", pooled("prefill"))
    table.add_row("decode calls, pooled / local", pooled("decode"))
    table.add_row("activations / releases", f"{stats['activations']} / {stats['releases']}")
    table.add_row("faults", str(stats["faults"]))
    table.add_row("bytes sent / received", f"{decimal(stats['bytes_sent'])} / {decimal(stats['bytes_received'])}")
    table.add_row(
        "threads, lent to the pool", f"{run.threads}, {run.pool_threads}", *(str(r.threads) for r in runs[1:])
    )
    Console().print(table)


def explain(run: Run, reference: Run | None, config: FAPoolConfig) -> int:
    """Says what the table cannot: why nothing was pooled, where tokens differ. Returns the exit code."""
    from fapool_plugin.integrations.huggingface.runs import first_difference

    stats = run.stats or {}
    longest = run.prompt_tokens + len(run.tokens) - 1
    if config.enabled and not stats["prefill"]["pooled_calls"] + stats["decode"]["pooled_calls"]:
        why = f"no forward was longer than the threshold ({longest} <= {stats['threshold']} tokens)"
        if longest > stats["threshold"]:
            told = [*stats["local_reasons"], *(e["reason"] for e in stats["events"] if e["kind"] == "fault")]
            why = "; ".join(told) or "see the events in stats()"
        print(f"note: nothing was pooled: {why}", file=sys.stderr)
    if reference is None:
        return 0
    if config.pool == "local" and run.pool_threads and reference.threads >= (os.cpu_count() or 1):
        print(
            f"note: fapool's {run.threads} thread(s), {run.pool_threads} of them lent to the pool, have the same "
            f"{os.cpu_count()} core(s) as plain sdpa: the same work on the same cores, so equal times are the best "
            "there is here. Pool ranks pay on cores or devices that the model does not have: `fapool plan "
            "--pool-ranks 1,2,4` tells from which length on",
            file=sys.stderr,
        )
    index = first_difference(run.tokens, reference.tokens)
    if index is None:
        return 0
    ours, theirs = (_token(tokens, index) for tokens in (run.tokens, reference.tokens))
    print(
        f"fapool: the answers differ from new token {index} on: fapool {ours}, plain sdpa {theirs}",
        file=sys.stderr,
    )
    return 1


def result(run: Run, reference: Run | None) -> dict[str, Any]:
    """A run, and the one it is compared with, as plain JSON values."""
    values: dict[str, Any] = {
        "tokens": run.tokens,
        "text": run.text,
        "prompt_tokens": run.prompt_tokens,
        "ttft_s": run.ttft_s,
        "tpot_s": run.tpot_s,
        "threads": {"base": run.threads, "pool": run.pool_threads},
        "stats": run.stats,
    }
    if reference is not None:
        values["reference"] = {
            "tokens": reference.tokens,
            "text": reference.text,
            "ttft_s": reference.ttft_s,
            "tpot_s": reference.tpot_s,
            "threads": reference.threads,
        }
        values["identical"] = run.tokens == reference.tokens
    return values


def write_result(path: Path, run: Run, reference: Run | None) -> None:
    """Writes :func:`result` to ``path``."""
    path.write_text(json.dumps(result(run, reference), indent=1) + "\n", encoding="utf-8")


def demo_job(tokens: int, max_new_tokens: int, threads: int, cache: Path | None) -> Job:
    """Fetches the demo model if it is not cached, and gives it a prompt of ``tokens`` tokens of real text.

    Raises:
        DemoModelError: the model cannot be had.
        ValueError: there is no room, or no text, for so many tokens.
    """
    from fapool_plugin.integrations.huggingface.runs import demo_model, demo_prompt, prepare

    with Screen() as screen:
        model = demo_model(cache, screen)
        job = prepare(
            str(model),
            demo_prompt(),
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=tokens,
            dtype="float32",
            threads=threads,
        )
    if len(job.prompt_S) < tokens:
        raise ValueError(f"the demo text has only {len(job.prompt_S)} tokens; give --tokens of at most that")
    return job


def _activation_s(stats: dict[str, Any]) -> float:
    """Seconds between asking for ranks and having them, of every activation together."""
    seconds, asked = 0.0, None
    for event in stats["events"]:
        moment = datetime.fromisoformat(event["time"])
        if event["kind"] == "active" and asked is not None:
            seconds += (moment - asked).total_seconds()
        asked = moment if event["kind"] == "activating" else None if event["kind"] == "active" else asked
    return seconds


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _token(tokens: list[int], index: int) -> str:
    return f"has token {tokens[index]}" if index < len(tokens) else f"has ended after {len(tokens)} tokens"
