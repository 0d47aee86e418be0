"""A standing pool on several nodes: where its ranks are placed, and what happens when nodes and ranks go and come.

All nodes are raylets of this machine.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.ranks import directory
from fapool_plugin.tools import doctor
from fapool_plugin.tools import standing as pool_tool
from fapool_plugin.tools.cli import app
from fapool_plugin.wire import PROTOCOL_VERSION
from tests.conftest import child_processes
from tests.launches import free_port, until
from tests.models import assert_same_tokens, eager, greedily, random_ids, save_model
from tests.ray_pools import COMES_S, SETTINGS, all_free, end, grow, job, leased, said, serving

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(200)]
NEW = 6
SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with four CPUs in the west; tests add others."""
    from ray.cluster_utils import Cluster

    before = set(child_processes())
    made = Cluster(
        initialize_head=True, head_node_args=SMALL | {"num_cpus": 4, "labels": {"zone": "west", "room": "head"}}
    )
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    yield made
    ray.shutdown()
    made.shutdown()
    until(lambda: set(child_processes()) <= before, 20, lambda: "the cluster's processes end")


@pytest.fixture
def pool(cluster: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """A pool's name; whatever ranks it has at last are ended."""
    name = request.node.name
    yield name
    end(ray, name)


@contextmanager
def node(cluster: Any, zone: str, cpus: int = 1, **labels: str) -> Iterator[Any]:
    """One more node, removed at the end if the test has not done so."""
    added = cluster.add_node(num_cpus=cpus, labels={"zone": zone} | labels, **SMALL)
    try:
        yield added
    finally:
        if added in cluster.worker_nodes:
            cluster.remove_node(added)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(2, 300)


@pytest.fixture(scope="module")
def plain(folder: Path, ids: Tensor) -> Tensor:
    return eager(folder).generate(ids, **greedily(NEW))


def before_its_call(monkeypatch: pytest.MonkeyPatch, number: int, call: int, what: Callable[[], object]) -> None:
    """Does something once, when a rank is about to be asked for its share of a layer, and others may have been."""
    ask, seen = PoolRank.ask, 0

    def asked(self: PoolRank, *args: Any) -> int:
        nonlocal seen
        seen += self.number == number
        if self.number == number and seen == call:
            what()
        return ask(self, *args)

    monkeypatch.setattr(PoolRank, "ask", asked)


def fapool(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["pool", *map(str, arguments)])


def test_a_node_goes_in_the_middle_of_a_layer(
    cluster: Any, folder: Path, pool: str, ids: Tensor, plain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with node(cluster, "east") as east, job(folder, pool) as model:
        grow(ray, pool, range(2), cpus=1.0)
        before = said(ray, pool)
        assert len({one["node"] for one in before.values()}) == 2, f"SPREAD has put both on one node: {before}"
        (victim,) = (number for number, one in before.items() if east.node_id.startswith(one["node"]))

        def remove() -> None:
            cluster.remove_node(east)
            until(lambda: not psutil.pid_exists(before[victim]["pid"]), COMES_S, lambda: "its worker ends, too")

        before_its_call(monkeypatch, victim, 3, remove)
        with pytest.warns(RuntimeWarning, match=f"pool rank {victim} .* lost"):
            assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        events = model.fa_pool.stats()["events"]
        assert [event["kind"] for event in events].count("fault") == 1, events
        until(lambda: len(serving(ray, pool)) == 2, COMES_S, lambda: f"it comes again: {said(ray, pool)}")
        assert len({one["node"] for one in said(ray, pool).values()}) == 1, said(ray, pool)
        calls = counted(model)
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        assert all(more > calls[number] for number, more in counted(model).items()), "both are used again"
        assert model.fa_pool.stats()["faults"] == 1, model.fa_pool.stats()["events"]


def counted(model: Any) -> dict[int, int]:
    """Calls of each rank."""
    return {rank["rank"]: rank["calls"] for rank in model.fa_pool.stats()["ranks"]}


def test_ranks_without_a_place_come_with_a_node(
    cluster: Any, folder: Path, pool: str, ids: Tensor, plain: Tensor
) -> None:
    """Room enough in the west is no room for ranks that are wanted in the east."""
    with node(cluster, "east"), job(folder, pool) as model, torch.no_grad():
        ran = fapool("up", "--name", pool, "--label", "zone=east", "--memory-limit-mib", 64)
        assert ran.exit_code == 0, ran.output
        ran = fapool("scale", pool, 2, "--start-timeout-s", 1)
        assert ran.exit_code == 2, ran.output
        assert f"1 of 2 ranks of pool {pool} stand after 1 s" in ran.stderr
        ranks = json.loads(fapool("status", pool, "--json").stdout)["ranks"]
        assert sorted(one["state"] for one in ranks) == ["free", "waiting"], ranks
        shown = fapool("status", pool).stdout
        assert [word in shown for word in ("free", "waiting", "0 of 64")] == [True] * 3, shown
        kept = model(ids, use_cache=True).past_key_values
        assert len(leased(model)) == 1
        with node(cluster, "east") as second:
            until(lambda: len(serving(ray, pool)) == 2, COMES_S, lambda: f"it comes: {said(ray, pool)}")
            nodes = {one["node"] for one in said(ray, pool).values()}
            assert len(nodes) == 2, nodes
            assert any(second.node_id.startswith(name) for name in nodes), nodes
            assert not any(cluster.head_node.node_id.startswith(name) for name in nodes), "none is in the west"
            del kept
            kept = model(ids, use_cache=True).past_key_values
            assert leased(model) == [0, 1], "a rank that came is used by the next sequence"
            del kept
            assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
            assert model.fa_pool.stats()["faults"] == 0, model.fa_pool.stats()["events"]


def test_ranks_of_another_version_are_named_and_left_alone(
    folder: Path, pool: str, ids: Tensor, plain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may say of themselves what this version does not know."""
    grow(ray, pool, range(1))
    monkeypatch.setattr(directory, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    sentence = rf"no rank of pool '{pool}' can be had \(pool rank 0 speaks protocol {PROTOCOL_VERSION}, this job"
    with job(folder, pool) as model, pytest.warns(RuntimeWarning, match=sentence):
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
    assert [one["state"] for one in json.loads(fapool("status", pool, "--json").stdout)["ranks"]] == [directory.OTHER]
    assert directory.OTHER in fapool("status", pool).stdout
    ran = fapool("scale", pool, 2)
    assert (ran.exit_code, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert "no rank of pool" in ran.stderr
    monkeypatch.undo()
    with job(folder, pool) as model:
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        assert model.fa_pool.stats()["prefill"]["pooled_calls"], model.fa_pool.stats()["events"]


def test_near_ranks_are_first(cluster: Any, folder: Path, pool: str, ids: Tensor, plain: Tensor) -> None:
    """The job is in the west: its own node comes first, then the pool's domains, then the rest."""
    with node(cluster, "east"), node(cluster, "west", room="other"), job(folder, pool, pool_ranks=2) as model:
        for number, labels in enumerate(({"zone": "east"}, {"room": "other"}, {"room": "head"})):
            request = directory.Request(cpus=0.5, labels=labels, domains=("room", "zone"))
            directory.add(ray, pool, [number], SETTINGS, request)
        until(lambda: serving(ray, pool) == {0, 1, 2}, COMES_S, lambda: f"ranks stand: {said(ray, pool)}")
        with torch.no_grad():
            kept = model(ids, use_cache=True).past_key_values
        assert leased(model) == [2, 1], f"its own node's, its zone's: {said(ray, pool)}"
        assert kept.get_seq_length() == ids.shape[1]


def test_status_is_served_until_the_pool_is_down(
    cluster: Any, folder: Path, pool: str, ids: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    files = set(os.listdir("/dev/shm"))
    grow(ray, pool, range(2))
    with job(folder, pool) as model, torch.no_grad():
        model(ids)
    port = free_port()
    served = threading.Thread(target=lambda: pool_tool.status(pool, prometheus=port))
    served.start()
    lines: list[str] = []

    def scraped() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines[:] = answer.read().decode().splitlines()
        return bool(lines)

    until(scraped, 20, lambda: "it is served")
    assert f"http://127.0.0.1:{port}/metrics" in capsys.readouterr().out
    ranks = json.loads(fapool("status", pool, "--json").stdout)["ranks"]
    assert all(one["requests"] >= 2 and one["busy_s"] > 0 for one in ranks), "a request a layer, at least"
    for one in ranks:
        assert f'fapool_pool_rank_requests_total{{rank="{one["rank"]}"}} {one["requests"]:.1f}' in lines, lines
    assert 'fapool_pool_ranks{state="free"} 2.0' in lines, lines
    told = next(check for check in doctor.examine() if check.name == "standing pools")
    assert told.usable, told
    assert f"{pool} (2 of 2 ranks stand)" in told.why
    assert ray.is_initialized(), "who is in the cluster stays in it"
    ran = fapool("down", pool)
    assert ran.exit_code == 0, ran.output
    served.join(20)
    assert not served.is_alive(), "it ends with the pool"
    until(lambda: not any(psutil.pid_exists(one["pid"]) for one in ranks), 10, lambda: f"workers end: {ranks}")
    until(lambda: set(os.listdir("/dev/shm")) <= files, 10, lambda: f"{set(os.listdir('/dev/shm')) - files} are left")


@pytest.mark.parametrize("patience_s", [60.0, pytest.param(0.0, marks=pytest.mark.full)])
def test_a_pool_is_made_smaller_in_the_middle_of_a_prompt(
    cluster: Any,
    folder: Path,
    pool: str,
    ids: Tensor,
    plain: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    patience_s: float,
) -> None:
    grow(ray, pool, range(2))
    pid = said(ray, pool)[1]["pid"]
    ended = threading.Thread(target=lambda: pool_tool.scale(pool, 1, patience_s=patience_s, start_timeout_s=30.0))

    def scale() -> None:
        ended.start()
        if patience_s:
            until(lambda: said(ray, pool)[1]["state"] == "leaving", 20, lambda: "the rank is told")
        else:
            until(lambda: not psutil.pid_exists(pid), 20, lambda: "the rank ends at once")

    with job(folder, pool, blocks=3) as model, warnings.catch_warnings(record=True):
        before_its_call(monkeypatch, 1, 3, scale)
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        ended.join(30)
        assert not ended.is_alive(), said(ray, pool)
        assert set(directory.standing(ray, pool)) == {0}
        stats = model.fa_pool.stats()
        assert stats["prefill"]["pooled_calls"] == 6, "three blocks at two layers"
        assert stats["faults"] == (0 if patience_s else 1), stats["events"]
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        assert stats["faults"] == model.fa_pool.stats()["faults"], model.fa_pool.stats()["events"]
    until(lambda: all_free(ray, pool), 10, lambda: f"{said(ray, pool)}")
