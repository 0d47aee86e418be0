"""Jobs that share the ranks of a standing pool, and the same jobs with ranks of their own.

    python examples/shared_pool.py --split 1,2 --seconds 60
    python examples/shared_pool.py --split 1,1,1 --seconds 60 --json shared.json
    python examples/shared_pool.py --split 2,1 --seconds 180 --tokens 1000 --device-gflops 0.4

As many jobs as --split has numbers, each a process with a model of its own, answer long and short prompts as a user
would send them, with pauses. First all share a pool of as many ranks as the numbers say together, then each has a pool
of its own number of ranks. Long prompts borrow ranks; every answer is compared with that of the model without the
plugin. Useful seconds of the pool are CPU seconds that its ranks spent on answers. A Ray cluster of this machine is
started for it.

With --phase-s each job sends long prompts for a while and short ones for a while, at times that are the same both ways.
With --device-gflops attention takes as long as on devices of that speed, one for each rank and one for each job: it is
computed, and then its process sleeps (paced/sitecustomize.py). Useful seconds are then those of attention and sleep.
So ranks do not stand in each other's way where there are fewer cores, and what is measured is how leases are shared.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import psutil
import ray
import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from fapool_plugin import FAPoolConfig, FAPoolForCausalLM
from fapool_plugin.ranks import directory
from fapool_plugin.tools.options import check_counts, check_output, numbers, one_line_errors

SHORT = 64
WORDS = 1000
PACED = Path(__file__).resolve().parent / "paced"
SPEED = "SHARED_POOL_GFLOPS"
"""In the environment of processes whose attention is to take as long as on a device."""
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass
class Answer:
    """One prompt, from its coming to its last token."""

    job: int
    tokens: int
    began_s: float
    """Since the jobs were told to begin."""
    ended_s: float
    ranks: list[int]
    """Those that worked for it."""
    is_right: bool


def model_of_random_weights(folder: Path, tokens: int) -> None:
    """Small, and with choices so clear that no two words are near each other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=WORDS, max_position_embeddings=2 * tokens, initializer_range=0.2, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def answer(model: Any, prompt_1S: torch.Tensor, new_tokens: int) -> list[int]:
    """Greedily."""
    mask = torch.ones_like(prompt_1S)
    tokens = model.generate(prompt_1S, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return [int(token) for token in tokens[0, prompt_1S.shape[1] :]]


@app.command()
def job(
    number: int, folder: Path, pool: str, ranks: int, address: str, tokens: int, new_tokens: int, pause_s: float,
    phase_s: float,
) -> None:  # fmt: skip
    """One job; `main` starts it. Says "ready", reads for how many seconds it is to work, and says what it did."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    lengths = [tokens, SHORT, tokens // 2]
    prompts = {n: torch.randint(1, WORDS, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths}
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = {n: answer(plain, prompt, new_tokens) for n, prompt in prompts.items()}
    settings = {"pool": "ray", "pool_name": pool, "pool_ranks": ranks, "ray_address": address, "base_share": 0.0}
    settings |= {"threshold": 2 * SHORT, "activation": "length"}
    model = FAPoolForCausalLM.from_pretrained(folder, fa_pool=settings)
    answers, pauses, phases = list[Answer](), random.Random(number), random.Random(number)
    with model.fa_pool as mine:
        answer(model, prompts[tokens], new_tokens)  # whatever happens once only happens now
        print("ready", flush=True)
        seconds = float(sys.stdin.readline())
        began = time.monotonic()
        changes, sends_long = began, phases.random() < 0.5
        while (now := time.monotonic()) < began + seconds:
            length, before = lengths[(number + len(answers)) % len(lengths)], calls(mine)
            while phase_s and now > changes:
                changes, sends_long = changes + phases.uniform(0.5, 1.5) * phase_s, not sends_long
            if phase_s:
                length = (tokens, tokens // 2)[len(answers) % 2] if sends_long else SHORT
            came_s = time.monotonic() - began
            told = answer(model, prompts[length], new_tokens)
            used = [rank for rank, count in calls(mine).items() if count > before.get(rank, 0)]
            ended_s = time.monotonic() - began
            answers.append(Answer(number, length, came_s, ended_s, used, told == expected[length]))
            time.sleep(pauses.uniform(0.0, 2 * pause_s))
        stats = mine.stats()
    busy = [event["reason"] for event in stats["events"] if event["kind"] == "busy"]
    said = {"answers": [asdict(one) for one in answers], "faults": stats["faults"], "waited": len(busy)}
    print(json.dumps(said), flush=True)


def calls(pool: Any) -> dict[int, int]:
    """Of each rank so far."""
    return {rank["rank"]: rank["calls"] for rank in pool.stats()["ranks"]}


def useful_s(pools: dict[str, int]) -> float:
    """CPU seconds of the pools' ranks so far; where they sleep as devices compute, seconds that requests took them."""
    found = 0.0
    for name in pools:
        for one in directory.told(ray, directory.standing(ray, name)).values():
            times = psutil.Process(one["pid"]).cpu_times()
            found += one["busy_s"] if SPEED in os.environ else times.user + times.system
    return found


def measured(folder: Path, pools: dict[str, int], of_jobs: list[str], seconds: float, *told: object) -> dict[str, Any]:
    """What jobs on these pools do; ``pools``: ranks by name; ``of_jobs``: each job's pool."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    address = ray.get_runtime_context().gcs_address
    with ExitStack() as stack:
        for name, ranks in pools.items():
            settings = FAPoolConfig(pool="ray", pool_name=name, pool_ranks=ranks, memory_limit_mib=256)
            directory.add(ray, name, range(ranks), settings, directory.Request(cpus=1.0))
            stack.callback(end, name)
        while sum(len(free(name)) for name in pools) < sum(pools.values()):
            time.sleep(0.2)
        jobs = list[subprocess.Popen[str]]()
        for number, name in enumerate(of_jobs):
            given = map(str, (number, folder, name, pools[name], address, *told))
            command = [sys.executable, __file__, "job", *given]
            jobs.append(
                stack.enter_context(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
                )
            )
            stack.callback(jobs[-1].kill)
        for one in jobs:
            said_by(one.stdout, "ready")
        before = useful_s(pools)
        for one in jobs:
            assert one.stdin is not None
            one.stdin.write(f"{seconds}\n")
            one.stdin.flush()
        told_by_jobs = [json.loads(said_by(one.stdout)) for one in jobs]
        useful = useful_s(pools) - before
    answers = [each for said in told_by_jobs for each in said["answers"]]
    return {
        "answers": answers,
        "faults": sum(said["faults"] for said in told_by_jobs),
        "waited": [said["waited"] for said in told_by_jobs],
        "useful_s": useful,
        "seconds": max(each["ended_s"] for each in answers),
    }


def said_by(stream: IO[str] | None, word: str = "") -> str:
    """The next line of a job. Raises RuntimeError if it has ended."""
    assert stream is not None
    line = stream.readline().strip()
    if not line or word not in line:
        raise RuntimeError(f"a job said {line!r}, not {word or 'what it did'!r}")
    return line


def free(name: str) -> list[int]:
    """Ranks of a pool that serve, and that no job has."""
    said = directory.told(ray, directory.standing(ray, name))
    return [number for number, one in said.items() if one["state"] == "free"]


def end(name: str) -> None:
    """Ends a pool."""
    actors = directory.standing(ray, name)
    ray.get([actor.leave.remote(5.0) for actor in actors.values()])
    for actor in actors.values():
        ray.kill(actor, no_restart=True)


def show(what: str, found: dict[str, Any], ranks: int) -> None:
    """What was answered, by whom, and what the pool did for it."""
    answers = found["answers"]
    wrong = sum(not each["is_right"] for each in answers)
    long = [each for each in answers if each["tokens"] > SHORT]
    shares = [sum(each["tokens"] for each in long if each["job"] == job) for job in range(len(found["waited"]))]
    print(f"{what}: tokens are {'equal' if not wrong else f'DIFFERENT in {wrong} answers'}, {found['faults']} faults")
    print(f"  long prompts answered: {len(long)}, of {sum(shares)} tokens; each job's share: "
          f"{', '.join(f'{share / max(1, sum(shares)):.0%}' for share in shares)}")  # fmt: skip
    print(f"  forwards that found ranks leased by others: {', '.join(map(str, found['waited']))}")
    used = found["useful_s"] / (ranks * found["seconds"])
    print(f"  useful seconds of the pool: {found['useful_s']:.1f} in {found['seconds']:.1f} s, {used:.0%} of its ranks")


@app.command()
def main(
    split: Annotated[str, typer.Option(help="Ranks of each job's own pool, such as 1,2.")] = "1,2",
    seconds: Annotated[float, typer.Option(min=1.0, help="How long jobs work, each time.")] = 60.0,
    tokens: Annotated[int, typer.Option(help="Of the longest prompts.")] = 6000,
    new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 4,
    pause_s: Annotated[float, typer.Option(min=0.0, help="Between prompts of one job, on average.")] = 1.0,
    phase_s: Annotated[
        float, typer.Option(min=0.0, help="Long prompts for about so long, then short ones; 0: one after the other.")
    ] = 0.0,
    device_gflops: Annotated[
        float | None, typer.Option(min=0.001, help="Attention takes as long as on devices of this speed.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write every answer to this file.")] = None,
) -> None:
    """Both ways, one after the other. Exit codes: 0 all tokens are equal, 1 some are not, 2 an error."""
    with one_line_errors(RuntimeError):
        check_counts({"--tokens": tokens, "--new-tokens": new_tokens})
        check_output(as_json)
        if device_gflops is not None:
            path = os.pathsep.join(filter(None, (str(PACED), os.environ.get("PYTHONPATH"))))
            os.environ.update({SPEED: str(device_gflops), "PYTHONPATH": path})
        own = [int(text) for text in split.split(",") if numbers("--split", text)]
        ranks = sum(own)
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            model_of_random_weights(folder, tokens)
            ray.init(num_cpus=ranks, include_dashboard=False, log_to_driver=False, configure_logging=False)
            stack.callback(ray.shutdown)
            told = seconds, tokens, new_tokens, pause_s, phase_s
            found = {"shared": measured(folder, {"shared": ranks}, ["shared"] * len(own), *told)}
            show(f"{len(own)} jobs on a shared pool of {ranks} ranks", found["shared"], ranks)
            pools = {f"own{number}": count for number, count in enumerate(own)}
            found["own"] = measured(folder, pools, list(pools), *told)
            show(f"the same jobs, each with ranks of its own ({split})", found["own"], ranks)
        per_s = {name: one["useful_s"] / one["seconds"] for name, one in found.items()}
        print(f"useful seconds of the pool per second: {per_s['shared'] / per_s['own']:.2f} times those of own pools")
        if as_json is not None:
            as_json.write_text(json.dumps(found | {"ranks": ranks, "split": own}))
    raise typer.Exit(int(not all(each["is_right"] for one in found.values() for each in one["answers"])))


if __name__ == "__main__":
    # Without the name of a command: what a user types.
    app(args=sys.argv[1:] if sys.argv[1:2] == ["job"] else ["main", *sys.argv[1:]])
