"""What a process of a launch learns from its launcher and from the others; every rank is a thread here."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fapool_plugin import run
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.ranks.launch import JOINED, Launch, is_first, join
from tests.launches import free_port

SETTINGS = FAPoolConfig(pool="launch", pool_ranks=1, memory_limit_mib=16, start_timeout_s=20)


def launched(environments: list[dict[str, str]], config: FAPoolConfig = SETTINGS) -> list[Launch]:
    """Lets all ranks join at the same time; their environments are changed as a process's would be."""

    def one(environment: dict[str, str]) -> tuple[Launch, dist.TCPStore]:
        return copy_context().run(join, config, environment)

    with ThreadPoolExecutor(len(environments)) as team:
        found = list(team.map(one, environments))
    return [launch for launch, _ in found]


def torch_environments(sizes: list[int]) -> list[dict[str, str]]:
    port, world = str(free_port()), str(sum(sizes))
    return [
        {
            "RANK": str(sum(sizes[:node]) + local), "WORLD_SIZE": world, "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": str(node), "GROUP_WORLD_SIZE": str(len(sizes)),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }
        for node, size in enumerate(sizes)
        for local in range(size)
    ]  # fmt: skip


def test_base_ranks_see_a_world_of_their_own() -> None:
    environments = torch_environments([3])
    ranks = launched(environments)
    assert [(rank.is_pool, rank.number) for rank in ranks] == [(False, 0), (False, 1), (True, 0)]
    assert len({(rank.token, rank.run, rank.port, rank.base_ranks, rank.pool_ranks) for rank in ranks}) == 1
    for number, environment in enumerate(environments[:2]):
        seen = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")}
        assert seen == {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert environments[2]["WORLD_SIZE"] == "3", "a pool rank's environment was changed"
    assert JOINED.get() is None, "other contexts are left alone"
    assert pickle.loads(pickle.dumps(ranks[0])) == ranks[0]


def test_the_last_ranks_of_several_nodes() -> None:
    environments = torch_environments([2, 1, 2])
    ranks = launched(environments, SETTINGS.model_copy(update={"pool_ranks": 2}))
    assert [rank.is_pool for rank in ranks] == [False, False, False, True, True]
    assert [environment["LOCAL_SIZE"] for environment in environments[:3]] == ["2", "2", "1"]
    assert [environment["GROUP_WORLD_SIZE"] for environment in environments[:3]] == ["2"] * 3
    assert [rank.node for rank in ranks] == [0, 0, 1, 2, 2]


def test_pool_ranks_of_every_node_and_new_numbers() -> None:
    environments = torch_environments([2, 3])
    ranks = launched(environments, SETTINGS.model_copy(update={"pool_ranks": 2, "pool_placement": "per_node"}))
    assert [rank.is_pool for rank in ranks] == [False, True, False, False, True]
    bases = [environment for environment, rank in zip(environments, ranks, strict=True) if not rank.is_pool]
    assert [environment["RANK"] for environment in bases] == ["0", "1", "2"]
    assert [environment["LOCAL_SIZE"] for environment in bases] == ["1", "2", "2"]
    assert [environment["LOCAL_RANK"] for environment in bases] == ["0", "0", "1"]


LAUNCHERS: dict[str, list[dict[str, str]]] = {
    "Open MPI": [
        {"OMPI_COMM_WORLD_RANK": str(r), "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": str(r),
         "OMPI_COMM_WORLD_LOCAL_SIZE": "2"} for r in range(2)
    ],
    "MPICH": [
        {"PMI_RANK": str(r), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(r), "MPI_LOCALNRANKS": "2"} for r in range(2)
    ],
    "Slurm": [
        {"SLURM_PROCID": str(r), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(r), "SLURM_NODEID": "0",
         "SLURM_TASKS_PER_NODE": "2"} for r in range(2)
    ],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_variables_of_other_launchers(launcher: str) -> None:
    environments = [dict(environment) for environment in LAUNCHERS[launcher]]
    assert [is_first(environment) for environment in environments] == [True, False]
    config = SETTINGS.model_copy(update={"store_port": free_port()})
    assert [rank.is_pool for rank in launched(environments, config)] == [False, True]
    expected = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert environments[0] | expected == environments[0], "what DeepSpeed would look up by MPI is told"


def test_several_nodes_need_an_address() -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}
    with pytest.raises(FAPoolConfigError, match="MASTER_ADDR is not set, and 4 ranks may be on several nodes"):
        join(SETTINGS, environment)


def test_not_launched() -> None:
    with pytest.raises(FAPoolConfigError, match=r'not launched .*set "pool": "local"'):
        join(SETTINGS, {})


def test_a_busy_port_is_named() -> None:
    (environment, _) = torch_environments([2])
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(FAPoolConfigError, match=f"port {port} on 127.0.0.1.* is in use: set store_port"):
            join(SETTINGS.model_copy(update={"store_port": port}), environment)


def test_ranks_that_do_not_come_are_counted() -> None:
    (first, second, _) = torch_environments([3])
    config = SETTINGS.model_copy(update={"start_timeout_s": 2.0})
    with pytest.raises(FAPoolConfigError, match=r"1 of 3 ranks \(first: rank 2\) did not come .*start_timeout_s = 2 s"):
        launched([first, second], config)
    with pytest.raises(FAPoolConfigError, match=r"rank 1 found no store .*within start_timeout_s = 2 s"):
        join(config, second | {"MASTER_PORT": str(free_port())})


def test_too_little_memory_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 100 * 2**20

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    with pytest.raises(
        FAPoolConfigError,
        match="2 pool ranks of node 0 with memory_limit_mib = 64, and 200 MiB for each process, need 528 MiB, and 100",
    ):
        launched(torch_environments([3]), SETTINGS.model_copy(update={"pool_ranks": 2, "memory_limit_mib": 64}))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--deepspeed_config", "ds.json"], "ds.json"),
        (["--x", "1", "--deepspeed_config=ds.json", "--y"], "ds.json"),
        (["--deepspeed", "ds.json"], "ds.json"),
        (["--deepspeed", "--deepspeed_config", "ds.json"], "ds.json"),
        (["--deepspeed"], None),
        (["--config", "ds.json"], None),
    ],
)
def test_the_config_among_a_scripts_arguments(arguments: list[str], found: str | None) -> None:
    assert run.config_file(arguments) == found


