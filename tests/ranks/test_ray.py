"""A standing pool on Ray: jobs borrow its ranks and give them back, ranks come and go, and no token changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typer.testing import CliRunner

from fapool_plugin import FAPoolConfigError, FAPoolForCausalLM
from fapool_plugin.base.agreement import agree_over
from fapool_plugin.integrations.tensor_parallel.parallel import load_parallel
from fapool_plugin.ranks import directory as standing
from fapool_plugin.tools.cli import app
from tests.base_ranks import base_ranks
from tests.conftest import child_processes
from tests.launches import SCRIPTS, until
from tests.models import assert_same_tokens, eager, greedily, random_ids, save_model
from tests.ray_pools import COMES_S, SETTINGS, end, grow, job, leased, said, serving

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

NEW = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of this machine, with no pool on it."""
    before = set(child_processes())
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()
    until(lambda: set(child_processes()) <= before, 20, lambda: "the cluster's processes end")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(2, 120)


@pytest.fixture(scope="module")
def plain(folder: Path, ids: Tensor) -> Tensor:
    return eager(folder).generate(ids, **greedily(NEW))


def states(name: str) -> list[str]:
    return [one["state"] for one in said(ray, name).values()]


@pytest.fixture
def pool(cluster: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """A pool's name, two ranks of which stand."""
    name = request.node.name
    grow(ray, name, range(2))
    yield name
    end(ray, name)


def test_a_job_borrows_ranks_and_gives_them_back(folder: Path, pool: str, ids: Tensor, plain: Tensor) -> None:
    with job(folder, pool) as model:
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        stats = model.fa_pool.stats()
        assert stats["prefill"]["pooled_calls"], stats["events"]
        assert stats["faults"] == 0, stats["events"]
        assert all(one["requests"] for one in said(ray, pool).values()), said(ray, pool)
        until(lambda: states(pool) == ["free", "free"], COMES_S, lambda: "the lease is given back")
    assert states(pool) == ["free", "free"], "ranks outlive a job"


def test_jobs_share_and_none_takes_what_another_has(folder: Path, pool: str, ids: Tensor, plain: Tensor) -> None:
    with job(folder, pool, pool_ranks=1) as first, job(folder, pool) as second, torch.no_grad():
        kept = first(ids, use_cache=True).past_key_values
        assert len(leased(first)) == 1
        assert_same_tokens(second.generate(ids, **greedily(NEW)), plain)
        stats = second.fa_pool.stats()
        assert any(event["kind"] == "busy" for event in stats["events"]), stats["events"]
        assert stats["faults"] == first.fa_pool.stats()["faults"] == 0, stats["events"]
        with job(folder, pool) as third:
            kept_too = second(ids, use_cache=True).past_key_values
            assert_same_tokens(third.generate(ids, **greedily(NEW)), plain)  # no rank is left: locally
            assert third.fa_pool.stats()["prefill"]["pooled_calls"] == 0
            del kept, kept_too
            first.fa_pool.reap()
            second.fa_pool.reap()
            until(lambda: states(pool) == ["free", "free"], COMES_S, lambda: "both leases are given back")
            assert_same_tokens(third.generate(ids, **greedily(NEW)), plain)
            assert third.fa_pool.stats()["prefill"]["pooled_calls"], "the next sequence borrows"


def test_ranks_join_and_leave_a_running_job(folder: Path, pool: str, ids: Tensor, plain: Tensor) -> None:
    with job(folder, pool) as model, torch.no_grad():
        kept = model(ids, use_cache=True).past_key_values
        assert len(leased(model)) == 2
        grow(ray, pool, range(2, 3))
        del kept
        kept = model(ids, use_cache=True).past_key_values
        assert len(leased(model)) == 3, "a rank that came is used by the next sequence"
        actor = standing.standing(ray, pool)[0]
        ended = actor.leave.remote(30.0)
        until(lambda: states(pool)[0] == "leaving", COMES_S, lambda: "the rank is told")
        del kept
        model.fa_pool.reap()
        ray.get(ended, timeout=20)
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        stats = model.fa_pool.stats()
        assert stats["faults"] == 0, f"its lease had ended before it left: {stats['events']}"


@pytest.mark.parametrize("home", ["base", "pool"])
def test_ranks_join_and_leave_in_the_middle_of_a_sequence(
    folder: Path, pool: str, ids: Tensor, plain: Tensor, home: str
) -> None:
    with job(folder, pool, kv_home=home) as model, torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "fa_pool")
        leases, ended = model.fa_pool.leases, []

        def come() -> None:
            grow(ray, pool, range(2, 3))
            until(lambda: 2 in leases.pool.look({0, 1}), COMES_S, lambda: "the job has found it")
            time.sleep(0.6)  # jobs ask for more no sooner

        def leave() -> None:
            assert len(leased(model)) == (3 if home == "base" else 2), model.fa_pool.stats()["events"]
            ended.append(standing.standing(ray, pool)[0].leave.remote(30.0))
            until(lambda: leases.ranks[0].link.wishes.leaving, COMES_S, lambda: "the rank has said so")

        cache: Any = None
        then, tokens = {1: come, 3: leave}, ids
        for step in range(NEW):
            then.get(step, lambda: None)()
            out = model(tokens if cache is None else tokens[:, -1:], past_key_values=cache, use_cache=True)
            cache, tokens = out.past_key_values, torch.cat([tokens, out.logits[:, -1:].argmax(-1)], dim=1)
        assert_same_tokens(tokens, plain)
        stats = model.fa_pool.stats()
        assert stats["leased_ranks"] == [1, 2], stats["events"]
        assert (stats["faults"], stats["replays"]) == (0, int(home == "pool")), stats["events"]
        told = [event["kind"] for event in stats["events"] if event["kind"] in ("joined", "left", "replay", "fault")]
        assert told[:2] == (["joined", "left"] if home == "base" else ["left", "replay"]), stats["events"]
        ray.get(ended[0], timeout=10)  # it has not waited for the end of the sequence
        assert cache.get_seq_length(), "which is not over"


