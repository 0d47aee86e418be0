"""``fapool pool``: a standing pool on Ray, made, looked at, made larger or smaller, and ended.

Says what was done and what stands. How ranks are placed and what they do is not known here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fapool_plugin.config import MIB, FAPoolConfig, FAPoolConfigError
from fapool_plugin.observe.prometheus import HOST, of_standing_ranks, serve
from fapool_plugin.ranks import directory as standing
from fapool_plugin.tools.options import check_counts, one_line_errors

_LOOK_S = 0.2
_WATCH_S = 1.0
app = typer.Typer(help="A standing pool on Ray, whose ranks jobs share.", no_args_is_help=True)


class Strategy(StrEnum):
    """How Ray spreads ranks over nodes."""

    spread = "SPREAD"
    pack = "DEFAULT"


Name = Annotated[str, typer.Argument(help="The pool's name.")]
Address = Annotated[
    str | None, typer.Option("--ray-address", help="The Ray cluster's address; default: the one on this machine.")
]


@app.command()
def up(
    name: Annotated[str, typer.Option(help="The pool's name: `pool_name` in the settings of jobs.")] = "fapool",
    ranks: Annotated[int, typer.Option(help="How many ranks.")] = 1,
    ray_address: Address = None,
    threads_per_rank: Annotated[int, typer.Option(help="CPU threads that each computes with.")] = 1,
    memory_limit_mib: Annotated[int, typer.Option(help="MiB of keys and values that each may hold.")] = 2048,
    gpus: Annotated[float, typer.Option(help="GPUs of each, fractions too; 0: it computes on the CPU.")] = 0.0,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE that a rank's node must have; repeatable.")] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(help="A label of nodes: a job takes ranks that have it alike first; repeatable, narrowest first."),
    ] = None,
    strategy: Annotated[Strategy, typer.Option(help="Over many nodes, or as Ray packs them.")] = Strategy.spread,
    link_key_file: Annotated[
        Path | None, typer.Option(help="On every node, with the key by which jobs on other machines come.")
    ] = None,
    start_timeout_s: Annotated[float, typer.Option(help="Seconds to wait for ranks to stand.")] = 120.0,
) -> None:
    """Make a standing pool on a Ray cluster.

    Where none runs, one of this machine alone is started, and this command stays until it is interrupted, or until
    `fapool pool down`. Exit codes: 0 done, 2 an error.
    """
    with one_line_errors():
        check_counts({"--ranks": ranks, "--threads-per-rank": threads_per_rank, "--memory-limit-mib": memory_limit_mib})
        labels = dict(_label(text) for text in label or ())
        key_file = str(link_key_file.resolve()) if link_key_file is not None else None
        settings = FAPoolConfig(
            pool="ray", pool_ranks=ranks, pool_name=name, threads_per_rank=threads_per_rank,
            memory_limit_mib=memory_limit_mib, link_key_file=key_file,
        )  # fmt: skip
        ray, is_ours = _cluster(ray_address, ranks * threads_per_rank)
        if there := standing.standing(ray, name):
            raise FAPoolConfigError(f"pool {name} stands already, with {len(there)} ranks: fapool pool scale {name} N")
        wanted = standing.Request(
            threads_per_rank, gpus, memory_limit_mib * MIB, labels, strategy.value, tuple(domain or ())
        )
        standing.add(ray, name, range(ranks), settings, wanted)
        _wait(ray, name, ranks, start_timeout_s)
        if is_ours:
            typer.echo(f"a Ray cluster of this machine runs as long as this command: fapool pool down {name} ends both")
            _while_it_stands(ray, name)
            _end(ray, name, standing.standing(ray, name), 0.0)
            ray.shutdown()


@app.command()
def status(
    name: Name = "fapool",
    ray_address: Address = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until it is interrupted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with all that ranks say.")] = False,
    prometheus: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="Serve the figures on this port (0: any), until the pool is down."),
    ] = None,
) -> None:
    """Say what each rank of a pool does. Exit codes: 0 done, 2 an error, as where there is no such pool."""
    with one_line_errors(ModuleNotFoundError):
        if watch + as_json + (prometheus is not None) > 1:
            raise ValueError("give one of --watch, --json and --prometheus")
        ray = standing.join(ray_address)
        ranks = _ranks(ray, name)
        if as_json:
            typer.echo(json.dumps({"pool": name, "ranks": ranks}, indent=1))
        elif prometheus is not None:
            with serve(lambda: _ranks(ray, name), prometheus, of_standing_ranks) as server:
                typer.echo(f"http://{HOST}:{server.port}/metrics")
                _while_it_stands(ray, name)
        elif watch:
            with suppress(KeyboardInterrupt), Live(_table(ranks), refresh_per_second=2) as live:
                while True:
                    time.sleep(_WATCH_S)
                    live.update(_table(_ranks(ray, name)))
        else:
            Console().print(_table(ranks))


@app.command()
def scale(
    name: Name,
    ranks: Annotated[int, typer.Argument(help="How many ranks there are to be.")],
    ray_address: Address = None,
    patience_s: Annotated[float, typer.Option(help="Seconds that a rank which leaves may finish its lease.")] = 60.0,
    start_timeout_s: Annotated[float, typer.Option(help="Seconds to wait for ranks to stand.")] = 120.0,
) -> None:
    """Make a pool larger, or smaller: those that leave finish their lease first. Exit codes: 0 done, 2 an error."""
    with one_line_errors():
        check_counts({"RANKS": ranks})
        ray = standing.join(ray_address)
        there = _there(ray, name)
        if ranks < len(there):
            _end(ray, name, dict(list(there.items())[ranks:]), patience_s)
        elif ranks > len(there):
            answers = standing.told(ray, there).values()
            made_as = next((one for one in answers if one["state"] != standing.OTHER), None)
            if made_as is None:
                raise FAPoolConfigError(
                    f"no rank of pool {name} and of this version answers: fapool pool down {name}, and up again"
                )
            settings, wanted = FAPoolConfig.load(made_as["settings"]), standing.Request(**made_as["wanted"])
            free = (number for number in range(ranks) if number not in there)
            standing.add(ray, name, free, settings, wanted)
        _wait(ray, name, ranks, start_timeout_s)


@app.command()
def down(
    name: Name = "fapool",
    ray_address: Address = None,
    patience_s: Annotated[float, typer.Option(help="Seconds that ranks may finish their leases.")] = 0.0,
) -> None:
    """End a pool. Exit codes: 0 done, 2 an error."""
    with one_line_errors():
        ray = standing.join(ray_address)
        _end(ray, name, _there(ray, name), patience_s)


def _label(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign and value):
        raise ValueError(f"--label {text} is no KEY=VALUE")
    return key, value


def _cluster(address: str | None, cpus: int) -> tuple[Any, bool]:
    """(Ray, whether the cluster was started here and ends with this process). Such a one has room for ``cpus``."""
    try:
        return standing.join(address), False
    except standing.NoCluster:
        if address is not None:
            raise
        ray = standing.library()
    typer.echo("no Ray cluster runs on this machine; starting one ...", err=True)
    cores = max(len(os.sched_getaffinity(0)), cpus)
    ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False, configure_logging=False)
    return ray, True


def _there(ray: Any, name: str) -> dict[int, Any]:
    there = standing.standing(ray, name)
    if not there:
        known = ", ".join(standing.pools(ray)) or "none"
        raise FAPoolConfigError(f"no pool {name} stands (pools here: {known}): fapool pool up --name {name}")
    return there


def _while_it_stands(ray: Any, name: str) -> None:
    with suppress(KeyboardInterrupt):
        while standing.standing(ray, name):
            time.sleep(_WATCH_S)


def _wait(ray: Any, name: str, ranks: int, within_s: float) -> None:
    """Until so many ranks stand. Raises FAPoolConfigError for those that have no place within a time."""

    def up() -> int:
        found = standing.told(ray, standing.standing(ray, name), _LOOK_S)
        return sum(one["state"] in ("free", "leased") for one in found.values())

    if not _until(lambda: up() >= ranks, within_s, lambda: f"pool {name}: {up()} of {ranks} ranks stand"):
        have = ray.cluster_resources()
        raise FAPoolConfigError(
            f"{up()} of {ranks} ranks of pool {name} stand after {within_s:g} s; the others wait until the cluster has "
            f"room for them (it has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs in all): add nodes, "
            f"or fapool pool scale {name} {max(1, up())}"
        )


def _end(ray: Any, name: str, actors: dict[int, Any], patience_s: float) -> None:
    placed = standing.told(ray, actors)  # others never answer
    leaving = [actors[number].leave.remote(patience_s) for number in placed]
    _until(
        lambda: not leaving or not ray.wait(leaving, num_returns=len(leaving), timeout=_LOOK_S)[1],
        patience_s + 5.0,
        lambda: f"pool {name}: {len(actors)} rank(s) leave, at the latest after {patience_s:g} s",
    )
    for actor in actors.values():
        ray.kill(actor, no_restart=True)
    _until(lambda: not set(actors) & set(standing.standing(ray, name)), 10.0, lambda: f"pool {name}: ending")
    typer.echo(f"pool {name}: {len(actors)} rank(s) have left")


def _until(done: Callable[[], bool], within_s: float, text: Callable[[], str]) -> bool:
    """Waits, with progress. Whether it is done."""
    deadline = time.monotonic() + within_s
    with Console(stderr=True).status(text()) as shown:
        while not done():
            if time.monotonic() > deadline:
                return False
            shown.update(text())
            time.sleep(_LOOK_S)
    return True


def _ranks(ray: Any, name: str) -> list[dict[str, Any]]:
    actors = _there(ray, name)
    return standing.figures(actors, standing.told(ray, actors))


def _table(ranks: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("rank", "node", "state", "job", "lease, s", "keys, MiB", "requests", "busy, s", "pid"):
        table.add_column(name, no_wrap=name not in ("node", "job"), overflow="fold")
    for one in ranks:
        if "pid" not in one:
            table.add_row(str(one["rank"]), "", one["state"])
            continue
        lease = f"{one['leased_s']:.1f}" if one["leased_s"] else ""
        held = f"{one['held_bytes'] / MIB:.0f} of {one['memory_bytes'] / MIB:.0f}"
        cells = one["state"], one["job"], lease, held, str(one["requests"]), f"{one['busy_s']:.1f}", str(one["pid"])
        table.add_row(str(one["rank"]), f"{one['host']} {one['node']}", *cells)
    return table
