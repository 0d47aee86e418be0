"""`fapool simulate`: traffic on planned GPUs, with a pool and without, as one table.

Reads or draws arrivals and shows what came of them. What forwards take is the planner's, how requests are served is
``plan.traffic``'s.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from math import ceil, inf
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fapool_plugin.plan.arrivals import Request, arrivals
from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.jobs import Setting
from fapool_plugin.plan.lending import Wear
from fapool_plugin.plan.outcome import Outcome, percentiles
from fapool_plugin.plan.speeds import Divided, Planned, Speeds
from fapool_plugin.plan.traffic import simulate as serve
from fapool_plugin.tools.cluster import find_hardware, read_model
from fapool_plugin.tools.options import check_counts, check_output, check_picture, numbers, one_line_errors
from fapool_plugin.tools.traffic_plot import draw

_MOST_REQUESTS = 10_000_000
"""They take memory before they are served."""


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
    seed: Annotated[int, typer.Option(help="The same gives the same requests and losses.")] = 0,
    pools: Annotated[int, typer.Option(help="Pools of --pool-ranks each, which jobs are divided among.")] = 1,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Hours after which a pool rank is lost, in the mean; default: never.")
    ] = None,
    restart_s: Annotated[float, typer.Option(help="Seconds until a lost rank is there again.")] = 60.0,
    base_mtbf_hours: Annotated[
        float | None,
        typer.Option(help="The same of each GPU of a base, which takes its job with it; default: never."),
    ] = None,
    base_restart_s: Annotated[float, typer.Option(help="Seconds until a lost base is there again.")] = 300.0,
    detect_s: Annotated[
        float, typer.Option(help="Seconds until a loss is known; a process that ends is known at once.")
    ] = 0.0,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Long prompts wait for ranks, no longer than those would save."),
    ] = False,
    joins: Annotated[
        str | None, typer.Option(help="Ranks that come to each pool later, such as 600:8 for 8 after 600 seconds.")
    ] = None,
    leaf_gpus: Annotated[
        int | None, typer.Option(help="GPUs under each leaf switch; default: all are under the same.")
    ] = None,
    oversubscription: Annotated[
        float, typer.Option(help="NICs for each link out of a leaf switch: between leaves flows get so much less.")
    ] = 1.0,
    chunk: Annotated[int, typer.Option(help="Tokens of a prompt between two steps; 0: whole prompts.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw percentiles, and over time who computes and what is leased.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Simulate traffic on a cluster of GPUs, by its plan: waiting, tokens and GPU hours, for each size of the pool.

    Exit codes: 0 done, 2 an error.
    """
    with one_line_errors():
        check_counts({
            "--base-ranks": base_ranks, "--jobs": jobs, "--lease": lease, "--threshold": threshold, "--pools": pools,
            "--leaf-gpus": leaf_gpus,
        })  # fmt: skip
        check_output(json_file)
        check_picture(plot)
        if not (0 < rate < inf and 0 < seconds < inf and 0 <= long_part <= 1 and 1 <= bursts < inf):
            raise ValueError(
                f"--rate {rate}, --seconds {seconds}, --long-part {long_part}, --bursts {bursts}: give numbers above "
                "0, a part of 0 to 1 and bursts of at least 1"
            )
        if trace is None and rate * seconds > _MOST_REQUESTS:
            raise ValueError(
                f"--rate {rate} for --seconds {seconds} is {rate * seconds:.3g} requests; give at most "
                f"{_MOST_REQUESTS:.0e}"
            )
        wear, later = _wear("", mtbf_hours, restart_s, seed, detect_s), read_joins(joins)
        base_wear = _wear("base-", base_mtbf_hours, base_restart_s, seed, detect_s)
        if not 1 <= oversubscription < inf or (oversubscription > 1 and leaf_gpus is None):
            raise ValueError(
                f"--oversubscription is {oversubscription}: give at least 1, and --leaf-gpus, the GPUs under each leaf"
            )
        if chunk < 0:
            raise ValueError(f"--chunk is {chunk}; give at least 0")
        sizes = numbers("--pool-ranks", pool_ranks, least=0)
        model, ranks = read_model(config, base_ranks)
        cluster = Cluster(find_hardware(hardware), model, ranks, link)
        if trace is not None:
            requests = read_trace(trace)
        else:
            requests = arrivals(rate, seconds, seed, long_part=long_part, bursts=bursts)
        common: dict[str, Any] = {"threshold": threshold, "chunk": chunk, "base": ranks, "base_wear": base_wear}
        if leaf_gpus is not None:
            common["leaf"] = leaf_gpus
        rows, outcomes = [], []
        for pool in sizes:
            most = pool + sum(count for _, count in later if pool)
            asked = min(most, lease or max(1, pool // ceil(jobs / pools)))
            joining = later if pool else ()
            elastic = Setting(jobs, pool, asked, pools=pools, joins=joining, wear=wear, waits=wait, **common)
            ways = [
                (str(pool), elastic, Planned(cluster, oversubscription)),
                *others(elastic, cluster, oversubscription),
            ]
            for name, setting, speeds in ways:
                began = time.perf_counter()
                found = serve(requests, setting, speeds)
                made = figures(found, setting)
                outcomes.append(found)
                rows.append({"name": name} | made | {"simulated_in_s": time.perf_counter() - began})
        show(rows, f"{len(requests)} requests, {jobs} job(s) of {ranks} {cluster.hardware.name}")
        if plot is not None:
            draw(plot, rows, outcomes)
        if json_file is not None:
            what = {"jobs": jobs, "base_ranks": ranks, "threshold": threshold, "link": link, "model": asdict(model)}
            what |= {"pools_of_ranks": pools, "mtbf_hours": mtbf_hours, "restart_s": restart_s, "joins": later}
            what |= {"base_mtbf_hours": base_mtbf_hours, "base_restart_s": base_restart_s, "detect_s": detect_s}
            what |= {"leaf_gpus": leaf_gpus, "oversubscription": oversubscription, "chunk": chunk, "wait": wait}
            json_file.write_text(json.dumps(what | {"pools": rows}, indent=1) + "\n", encoding="utf-8")


def others(elastic: Setting, cluster: Cluster, oversubscription: float) -> list[tuple[str, Setting, Speeds]]:
    """What else the GPUs of this pool could do: ranks of one job each, bases more, or context parallelism in each job
    for every prompt. Only where there are enough of them. A job on more GPUs is lost more often."""
    base, whole = cluster.base, elastic.pool * elastic.pools
    each, found = elastic.each, list[tuple[str, Setting, Speeds]]()
    alone = replace(elastic, pool=0, lease=0, joins=(), pools=1, leaf=1 << 40)
    if each:
        fixed = replace(elastic, lease=each, fixed=True, joins=())
        found.append((f"{elastic.pool} fixed", fixed, Planned(cluster, oversubscription)))
    if whole >= base:
        more = replace(alone, jobs=elastic.jobs + whole // base)
        found.append((f"{elastic.pool} as bases", more, Planned(cluster)))
    if each >= base:
        groups = 1 + each // base
        found.append((f"{elastic.pool} as CP", replace(alone, base=groups * base), Divided(cluster, groups)))
    return found


def _wear(whose: str, mtbf_hours: float | None, restart_s: float, seed: int, detect_s: float) -> Wear:
    if not 0 <= detect_s < inf:
        raise ValueError(f"--detect-s is {detect_s}; give at least 0")
    if mtbf_hours is None:
        return Wear()
    if not (0 < restart_s < mtbf_hours * 3600 < inf and detect_s <= restart_s):
        raise ValueError(
            f"--{whose}mtbf-hours {mtbf_hours}, --{whose}restart-s {restart_s}, --detect-s {detect_s}: give numbers "
            "above 0, and a time to restart that is shorter than the mean time between losses and no shorter than the "
            "time until a loss is known"
        )
    return Wear(mtbf_hours * 3600, restart_s, seed, detect_s)


def read_joins(text: str | None) -> tuple[tuple[float, int], ...]:
    """Ranks that come later, as (when, how many). Raises ValueError for other text."""
    found = []
    for part in text.split(",") if text else ():
        try:
            at, ranks = part.split(":")
            found.append((float(at), int(ranks)))
        except ValueError:
            found.append((-1.0, 0))
        if not 0 <= found[-1][0] < inf or found[-1][1] < 1:
            raise ValueError(f"--joins {text}: {part!r} is no time with a number of ranks; give such as 600:8,1200:8")
    return tuple(found)


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
            request = Request(float(values["at_s"]), _whole(values["prompt"]), _whole(values["new"]))
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


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no whole number")
    return value


def figures(found: Outcome, setting: Setting) -> dict[str, Any]:
    """What is shown of a simulation, as plain JSON values; percentiles are of 50, 95 and 99 %."""
    pool = setting.pool * setting.pools
    later = setting.pools * sum(ranks * max(0.0, found.seconds - at) for at, ranks in setting.joins)
    pool_s, leased_s = pool * found.seconds + later, found.leased_s
    tokens = sum(one.request.new for one in found.served)
    hours = setting.jobs * setting.base * found.seconds / 3600
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
        "grown": found.grown,
        "unleased": found.unleased,
        "waited_s": found.waited_s,
        "base_losses": found.base_losses,
        "losses": found.losses,
        "replays": found.replays,
        "evicted": found.evicted,
        "lost_s": found.lost_s,
        "seconds": found.seconds,
        "tokens_per_s": tokens / found.seconds if found.seconds else 0.0,
        "bases_busy": found.base_busy_s / (setting.jobs * found.seconds) if found.seconds else 0.0,
        "pool_leased": leased_s / pool_s if pool_s else 0.0,
        "gpu_hours_per_million": {
            "whole_pool": (hours + pool_s / 3600) / max(1, tokens) * 1e6,
            "leased": (hours + (pool_s if setting.fixed else leased_s) / 3600) / max(1, tokens) * 1e6,
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
        "fixed: each job has its part of the pool for good; as bases: its GPUs are more jobs; as CP: each job divides",
        "every prompt and all keys over its part of them. Both need copies of the weights",
        "busy: bases' time; leased: the pool's; GPU h: of bases and leased ranks for a million new tokens",
    ]
    lines += [
        f"{row['name']}: {row['refused']} refused, {row['unleased']} long ones found no ranks, {_told(row)}"
        f"simulated in {row['simulated_in_s']:.1f} s"
        for row in rows
    ]
    Console().print("\n".join(lines), highlight=False)


def _told(row: dict[str, Any]) -> str:
    """What only some simulations have."""
    told = {
        f"{row['waited_s']:.1f} s waited for ranks": row["waited_s"],
        f"{row['base_losses']} base(s) lost": row["base_losses"],
        f"{row['losses']} ranks lost, {row['lost_s']:.1f} s of jobs lost by it": row["losses"],
        f"{row['replays']} replays": row["replays"],
    }
    return "".join(f"{what}, " for what, there in told.items() if there)