@pytest.mark.parametrize("whom", ["worker", "actor"])
@pytest.mark.filterwarnings("ignore:fa_pool. pool rank 0")
def test_a_killed_rank_costs_no_token_and_comes_again(
    folder: Path, pool: str, ids: Tensor, plain: Tensor, whom: str
) -> None:
    with job(folder, pool) as model:
        out = model(ids[:, :100], use_cache=True)
        before = said(ray, pool)[0]["pid"]
        os.kill(before if whom == "worker" else psutil.Process(before).ppid(), signal.SIGKILL)
        until(lambda: not psutil.pid_exists(before), COMES_S, lambda: "the worker ends, with its actor too")
        assert_same_tokens(model.generate(ids, past_key_values=out.past_key_values, **greedily(NEW)), plain)
        until(lambda: 0 in serving(ray, pool), COMES_S, lambda: "another takes its place")
        assert said(ray, pool)[0]["pid"] != before
        del out
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        assert model.fa_pool.stats()["faults"] == 1


def divided(group: ProcessGroup, folder: Path, pool: str, address: str, ids: Tensor, home: str) -> dict[str, Any]:
    """What one of the base ranks of a launch generates, and the ranks that it has at each step. The first one has a
    rank leave at one step, another rank join at the next, and lets another job have its idle ranks at a third. The
    others hear of leaving ranks much later."""
    from fapool_plugin.integrations.megatron import layers

    first = group.rank() == 0
    os.environ.update(WORLD_SIZE=str(group.size()), MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    whole = load_parallel(folder, group, layers)
    settings = {"pool": "ray", "pool_name": pool, "pool_ranks": 8, "ray_address": address, "threshold": 16}
    settings |= {"activation": "length", "blocks": 1, "timeout_s": 5.0 if first else 100.0, "idle_keys_s": 2.0}
    model = FAPoolForCausalLM.wrap(whole, settings | {"kv_home": home}, agree=agree_over(group), base_ranks=2)
    leases = model.fa_pool.leases

    def leave() -> None:
        standing.standing(ray, pool)[0].leave.remote(60.0)
        until(lambda: leases.ranks[0].link.wishes.leaving, COMES_S, lambda: "the rank has said so")

    def come() -> None:
        if first:
            grow(ray, pool, range(2, 3))
        until(lambda: 2 in leases.pool.look({1}), COMES_S, lambda: "this base rank has found it")
        time.sleep(0.6 if first else 0.0)  # jobs ask for more no sooner

    def let_another() -> None:
        del os.environ["WORLD_SIZE"]
        time.sleep(2.5)
        with job(folder, pool, pool_ranks=1) as other, torch.no_grad():
            other(ids)
            assert other.fa_pool.stats()["activations"] == 1, other.fa_pool.stats()["events"]

    then = {1: leave, 2: come, 5: let_another} if first else {2: come}
    had: list[list[int]] = []
    with model.fa_pool, torch.no_grad():
        cache, tokens = None, ids
        for step in range(NEW):
            then.get(step, lambda: None)()
            out = model(tokens if cache is None else tokens[:, -1:], past_key_values=cache, use_cache=True)
            cache, tokens = out.past_key_values, torch.cat([tokens, out.logits[:, -1:].argmax(-1)], dim=1)
            had.append(leased(model))
        del cache, out
        again = model.generate(ids, **greedily(NEW))
        stats = model.fa_pool.stats()
    ray.shutdown()
    return {"tokens": [tokens, again], "had": had, "stats": stats}


@pytest.mark.parametrize("home", [pytest.param("base", marks=pytest.mark.full), "pool"])
def test_base_ranks_of_one_launch_are_one_job(
    folder: Path, pool: str, ids: Tensor, plain: Tensor, tmp_path: Path, home: str
) -> None:
    """They have the same ranks at each forward, whichever of them hears first, and keys are replayed once for each."""
    with base_ranks(tmp_path) as ranks:
        found = ranks.run(2, divided, folder, pool, ray.get_runtime_context().gcs_address, ids, home)
    events = [one["stats"]["events"] for one in found]
    for one in found:
        for tokens in one["tokens"]:
            assert_same_tokens(tokens, plain)
        assert one["had"] == found[0]["had"], events
        assert one["had"][:2] == [[0, 1], [1]], events
        assert one["had"][2:5] == [[1, 2] if home == "base" else [1]] * 3, events
        recalled = [event["kind"] for event in one["stats"]["events"]].count("recalled")
        # Where the base has the keys, one is told by the rank, and the other by the first.
        assert recalled == int(home == "pool" or one is found[0]), events
        assert one["stats"]["replays"] == (2 if home == "pool" else 0), events
        assert (one["stats"]["faults"], one["stats"]["leased_ranks"]) == (0, []), events
    until(lambda: states(pool) == ["ended", "free", "free"], COMES_S, lambda: f"both give it back: {states(pool)}")


@contextmanager
def another_job(folder: Path, pool: str) -> Iterator[Any]:
    """A process that has leased all ranks of a pool."""
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, str(SCRIPTS / "ray_job.py"), str(folder), pool]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == "leased [0, 1]\n"
            yield process
        finally:
            process.kill()


