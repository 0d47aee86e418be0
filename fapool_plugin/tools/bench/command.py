"""``fapool bench``: the same work done in several ways, in turns, and compared.

Says who competes, after everything that was typed has been checked. How contenders compute, take turns and are reported
is not known here.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fapool_plugin.config import FAPoolConfig, check_machine
from fapool_plugin.observe.available_memory import left_for_job
from fapool_plugin.plan.clocks import Cores
from fapool_plugin.plan.shares import MOST_BLOCKS
from fapool_plugin.tools import planning
from fapool_plugin.tools.bench.contenders import Contender, ContenderError
from fapool_plugin.tools.bench.report import Report
from fapool_plugin.tools.bench.turns import WrongAnswerError, compare
from fapool_plugin.tools.demo import Screen
from fapool_plugin.tools.options import KVHome, check_counts, check_output, check_picture, one_line_errors

RANDOM = "random"
_WARM_TOKENS = 256
_SEED_TOKENS = 1000
"""Tokens of real text whose keys fill the caches of decode steps."""

_MODELS = "fapool_plugin.integrations.huggingface.bench"
_ATTENTION = "fapool_plugin.tools.bench.attention"

app = typer.Typer(help="The same work with the pool, without it, and by others, in turns.", no_args_is_help=True)

Model = Annotated[
    str | None, typer.Option(help='Model folder, or "random" for a small random Llama; default: the demo model.')
]
Runs = Annotated[int, typer.Option(help="Turns of each contender.")]
PoolRanks = Annotated[int, typer.Option(help="Local pool ranks, one thread each.")]
BaseThreads = Annotated[int, typer.Option(help="CPU threads of the base, and of the first baseline.")]
Threshold = Annotated[int, typer.Option(help="Sequences longer than so many tokens are pooled.")]
Profile = Annotated[
    Path | None,
    typer.Option(
        help="What fapool calibrate --out wrote; default: the one kept for machine and model, or a quick one."
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write every number to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Also draw the times into this file: PNG, SVG or PDF.")]


@app.command()
def prefill(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 8192,
    model: Model = None,
    pool_ranks: PoolRanks = 1,
    base_threads: BaseThreads = 1,
    threshold: Threshold = 4096,
    profile: Profile = None,
    runs: Runs = 3,
    json_file: Json = None,
    plot_file: Plot = None,
) -> None:
    """One long prompt, to the logits of its last position.

    Exit codes: 0 done, 1 answers differ, 2 an error.
    """
    with told_errors():
        counts = {"--tokens": tokens, "--pool-ranks": pool_ranks, "--base-threads": base_threads, "--runs": runs}
        _check(counts, json_file, plot_file)
        _check_longer(tokens, threshold)
        fa_pool = checked(pool_ranks=pool_ranks, threshold=threshold, activation="length")
        with prepared(model, tokens) as (screen, work):
            fa_pool |= {"profile": profile_file(work["model"], profile, base_threads, pool_ranks, screen)}
            plain = work | {"warm": min(tokens, _WARM_TOKENS)}
            # Above the threshold, so that the pool ranks run when the first turn comes.
            pooled = work | {"warm": min(tokens, threshold + _WARM_TOKENS), "fa_pool": fa_pool}
            contenders = ours("prefill", plain, pooled, base_threads, pool_ranks)
            results = compare([[contender] for contender in contenders], runs, screen)
        options = {"model": model or "demo", "tokens": tokens, "threshold": threshold}
        finish(Report("prefill", options, "a prompt", results), json_file, plot_file)


@app.command()
def decode(
    tokens: Annotated[int, typer.Option(help="Positions in the cache before the first step.")] = 8000,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    steps: Annotated[int, typer.Option(help="Timed steps of each turn.")] = 16,
    lengths: Annotated[
        str | None, typer.Option(help="SHORTEST:LONGEST, in place of --tokens: rows evenly between the two.")
    ] = None,
    model: Model = None,
    pool_ranks: PoolRanks = 1,
    base_threads: BaseThreads = 1,
    threshold: Threshold = 4096,
    kv_home: Annotated[KVHome, typer.Option(help="Where keys live: base or pool.")] = KVHome.base,
    profile: Profile = None,
    runs: Runs = 3,
    json_file: Json = None,
    plot_file: Plot = None,
) -> None:
    """Decode steps alone, on caches filled with copies of a shorter real prompt's keys.

    So --tokens may exceed the model's positions: the time is that of a model with more. Beside the pool stands the
    base alone, with the plugin's own kernel and cache; with --kv-home base plain sdpa, too, which copies its cache in
    every step, and the plugin by plan.

    Exit codes: 0 done, 1 answers differ, 2 an error.
    """
    with told_errors():
        counts = {"--tokens": tokens, "--batch": batch, "--steps": steps, "--runs": runs}
        counts |= {"--pool-ranks": pool_ranks, "--base-threads": base_threads}
        _check(counts, json_file, plot_file)
        of_rows = _rows(lengths, tokens, batch)
        tokens = max(of_rows)
        _check_longer(tokens, threshold)
        settings = {"pool_ranks": pool_ranks, "threshold": threshold, "kv_home": kv_home.value}
        by_length, by_cost = (checked(**settings, activation=rule) for rule in ("length", "cost"))
        with prepared(model, min(tokens, _SEED_TOKENS)) as (screen, work):
            known = {"profile": profile_file(work["model"], profile, base_threads, pool_ranks, screen)}
            by_length, by_cost = by_length | known, by_cost | known
            work |= {"lengths": of_rows, "steps": steps}
            *sdpa, pooled = ours("decode", work, work | {"fa_pool": by_length}, base_threads, pool_ranks)
            contenders = [_alone(work | {"fa_pool": by_cost}, one) for one in (base_threads, base_threads + pool_ranks)]
            contenders.append(pooled)
            if kv_home == KVHome.base:
                contenders = [*sdpa, *contenders]
                contenders.append(_by_plan(work | {"fa_pool": by_cost}, base_threads + pool_ranks, pool_ranks))
            results = compare([[contender] for contender in contenders], runs, screen)
        options = {"model": model or "demo", "tokens": lengths or tokens, "batch": batch}
        options |= {"steps": steps, "kv_home": kv_home.value}
        finish(Report("decode", options, "a step", results), json_file, plot_file)


@app.command()
def attention(
    tokens: Annotated[int, typer.Option(help="Queries and keys of the one sequence.")] = 8192,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Of queries, keys and values.")] = 64,
    pool_ranks: PoolRanks = 2,
    runs: Runs = 3,
    json_file: Json = None,
    plot_file: Plot = None,
) -> None:
    """One causal attention call, fp32: alone, through a pool beside an idle base, and with threads.

    Exit codes: 0 done, 1 answers differ, 2 an error.
    """
    with told_errors():
        shape = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        counts = {"--tokens": tokens, "--heads": heads, "--kv-heads": kv_heads, "--head-dim": head_dim}
        _check(counts | {"--pool-ranks": pool_ranks, "--runs": runs}, json_file, plot_file)
        if heads % kv_heads:
            raise ValueError(f"--heads {heads} is no multiple of --kv-heads {kv_heads}; give one that is")
        with Screen() as screen:
            results = compare([[contender] for contender in attention_contenders(shape, pool_ranks)], runs, screen)
        finish(Report("attention", shape, "a call", results), json_file, plot_file)


@app.command()
def training(
    tokens: Annotated[int, typer.Option(help="Length of each row.")] = 4096,
    batch: Annotated[int, typer.Option(help="Rows.")] = 2,
    model: Model = None,
    base_threads: Annotated[int, typer.Option(help="CPU threads of the base.")] = 1,
    pool_ranks: Annotated[int, typer.Option(help="Pool ranks, of one thread each.")] = 1,
    threshold: Threshold = 2048,
    blocks: Annotated[
        int | None, typer.Option(help="Pieces in flight of a single row; 1: none. Default: the plan's.")
    ] = None,
    base_share: Annotated[float | None, typer.Option(help="The base's part of attention; default: the plan's.")] = None,
    profile: Profile = None,
    runs: Runs = 3,
    json_file: Json = None,
    plot_file: Plot = None,
) -> None:
    """Forward and backward of one batch: plain sdpa, and the pool; one process with a model at a time.

    Exit codes: 0 done, 1 gradients differ, 2 an error.
    """
    with told_errors():
        counts = {"--tokens": tokens, "--batch": batch, "--base-threads": base_threads, "--pool-ranks": pool_ranks}
        _check(counts | {"--runs": runs}, json_file, plot_file)
        _check_longer(tokens, threshold)
        fa_pool = checked(
            threshold=threshold, pool_ranks=pool_ranks, activation="length", base_share=base_share, blocks=blocks
        )
        with prepared(model, tokens, batch) as (screen, work):
            fa_pool |= {"profile": profile_file(work["model"], profile, base_threads, pool_ranks, screen)}
            plain = work | {"batch": batch, "warm": min(tokens, threshold + 64)}
            contenders = ours("training", plain, plain | {"fa_pool": fa_pool}, base_threads, pool_ranks)
            # A step keeps every activation for its backward: memory that holds one model's holds no three.
            results = compare([[replace(one, starts_anew=True)] for one in contenders], runs, screen)
        options = {"model": model or "demo", "tokens": tokens, "batch": batch, "threshold": threshold}
        finish(Report("training", options, "a step", results), json_file, plot_file)


@app.command()
def short(
    tokens: Annotated[int, typer.Option(help="Length of the prompt, at most the threshold.")] = 512,
    model: Model = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    threshold: Threshold = 4096,
    runs: Runs = 25,
    json_file: Json = None,
    plot_file: Plot = None,
) -> None:
    """What the plugin costs where it does nothing: a short prompt with and without it, in one process.

    Exit codes: 0 done, 1 answers differ, 2 an error.
    """
    with told_errors():
        _check({"--tokens": tokens, "--threads": threads, "--runs": runs}, json_file, plot_file)
        if tokens > threshold:
            raise ValueError(
                f"--tokens {tokens} is above --threshold {threshold}, so it would be pooled; give at most {threshold}"
            )
        fa_pool = checked(threshold=threshold)
        with prepared(model, tokens) as (screen, work):
            work |= {"warm": tokens}
            team = [
                Contender("without the plugin", f"{_MODELS}.plain_prefill", work, threads),
                Contender("with it", f"{_MODELS}.pooled_prefill", work | {"fa_pool": fa_pool}, threads, claims="local"),
            ]
            results = compare([team], runs, screen)
        options = {"model": model or "demo", "tokens": tokens, "threshold": threshold}
        finish(Report("short", options, "a prompt", results), json_file, plot_file)


@app.command()
def control(
    rows: Annotated[int, typer.Option(help="Sequences of the batch.")] = 1024,
    kv_heads: Annotated[int, typer.Option(help="KV heads, of one query head each.")] = 32,
    layers: Annotated[int, typer.Option(help="Attention layers.")] = 4,
    pool_ranks: Annotated[int, typer.Option(help="Pool ranks; they only pretend.")] = 40,
    tokens: Annotated[int, typer.Option(help="Length of each prompt.")] = 16,
    steps: Annotated[int, typer.Option(help="Measured prompts, and measured decode steps.")] = 5,
    json_file: Json = None,
) -> None:
    """What the base does beside attention: with links that lead nowhere, and over sockets.

    Exit codes: 0 done, 2 an error.
    """
    from fapool_plugin.tools.bench import control as pretended  # loads torch

    with told_errors():
        counts = {"--rows": rows, "--kv-heads": kv_heads, "--pool-ranks": pool_ranks, "--tokens": tokens}
        _check(counts | {"--layers": layers, "--steps": steps}, json_file, None)
        if layers < 2:
            raise ValueError("--layers is 1; give at least 2: the first layer works out what the others find")
        setting = pretended.Setting(rows, kv_heads, layers, pool_ranks, tokens, steps)
        with Screen() as screen:
            found = {over: pretended.measure(setting, over, screen) for over in pretended.WAYS}
        pretended.show(setting, found)
        if json_file is not None:
            pretended.write(json_file, setting, found)


def ours(
    phase: str, plain: dict[str, Any], pooled: dict[str, Any], base_threads: int, pool_ranks: int
) -> list[Contender]:
    """Plain sdpa with the base's threads and with all, and the pool."""
    every = base_threads + pool_ranks
    make = f"{_MODELS}.plain_{phase}"
    return [
        Contender(_threads("sdpa", base_threads), make, plain | {"time_attention": True}, base_threads),
        Contender(_threads("sdpa", every), make, plain, every),
        Contender(
            f"fapool, {base_threads} + {pool_ranks}",
            f"{_MODELS}.pooled_{phase}",
            pooled,
            base_threads,
            pool_threads=pool_ranks,
            claims="pooled",
        ),
    ]


