"""The clusters that pools stand on: one that `fapool pool up` starts, and one with a token and an autoscaler.

The autoscaler is Ray's own, with the provider by which Ray tests it: a new node is one more raylet of this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import torch

from tests.launches import BIN, SCRIPTS, Launched, free_port, launched, until
from tests.models import eager, greedily, save_model
from tests.ray_pools import COMES_S

pytest.importorskip("ray")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(200)]
POOL, IDLE_S = "grown", 6.0
STORE_BYTES = 80 * 2**20
KINDS = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "more": {
        "resources": {"CPU": 1, "memory": 2**30, "object_store_memory": STORE_BYTES},
        "node_config": {},
        "max_workers": 2,
    },
}


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of the cluster and of what joins it: its address, a token of its own, and a folder with a short name, where a
    cluster that is killed leaves its address."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as place:
        yield told | {"RAY_TMPDIR": place, "RAY_ADDRESS": f"127.0.0.1:{free_port()}"}


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str]) -> Iterator[Launched]:
    """A head without room for ranks, and an autoscaler that may add two nodes."""
    address = environment["RAY_ADDRESS"]
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config: dict[str, Any] = {f"{name}_commands": [] for name in commands}
    config |= {"cluster_name": "test", "auth": {}, "file_mounts": {}, "cluster_synced_files": []}
    provider: dict[str, Any] = {"type": "external", "module": "tests.ray_nodes.Nodes", "gcs_address": address}
    provider |= {"disable_node_updaters": True, "use_node_id_as_ip": True}
    config |= {"provider": provider, "head_node_type": "ray.head.default"}
    config |= {"available_node_types": KINDS, "max_workers": 2, "idle_timeout_minutes": IDLE_S / 60}
    (tmp_path / "nodes.json").write_text(json.dumps(config))
    host, port = address.split(":")
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", host, "--port", port]
    command += ["--num-cpus", "0", "--object-store-memory", str(STORE_BYTES), "--include-dashboard", "false"]
    command += ["--autoscaling-config", str(tmp_path / "nodes.json")]
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    here = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    with launched(tmp_path, command, here | fake) as head:
        until(lambda: nodes(head) == 1, COMES_S, lambda: "the head stands")
        try:
            yield head
        finally:
            head.process.terminate()
            print(head.wait(20).said[-2000:])


def nodes(head: Launched) -> int:
    """Raylets that run."""
    return sum(process.name() == "raylet" for process in head.processes())


def called(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "fapool"), "pool", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=150)


def fapool(environment: dict[str, str], *arguments: object) -> str:
    done = called(environment, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_cluster_of_this_machine_where_another_was_killed(environment: dict[str, str], tmp_path: Path) -> None:
    """Ray itself looks for the killed one for two minutes."""
    if any(process.name() == "gcs_server" for process in psutil.process_iter()):
        pytest.skip("a Ray cluster runs on this machine, and would be taken")
    gone = Path(environment["RAY_TMPDIR"], "ray", "ray_current_cluster")
    gone.parent.mkdir()
    gone.write_text(environment.pop("RAY_ADDRESS"))
    command = [str(BIN / "fapool"), "pool", "up", "--name", POOL, "--memory-limit-mib", "64"]
    began = time.monotonic()
    with launched(tmp_path, command, environment) as up:
        assert up.process.stdout is not None
        said = list[str]()
        while not said or f"fapool pool down {POOL} ends both" not in said[-1]:
            said.append(up.process.stdout.readline())
            assert said[-1], said
        assert time.monotonic() - began < 60.0, said
        assert "no Ray cluster runs on this machine; starting one ...\n" in said
        assert "free" in fapool(environment, "status", POOL)
        fapool(environment, "down", POOL)
        assert up.wait(30).code == 0, up.said


@pytest.mark.full
def test_nodes_come_for_ranks_and_go_with_the_pool(
    cluster: Launched, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = save_model("llama", tmp_path / "model")
    expected = eager(folder).generate(torch.arange(3, 84)[None], **greedily(6))[0, 81:].tolist()
    fapool(environment, "up", "--name", POOL, "--memory-limit-mib", 64, "--start-timeout-s", 60)
    assert nodes(cluster) == 1 + 1
    fapool(environment, "scale", POOL, 2, "--start-timeout-s", 60)
    assert nodes(cluster) == 1 + 2
    ranks = json.loads(fapool(environment, "status", POOL, "--json"))["ranks"]
    assert [one["state"] for one in ranks] == ["free", "free"], ranks
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "ray_job.py"), str(folder), POOL],
        input="go on\n", env=os.environ | environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.splitlines()[:2] == ["leased [0, 1]", f"said {expected}"], done.stdout + done.stderr[-4000:]
    fapool(environment, "down", POOL)
    until(lambda: nodes(cluster) == 1, IDLE_S + COMES_S, lambda: "idle nodes go")


@pytest.mark.full
def test_who_has_not_the_token_is_told_so(cluster: Launched, environment: dict[str, str], tmp_path: Path) -> None:
    """Ray itself tries for 20 s, unless it finds no token at all."""
    assert nodes(cluster) == 1
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 32)
    for other in ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, {"RAY_AUTH_TOKEN_PATH": ""}, {"RAY_AUTH_MODE": "disabled"}):
        done = called(environment | {"HOME": str(tmp_path)} | other, "up", "--name", POOL)
        assert done.returncode == 2, done.stderr
        told = done.stderr.splitlines()[-1]
        assert "did not take the token of this process: set RAY_AUTH_MODE=token" in told, f"{other}: {done.stderr}"