def test_a_killed_job_frees_its_ranks(folder: Path, pool: str) -> None:
    with another_job(folder, pool):
        assert states(pool) == ["leased", "leased"]
    until(lambda: states(pool) == ["free", "free"], 2 * SETTINGS.timeout_s, lambda: "its leases end with it")


def test_a_stopped_job_loses_its_ranks_to_one_that_asks_and_goes_on(
    folder: Path, pool: str, ids: Tensor, plain: Tensor
) -> None:
    prompt = torch.arange(3, 84)[None]
    expected = eager(folder).generate(prompt, **greedily(6))[0, 81:].tolist()
    with another_job(folder, pool) as other, job(folder, pool) as model:
        other.send_signal(signal.SIGSTOP)
        time.sleep(2.0 + 0.5)
        assert states(pool) == ["leased", "leased"], "as long as none asks"
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        assert model.fa_pool.stats()["prefill"]["pooled_calls"], model.fa_pool.stats()["events"]
        other.send_signal(signal.SIGCONT)
        print("go on", file=other.stdin, flush=True)
        assert other.stdout.readline() == f"said {expected}\n"
        knows = other.stdout.readline()
        assert "recalled" in knows, knows
        assert "fault" not in knows, knows


def test_what_cannot_be_had_is_told_in_one_sentence(cluster: Any, folder: Path, ids: Tensor, plain: Tensor) -> None:
    sentence = r"no rank of pool 'nowhere' can be had .* `fapool pool up --name nowhere`"
    with job(folder, "nowhere") as model, pytest.warns(RuntimeWarning, match=sentence):
        assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
    ran = CliRunner().invoke(app, ["pool", "status", "nowhere"])
    assert (ran.exit_code, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert "no pool nowhere stands" in ran.stderr


@pytest.mark.parametrize("how", ["the cluster does not answer", "a rank ends between two questions"])
def test_what_ray_says_in_the_middle_costs_no_token(
    folder: Path, pool: str, ids: Tensor, plain: Tensor, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ray.util.list_named_actors

    def listed(**how_many: Any) -> Any:
        if how == "the cluster does not answer":
            raise ray.exceptions.RaySystemError("gone")
        return [*real(**how_many), {"name": f"{pool}/7", "namespace": standing.NAMESPACE}]

    with job(folder, pool) as model:
        monkeypatch.setattr(ray.util, "list_named_actors", listed)
        if how == "the cluster does not answer":
            with pytest.warns(RuntimeWarning, match="the Ray cluster does not answer"):
                assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        else:
            assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
            assert model.fa_pool.stats()["prefill"]["pooled_calls"], model.fa_pool.stats()["events"]
        monkeypatch.undo()


def test_a_script_that_leaves_the_cluster_loses_no_token(
    folder: Path, pool: str, ids: Tensor, plain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a sequence a rank dies, and Ray is not there to be told; the next sequence finds no cluster."""

    def refused(**_: Any) -> None:
        raise ConnectionError("no cluster")

    with job(folder, pool) as model, torch.no_grad():
        cache = model(ids[:, :100], use_cache=True).past_key_values
        assert len(leased(model)) == 2
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", refused)
        monkeypatch.setattr(ray.actor.ActorMethod, "_remote", lambda *_, **__: pytest.fail("Ray is asked"))
        os.kill(model.fa_pool.leases.pool._ranks[0].pid, signal.SIGKILL)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert_same_tokens(model.generate(ids, past_key_values=cache, **greedily(NEW)), plain)
            del cache
            model.fa_pool.reap()
            assert_same_tokens(model.generate(ids, **greedily(NEW)), plain)
        assert model.fa_pool.stats()["faults"], model.fa_pool.stats()["events"]
        texts = [str(one.message) for one in told]
        assert any("pool rank 0" in text for text in texts), texts
        assert any("no Ray cluster was found" in text for text in texts), texts
        monkeypatch.undo()


def test_a_script_that_leaves_while_ranks_are_looked_for_stays_out(
    folder: Path, pool: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of Ray's that looking makes may be the first after that: none starts a cluster."""
    with job(folder, pool) as model, torch.no_grad():
        kept = model(ids, use_cache=True).past_key_values
        mine = model.fa_pool.leases.pool
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray would start a cluster"))
        with pytest.raises(RuntimeError, match="has not been initialized"):
            mine._find(print, {0, 1})
        monkeypatch.undo()
        monkeypatch.setattr("fapool_plugin.ranks.ray.place", lambda ray: ray.parts_that_are_gone)
        mine._look({0, 1})
        assert kept.get_seq_length() == ids.shape[1]


def test_stats_say_what_the_pool_does(folder: Path, pool: str, ids: Tensor) -> None:
    with job(folder, pool, pool_ranks=1) as model, torch.no_grad():
        kept = model(ids, use_cache=True).past_key_values

        def states_of() -> list[str]:
            return [one["state"] for one in model.fa_pool.stats()["pool"]]

        until(lambda: states_of() == ["leased", "free"], COMES_S, lambda: f"{model.fa_pool.stats()['pool']}")
        one = model.fa_pool.stats()["pool"][0]
        status = CliRunner().invoke(app, ["pool", "status", pool, "--json"])
        assert one.keys() - {"age_s"} == json.loads(status.stdout)["ranks"][0].keys()
        assert (one["rank"], one["job"]) == (0, f"pid {os.getpid()}")
        assert one["held_bytes"] > 0, one
        assert kept.get_seq_length() == ids.shape[1]


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(FAPoolConfigError, match=r"no Ray cluster was found at ray_address '127.0.0.1:9'"):
        standing.join("127.0.0.1:9")
    with pytest.raises(FAPoolConfigError, match=r"at ray_address 'local' .Ray would start another one"):
        standing.join("local")


def test_a_cluster_that_wants_another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray names the cause in the text of a cause only."""

    def refused(**_: Any) -> None:
        raise ConnectionError("Failed to connect") from RuntimeError("... ray.exceptions.AuthenticationError: ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(FAPoolConfigError, match=r"did not take the token of this process: set RAY_AUTH_MODE"):
        standing.join(None)