def _alone(work: dict[str, Any], threads: int) -> Contender:
    """The base alone, with the plugin's own kernel and cache."""
    return Contender(_threads("own kernel", threads), f"{_MODELS}.alone_decode", work, threads)


def _by_plan(pooled: dict[str, Any], threads: int, pool_ranks: int) -> Contender:
    """The plugin with every core for the base; the plan may leave the pool idle."""
    label = f"fapool by plan, {threads} + {pool_ranks}"
    return Contender(label, f"{_MODELS}.pooled_decode", pooled, threads, pool_threads=pool_ranks)


def attention_contenders(shape: dict[str, Any], pool_ranks: int) -> list[Contender]:
    """One call by the kernel alone, through a pool, and with as many threads as that has."""
    fa_pool = checked(pool_ranks=pool_ranks, threshold=0, base_share=0.0, activation="length")
    contenders = [
        Contender("alone, 1 thread", f"{_ATTENTION}.alone", shape),
        Contender(
            f"pool of {pool_ranks}, base idle",
            f"{_ATTENTION}.pool",
            shape | {"fa_pool": fa_pool},
            pool_threads=pool_ranks,
            idle_threads=1,
            claims="pooled",
        ),
        Contender(_threads("alone", pool_ranks), f"{_ATTENTION}.alone", shape, threads=pool_ranks),
    ]
    # A team of one is the baseline once more.
    return contenders[: 3 if pool_ranks > 1 else 2]


