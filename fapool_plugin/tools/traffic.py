"""`fapool simulate`: traffic on planned GPUs, with a pool and without, as one table.

Reads or draws arrivals and shows what came of them. What forwards take is the planner's, how requests are served is
``plan.traffic``'s.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.traffic import Outcome, Planned, Request, Setting, arrivals, percentiles
from fapool_plugin.plan.traffic import simulate as serve
from fapool_plugin.tools.cluster import find_hardware, read_model
from fapool_plugin.tools.options import check_counts, check_output, numbers, one_line_errors


def simulate(
    hardware: Annotated[str, typer.Option(help="The GPUs, such as h100-sxm: a name in configs/hardware, or a file.")],
    config: Annotated[Path, typer.Option(help="A launch's configuration, or a model's config.json.")],
    base_ranks: Annotated[int | None, typer.Option(help="GPUs of each job; default: the configuration's.")] = None,
    jobs: Annotated[int, typer.Option(help="Jobs, each with a base of its own.")] = 1,
    pool_ranks: Annotated[str, typer.Option(help="Ranks of the pool that jobs share, each simulated.")] = "0,8",
    lease: Annotated[
        int | None, typer.Option(help="Ranks that a job leases at a time; default: the pool over the jobs.")
    ] = None,
    threshold: Annotated[int, typer.Option(help="Longer prompts lease ranks.")] = 16_384,
    link: Annotated[str, typer.Option(help="Where the pool is.")] = "between-nodes",
    trace: Annotated[
        Path | None, typer.Option(help="JSON lines with at_s, prompt and new; default: drawn by the options below.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, of all jobs.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="How long they come.")] = 600.0,
    long_part: Annotated[float, typer.Option(help="Part of them with 16,384 to 131,072 tokens.")] = 0.05,
    bursts: Annotated[float, typer.Option(help="Requests that come at once, in the mean.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same gives the same requests.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Simulate traffic on a cluster of GPUs, by its plan: waiting, tokens and GPU hours, for each size of the pool.

    Exit codes: 0 done, 2 an error.
    """
    with one_line_errors():
        check_counts({"--base-ranks": base_ranks, "--jobs": jobs, "--lease": lease, "--threshold": threshold})
        check_output(json_file)
        if rate <= 0 or seconds <= 0 or not 0 <= long_part <= 1 or bursts < 1:
            raise ValueError(
                f"--rate {rate}, --seconds {seconds}, --long-part {long_part}, --bursts {bursts}: give numbers above "
                "0, a part of 0 to 1 and bursts of at least 1"
            )
        sizes = numbers("--pool-ranks", pool_ranks, least=0)
        model, ranks = read_model(config, base_ranks)
        speeds = Planned(Cluster(find_hardware(hardware), model, ranks, link))
        if trace is not None:
            requests = read_trace(trace)
        else:
            requests = arrivals(rate, seconds, seed, long_part=long_part, bursts=bursts)
        rows = []
        for pool in sizes:
            asked = min(pool, lease or max(1, pool // jobs))
            settings = [(str(pool), Setting(jobs, pool, asked, threshold))]
            if pool >= ranks:
                settings.append((f"{pool} as bases", Setting(jobs + pool // ranks, 0, 0, threshold)))
            for name, setting in settings:
                began = time.perf_counter()
                made = figures(serve(requests, setting, speeds), setting, ranks)
                rows.append({"name": name} | made | {"simulated_in_s": time.perf_counter() - began})
        show(rows, f"{len(requests)} requests, {jobs} job(s) of {ranks} {speeds.cluster.hardware.name}")
        if json_file is not None:
            what = {"jobs": jobs, "base_ranks": ranks, "threshold": threshold, "link": link, "model": asdict(model)}
            json_file.write_text(json.dumps(what | {"pools": rows}, indent=1) + "\n", encoding="utf-8")


def read_trace(path: Path) -> list[Request]:
    """Requests of a file of JSON lines.

    Raises:
        OSError: there is no such file.
        ValueError: a line has other fields or values; says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--trace {path} is no file; give JSON lines with at_s, prompt and new")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            request = Request(float(values["at_s"]), int(values["prompt"]), int(values["new"]))
        except (ValueError, KeyError, TypeError, OverflowError):
            request = Request(-1, 0, 0)
        if not 0 <= request.at_s < float("inf") or request.prompt < 1 or request.new < 1:
            raise ValueError(
                f"--trace {path}, line {number}: {line[:80]!r} is no request; give such as "
                '{"at_s": 0.5, "prompt": 4096, "new": 128}, no time below 0 and at least a token each'
            )
        found.append(request)
    if not found:
        raise ValueError(f"--trace {path} has no line; give a request on each")
    return found


def figures(found: Outcome, setting: Setting, base_ranks: int) -> dict[str, Any]:
    """What is shown of a simulation, as plain JSON values; percentiles are of 50, 95 and 99 %."""
    pool = setting.pool
    tokens = sum(one.request.new for one in found.served)
    hours = setting.jobs * base_ranks * found.seconds / 3600
    kinds = {
        kind: {
            "requests": len(ones),
            "ttft_s": percentiles([one.first_s for one in ones]),
            "tpot_s": percentiles([one.token_s for one in ones if one.request.new > 1]),
        }
        for kind, ones in (
            ("short", [one for one in found.served if not one.long]),
            ("long", [one for one in found.served if one.long]),
        )
    }
    return {
        "jobs": setting.jobs,
        "pool_ranks": pool,
        "lease": setting.lease,
        **kinds,
        "refused": found.refused,
        "leases": found.leases,
        "unleased": found.unleased,
        "seconds": found.seconds,
        "tokens_per_s": tokens / found.seconds if found.seconds else 0.0,
        "bases_busy": found.base_busy_s / (setting.jobs * found.seconds) if found.seconds else 0.0,
        "pool_leased": found.leased_s / (pool * found.seconds) if pool and found.seconds else 0.0,
        "gpu_hours_per_million": {
            "whole_pool": (hours + pool * found.seconds / 3600) / max(1, tokens) * 1e6,
            "leased": (hours + found.leased_s / 3600) / max(1, tokens) * 1e6,
        },
    }


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Prints a line for each size of the pool."""
    names = ("pool", "TTFT", "long", "TPOT", "long", "tokens/s", "busy", "leased", "GPU h")
    table = Table(*names, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        cells = [row["name"]]
        for what, unit in (("ttft_s", 1), ("tpot_s", 1000)):
            for kind in ("short", "long"):
                p50, _, p99 = (unit * value for value in row[kind][what])
                cells.append(f"{p50:.2f} {p99:.1f}" if unit == 1 else f"{p50:.0f} {p99:.0f}")
        cells += [f"{row['tokens_per_s']:.0f}", f"{row['bases_busy']:.0%}", f"{row['pool_leased']:.0%}"]
        table.add_row(*cells, f"{row['gpu_hours_per_million']['leased']:.1f}")
    Console().print(table)
    lines = [
        "TTFT in seconds and TPOT in ms, 50 % and 99 %; long: prompts of more than --threshold tokens",
        "as bases: no pool, its GPUs are more jobs, with copies of the weights",
        "busy: bases' time; leased: the pool's; GPU h: of bases and leased ranks for a million new tokens",
    ]
    lines += [
        f"{row['name']}: {row['refused']} refused, {row['unleased']} long ones found no ranks, "
        f"simulated in {row['simulated_in_s']:.1f} s"
        for row in rows
    ]
    Console().print("\n".join(lines), highlight=False)