def test_accelerates_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "acc.json")
    assert run.config_file([]) == "acc.json"
    assert run.config_file(["--deepspeed_config", "own.json"]) == "own.json"


@given(st.lists(st.sampled_from(["--local_rank=3", "--local-rank=1", "--x", "y", "--local_rankish"]), max_size=4))
def test_arguments_of_launcher_and_script(more: list[str]) -> None:
    script = str(Path(__file__))
    own, found, rest = run.split_arguments(["--local_rank=0", script, *more])
    assert (own[0], found) == ("--local_rank=0", script)
    assert sorted([*own, *rest]) == sorted(["--local_rank=0", *more])


@pytest.mark.parametrize(("arguments", "told"), [([], "no script"), (["--x"], "no script"), (["no.py"], "is no file")])
def test_no_script(arguments: list[str], told: str) -> None:
    with pytest.raises(SystemExit, match=f"fa_pool: .*{told}.*usage: python -m fapool_plugin.run SCRIPT"):
        run.main(arguments)


def test_without_a_section_nothing_is_loaded(tmp_path: Path, capfd: Any) -> None:
    import subprocess
    import sys

    script = tmp_path / "plain.py"
    script.write_text(
        "import sys; print(sorted({'torch', 'deepspeed', 'fapool_plugin.ranks.launch'} & set(sys.modules)), sys.argv)"
    )
    config = tmp_path / "ds.json"
    config.write_text('{"train_batch_size": 1}')
    for arguments in ([], ["--deepspeed_config", str(config)], ["--deepspeed_config", "absent.json"]):
        command = [sys.executable, "-m", "fapool_plugin.run", "--local_rank=0", str(script), *arguments]
        told = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)
        assert told.stdout.strip() == f"[] {[str(script), '--local_rank=0', *arguments]}", told.stderr


@pytest.mark.parametrize(("does", "code"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit(None)", 0), ("1 / 0", 1)])
def test_a_process_of_ours_ends_without_the_interpreters_own_end(does: str, code: int) -> None:
    """What it said is flushed; handlers of atexit, and all else that an interpreter takes down, do not run."""
    program = f"""
import atexit, sys
from fapool_plugin.pool.process import run_to_end

def serve():
    print("last words", end="")
    {does}

atexit.register(print, "torn down")
run_to_end(serve)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (code, "last words"), done.stderr
    assert ("ZeroDivisionError" in done.stderr) == ("/" in does)