def _threads(what: str, count: int) -> str:
    return f"{what}, {count} thread{'s' * (count > 1)}"


@contextmanager
def prepared(model: str | None, tokens: int, rows: int = 1) -> Iterator[tuple[Screen, dict[str, Any]]]:
    """A screen, and the model's folder with ``rows`` prompts of ``tokens`` tokens, end to end. Raises as the demo
    does."""
    with tempfile.TemporaryDirectory(prefix="fapool-bench-") as folder, Screen() as screen:
        screen("preparing model and prompt", 0, None)
        # stdout is for the table; what transformers imports may think otherwise.
        with redirect_stdout(sys.stderr):
            from fapool_plugin.integrations.huggingface import bench as huggingface_bench
            from fapool_plugin.integrations.huggingface import runs as huggingface_runs

            if model == RANDOM:
                path = huggingface_bench.random_model(Path(folder))
            else:
                path = Path(model) if model else huggingface_runs.demo_model(None, screen)
            ids = huggingface_bench.prompt(path, tokens, rows, is_random=model == RANDOM)
        yield screen, {"model": str(path), "ids": ids}


def finish(report: Report, json_file: Path | None, plot_file: Path | None) -> None:
    """Shows, writes and draws what was asked for."""
    report.show()
    if json_file is not None:
        report.write(json_file)
    if plot_file is not None:
        report.draw(plot_file)


