"""Benchmarks at toy size: numbers are right and complete, wrong answers are refused, nothing is left running."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from examples import peers
from fapool_plugin.tools.bench import command as bench
from fapool_plugin.tools.bench import contenders
from fapool_plugin.tools.bench import turns as bench_turns
from fapool_plugin.tools.bench.contenders import Contender, ContenderError, Team
from fapool_plugin.tools.bench.report import Report, Result
from fapool_plugin.wire.messages import HEADER_BYTES
from tests.benches import LIMIT_S, complete, run

ALONE, NOTHING = (f"fapool_plugin.tools.bench.attention.{name}" for name in ("alone", "nothing"))
RING = "examples.peers.ring"
SHAPE = {"tokens": 70, "heads": 4, "kv_heads": 2, "head_dim": 16}


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_prefill(tmp_path, none_left) -> None:
    file, picture = tmp_path / "prefill.json", tmp_path / "prefill.svg"
    words = ["--model", "random", "--tokens", "300", "--threshold", "64", "--runs", "2"]
    done = run("prefill", *words, "--json", str(file), "--plot", str(picture))
    assert done.exit_code == 0, done.output
    found = complete(file, 2)
    assert list(found) == ["sdpa, 1 thread", "sdpa, 2 threads", "fapool, 1 + 1"]
    for facts in found["fapool, 1 + 1"]["facts"]:
        assert facts["pooled_calls"] > 0
        assert (facts["local_calls"], facts["faults"]) == (0, 0)
        assert facts["bytes_sent"] > 0
    for seconds, facts in zip(
        found["sdpa, 1 thread"]["seconds"]["turns"], found["sdpa, 1 thread"]["facts"], strict=True
    ):
        assert 0 < facts["attention_s"] < seconds
    assert "speed-up" in done.output
    assert picture.stat().st_size > 0


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_control(tmp_path, none_left) -> None:
    file = tmp_path / "control.json"
    words = ["--rows", "5", "--kv-heads", "2", "--pool-ranks", "3", "--layers", "2", "--steps", "1"]
    done = run("control", *words, "--json", str(file))
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found["options"]["rows"] == 5
    assert set(found["measured"]) == {"nowhere", "sockets"}
    for phases in found["measured"].values():
        assert set(phases) == {"prefill", "decode"}
        assert all(0 < value < 1e4 for measured in phases.values() for value in measured.values()), phases
    assert "budget: plan 5, call 1" in done.output
    for word in words[0:8:2]:
        refused = run("control", word, "0")
        assert (refused.exit_code, f"{word} is 0" in refused.output) == (2, True), refused.output
    assert "--layers is 1" in run("control", "--layers", "1").output


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_decode(tmp_path, none_left) -> None:
    file = tmp_path / "decode.json"
    words = ["--model", "random", "--tokens", "300", "--threshold", "64", "--steps", "3", "--batch", "2"]
    done = run("decode", *words, "--runs", "2", "--json", str(file))
    assert done.exit_code == 0, done.output
    found = complete(file, 2)
    own = ["own kernel, 1 thread", "own kernel, 2 threads"]
    assert list(found) == ["sdpa, 1 thread", "sdpa, 2 threads", *own, "fapool, 1 + 1", "fapool by plan, 2 + 1"]
    assert not any(facts["pooled_calls"] for label in own for facts in found[label]["facts"])
    assert "fapool by plan, 2 + 1: " in done.output, "whether it pooled is not said"
    layers, steps, tables = 4, 3 + 1, 8 * 64
    queries = 4 * 2 * 8 * 64  # fp32, two sequences, eight heads of 64
    for facts in found["fapool, 1 + 1"]["facts"]:
        assert facts["pooled_calls"] == layers * steps
        sent = facts["bytes_sent"] / (layers * steps)
        assert sent <= HEADER_BYTES + queries + tables, f"{sent} bytes a call: keys were sent within the turn"
        assert len(facts["step_seconds"]) == 3


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("lengths", [["--tokens", "300"], ["--lengths", "50:300"]])
def test_decode_with_keys_on_the_pool(tmp_path, none_left, lengths: list[str]) -> None:
    file = tmp_path / "decode.json"
    words = ["--model", "random", *lengths, "--threshold", "64", "--steps", "3", "--batch", "4"]
    done = run("decode", *words, "--runs", "1", "--kv-home", "pool", "--json", str(file))
    assert done.exit_code == 0, done.output
    found = complete(file, 1)
    assert list(found) == ["own kernel, 1 thread", "own kernel, 2 threads", "fapool, 1 + 1"]
    (facts,) = found["fapool, 1 + 1"]["facts"]
    # Once or twice a layer: a step may be taken in two parts.
    assert facts["pooled_calls"] in (4 * 4, 2 * 4 * 4)


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_attention(tmp_path, none_left) -> None:
    file = tmp_path / "attention.json"
    done = run("attention", "--tokens", "301", "--heads", "4", "--kv-heads", "2", "--runs", "2", "--json", str(file))
    assert done.exit_code == 0, done.output
    found = complete(file, 2)
    assert list(found) == ["alone, 1 thread", "pool of 2, base idle", "alone, 2 threads"]
    assert not [label for label, contender in found.items() if contender["refused"]]
    shipped = 4 * 301 * 64 * (4 + 2 * 2)  # q, k, v in fp32, each needed by one rank at least
    for facts in found["pool of 2, base idle"]["facts"]:
        assert facts["bytes_sent"] >= shipped, "what the ranks need was sent before the clock ran"


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_short(tmp_path, none_left) -> None:
    file = tmp_path / "short.json"
    words = ["--model", "random", "--tokens", "64", "--threshold", "64", "--threads", "1", "--runs", "4"]
    done = run("short", *words, "--json", str(file))
    assert done.exit_code == 0, done.output
    found = complete(file, 4)
    assert list(found) == ["without the plugin", "with it"]
    assert all(facts["pooled_calls"] == 0 for facts in found["with it"]["facts"])


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.timeout(300)
def test_peers_compute_the_same_or_say_why_not(tmp_path, none_left) -> None:
    file = tmp_path / "peers.json"
    words = ["--tokens", "300", "--threshold", "64", "--runs", "1"]
    done = CliRunner().invoke(peers.app, ["prefill", *words, "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = complete(file, 1)
    assert len(found) == 6
    assert found["transformers TP, 2 x 1"]["refused"] is None
    for label in ("DeepSpeed AutoTP, 2 x 1", "DeepSpeed Ulysses, 2 x 1"):
        refused = found[label]["refused"]
        assert refused is None or "deepspeed" in refused
        assert refused is None or refused in " ".join(done.output.split())


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_a_ring_computes_the_same(tmp_path, none_left) -> None:
    file = tmp_path / "ring.json"
    words = ["--tokens", "301", "--heads", "4", "--kv-heads", "2", "--runs", "1"]
    done = CliRunner().invoke(peers.app, ["attention", *words, "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert complete(file, 1)["zigzag ring of 2"]["refused"] is None


def quiet(stage: str, done: int, total: int | None) -> None:
    pass


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_a_wrong_answer_is_refused(none_left) -> None:
    """Another number of tokens is another answer."""
    right = Contender("right", ALONE, SHAPE)
    other = SHAPE | {"tokens": SHAPE["tokens"] + 1}
    with pytest.raises(bench_turns.WrongAnswerError, match="ours: its answer differs"):
        bench_turns.compare([[right], [Contender("ours", ALONE, other)]], 1, quiet)
    peer = Contender("theirs", ALONE, other, is_peer=True)
    results = bench_turns.compare([[right], [peer]], 2, quiet)
    assert len(results[0].seconds) == 2
    assert "its answer differs" in (results[1].refused or "")


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_a_command_reports_nothing_after_a_wrong_answer(monkeypatch, tmp_path, none_left) -> None:
    def contender(label: str, make: str, options: dict[str, Any], **others: Any) -> Contender:
        spoilt = options | {"tokens": options["tokens"] + 1} if label == "alone, 2 threads" else options
        return Contender(label, make, spoilt, **others)

    monkeypatch.setattr(bench, "Contender", contender)
    file = tmp_path / "attention.json"
    done = run("attention", "--tokens", "64", "--runs", "1", "--json", str(file))
    assert done.exit_code == 1, done.output
    assert "alone, 2 threads: its answer differs" in done.output
    assert "speed-up" not in done.output
    assert not file.exists()


@pytest.mark.parametrize(
    ("claims", "facts", "told"),
    [
        ("pooled", {"pooled_calls": 0, "local_forwards": 1}, "0 attention calls were pooled"),
        ("pooled", {"pooled_calls": 8, "local_forwards": 1}, "1 forwards were local"),
        ("pooled", {"pooled_calls": 8, "faults": 1}, "lost 1 pool rank"),
        ("local", {"pooled_calls": 8}, "8 attention calls were pooled"),
        ("pooled", {"pooled_calls": 8, "local_forwards": 0, "faults": 0}, None),
        ("local", {"pooled_calls": 0, "local_forwards": 1}, None),
        (None, {}, None),
    ],
)
def test_who_does_not_what_it_stands_for_is_refused(claims, facts, told) -> None:
    sums = contenders.checksum(torch.arange(100.0))
    one = result("ours", [], claims=claims)
    answer = {"seconds": 1.0, "checksum": sums, "facts": facts}
    if told is None:
        bench_turns._keep(one, answer, sums)
        assert (one.seconds, one.facts) == ([1.0], [facts])
        return
    with pytest.raises(bench_turns.WrongAnswerError, match=told):
        bench_turns._keep(one, answer, sums)


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_who_breaks_down_is_named_with_the_reason(none_left) -> None:
    right = Contender("right", ALONE, SHAPE)
    for broken, reason in (
        (Contender("theirs", NOTHING, SHAPE, is_peer=True), "AttributeError"),
        (Contender("theirs", ALONE, SHAPE | {"tokens": -1}, is_peer=True), "RuntimeError"),
    ):
        results = bench_turns.compare([[right], [broken]], 1, quiet)
        assert reason in (results[1].refused or ""), results[1]
        assert len(results[0].seconds) == 1
    with pytest.raises(ContenderError, match="ours: AttributeError"):
        bench_turns.compare([[Contender("ours", NOTHING, SHAPE)]], 1, quiet)


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_a_killed_process_is_an_error_with_its_exit_code(tmp_path, none_left) -> None:
    with Team([Contender("ring", RING, SHAPE, processes=2)], tmp_path / "ring") as team:
        team.start()
        assert team.turn(team.contenders[0])["seconds"] > 0
        team._processes[0].kill()
        with pytest.raises(ContenderError, match=r"exit code -9|[Cc]onnection"):
            team.turn(team.contenders[0])


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_who_starts_anew_runs_in_its_turns_only(none_left) -> None:
    running: list[int] = []

    def children(stage: str, done: int, total: int | None) -> None:
        running.append(len(psutil.Process().children()))

    before = len(psutil.Process().children())
    anew = Contender("anew", ALONE, SHAPE, starts_anew=True)
    broken = Contender("theirs", NOTHING, SHAPE, starts_anew=True, is_peer=True)
    results = bench_turns.compare([[anew], [broken]], 2, children)
    assert len(results[0].seconds) == 2
    assert "AttributeError" in (results[1].refused or "")
    assert running == [before] * 4, "between turns"


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
def test_idle_contenders_leave_the_cores_alone(tmp_path, none_left) -> None:
    for contender in (
        Contender("alone", ALONE, SHAPE, threads=2),
        Contender("ring", RING, SHAPE, processes=2),
    ):
        with Team([contender], tmp_path / contender.label) as team:
            team.start()
            team.turn(contender)
            processes = [psutil.Process(process.pid) for process in team._processes]

            def used(processes: list[psutil.Process] = processes) -> float:
                return sum(sum(process.cpu_times()[:2]) for process in processes)

            time.sleep(0.5)
            before = used()
            time.sleep(1.0)
            assert used() - before < 0.2, f"{contender.label} used {used() - before:.2f} s of a core in a second"


@pytest.mark.processes
@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.full)])
def test_the_processes_of_an_ended_benchmark_end(how: signal.Signals) -> None:
    """In the middle of a turn that would take very long."""
    # A shell's background jobs ignore ^C, and so would their children.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from fapool_plugin.tools.bench.command import app; app()"
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "attention", "--tokens", "200000", "--runs", "1"], cwd=root, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        assert any(b"turn(s)" in line for line in process.stderr), "it ended before the first turn"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 6, children  # alone twice, the base, its fork server and its two ranks
        process.send_signal(how)
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    _, alive = psutil.wait_procs(children, 30)
    assert not alive, f"still running: {alive}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["prefill", "--tokens", "0"], "--tokens is 0"),
        (["prefill", "--runs", "-1"], "--runs is -1"),
        (["prefill", "--tokens", "100", "--threshold", "100"], "not above --threshold 100"),
        (["prefill", "--threshold", "-1"], "threshold = -1"),
        (["prefill", "--pool-ranks", "100000"], "available"),
        (["prefill", "--model", "no/such/folder"], "no/such/folder is no folder"),
        (["decode", "--steps", "0"], "--steps is 0"),
        (["decode", "--batch", "0"], "--batch is 0"),
        (["decode", "--lengths", "500:4096"], "--lengths 500:4096 with --batch 1; give SHORTEST:LONGEST"),
        (["decode", "--lengths", "4096:500", "--batch", "4"], "--lengths 4096:500 with --batch 4"),
        (["decode", "--tokens", "4096"], "not above --threshold 4096"),
        (["attention", "--heads", "3", "--kv-heads", "2"], "--heads 3 is no multiple of --kv-heads 2"),
        (["attention", "--json", "."], "is a folder"),
        (["attention", "--json", "no/such/file.json"], "there is no folder no/such"),
        (["attention", "--plot", "picture.txt"], "picture.txt"),
        (["training", "--batch", "0"], "--batch is 0"),
        (["training", "--base-threads", "0"], "--base-threads is 0"),
        (["training", "--tokens", "2048"], "not above --threshold 2048"),
        (["short", "--tokens", "5000"], "above --threshold 4096"),
        (["short", "--threads", "0"], "--threads is 0"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(monkeypatch, words, told) -> None:
    monkeypatch.setattr(contenders.subprocess, "Popen", None)
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert told in " ".join(done.output.split()), done.output


def result(label: str, seconds: list[float], facts: dict[str, Any] | None = None, **others: Any) -> Result:
    return Result(Contender(label, "", {}, **others), seconds, [facts or {} for _ in seconds])


def test_speedups_are_taken_turn_by_turn() -> None:
    report = Report("test", {}, "a call", [result("a", [2.0, 8.0, 4.0]), result("b", [1.0, 2.0, 8.0])])
    assert report.speedups(report.results[1]) == [2.0, 4.0, 0.5]
    values = report.as_dict()["contenders"][1]
    assert values["speedup"] == {"median": 2.0, "min": 0.5, "max": 4.0}
    assert values["seconds"] == {"median": 2.0, "min": 1.0, "max": 8.0, "turns": [1.0, 2.0, 8.0]}


def test_the_ceiling_is_that_of_threads_and_of_what_is_not_shared(monkeypatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    baseline = result("alone", [10.0, 10.0, 12.0], {"attention_s": 6.0})
    threads = result("threads", [1.0] * 3, threads=2)
    pooled = result("pool", [1.0] * 3, pool_threads=3, claims="pooled")
    many = result("many", [1.0] * 3, threads=9)
    idle = result("idle", [1.0] * 3, pool_threads=2, idle_threads=1)
    report = Report("test", {}, "a call", [baseline, threads, pooled, many, idle])
    # 4 of the 10 seconds are not attention: 2.5 at most; and four cores are no nine.
    assert [report.ceiling(one) for one in report.results] == [None, 2.0, 2.5, 4.0, 2.0]
    # Where nearly everything is attention, threads are the limit.
    baseline.facts[:] = [{"attention_s": 9.9}] * 3
    assert report.ceiling(pooled) == 4.0
    # A cache of its own makes the baseline's rest no limit.
    pooled.facts[:] = [{"least_s": 2.0}] * 3
    assert report.ceiling(pooled) == 5.0


def test_answers_are_compared_by_value_and_by_place() -> None:
    def sums(**changes: Any) -> dict[str, Any]:
        return {"argmax": 3, "margin": 1.0, "values": [4.0, 1.0]} | changes

    assert bench_turns.difference(sums(values=[4.0009, 1.0]), sums()) is None
    for wrong in ([4.0, 1.0011], [4.0, float("nan")], [4.0, float("inf")]):
        assert "differs" in (bench_turns.difference(sums(values=wrong), sums()) or ""), wrong
    assert "largest value is at 5" in (bench_turns.difference(sums(argmax=5), sums()) or "")
    assert bench_turns.difference(sums(argmax=5), sums(margin=1e-3)) is None, "a near-tie"
    small = sums(values=[1e-2, 1e-3])
    assert "differs" in (bench_turns.difference(sums(values=[1e-2, 1.1e-3]), small) or ""), "relative below 1"


def test_a_checksum_sees_the_ends_and_the_largest_value() -> None:
    computed = torch.arange(200.0).view(2, 100)
    found = contenders.checksum(computed)
    assert (found["argmax"], found["margin"]) == (199, 1.0)
    assert found["values"][0] == found["values"][-1] == 199.0
    assert found["values"][1] == 0.0