@contextmanager
def told_errors() -> Iterator[None]:
    """Errors in one line, with exit code 1 for a wrong answer and 2 for all else."""
    with one_line_errors(ContenderError):
        try:
            yield
        except WrongAnswerError as error:
            typer.echo(f"fapool: {error}", err=True)
            raise typer.Exit(1) from None


def _check(counts: dict[str, int], json_file: Path | None, plot_file: Path | None) -> None:
    check_counts(counts)
    check_output(json_file)
    check_picture(plot_file)


def profile_file(model: str, given: Path | None, base_threads: int, pool_ranks: int, screen: Screen) -> str:
    """The file that plans are made with."""
    setting = planning.Setting(Cores(base_threads + pool_ranks), (pool_ranks,), MOST_BLOCKS, "float32")
    return str(given or planning.kept_profile(Path(model), setting, screen))


def _check_longer(tokens: int, threshold: int) -> None:
    if tokens <= threshold:
        raise ValueError(
            f"--tokens {tokens} is not above --threshold {threshold}, so nothing would be pooled; "
            f"give more tokens, or --threshold {max(0, tokens // 2)}"
        )


def _rows(lengths: str | None, tokens: int, batch: int) -> list[int]:
    """Positions of each row: all alike, or evenly from the shortest to the longest."""
    if lengths is None:
        return [tokens] * batch
    shortest, _, longest = lengths.partition(":")
    if not (shortest.isdecimal() and longest.isdecimal() and 0 < int(shortest) < int(longest)) or batch < 2:
        raise ValueError(
            f"--lengths {lengths} with --batch {batch}; give SHORTEST:LONGEST, such as 500:4096, and at least 2 rows"
        )
    step = (int(longest) - int(shortest)) / (batch - 1)
    return [int(shortest) + round(step * row) for row in range(batch)]


def checked(**settings: Any) -> dict[str, Any]:
    """The plugin's settings, checked against this machine. Raises FAPoolConfigError."""
    check_machine(FAPoolConfig(**settings), left_for_job())
    return settings
