"""Ordinary DeepSpeed inference scripts under real launchers: the tokens of one process without the plugin."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.launches import SCRIPTS, Launched, Setting, by_runner, deepspeed, launched, run, torchrun, until
from tests.models import assert_clear_choices, eager, one_thread, save_config, save_model, tiny_config

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]
pytest.importorskip("deepspeed")

LENGTHS = (30, 300, 40, 350)
NEW = 4
LAYERS = 2
EVEN = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "max_position_embeddings": 1024}
"""A model that AutoTP can divide by two."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models: with 3 KV heads, which no even number divides, and with 4, as AutoTP needs them."""
    place = tmp_path_factory.mktemp("models")
    return {
        "odd": save_model("llama", place / "odd", max_position_embeddings=1024),
        "even": save_model("llama", place / "even", **EVEN),
    }


def answers(folder: Path) -> list[list[int]]:
    """Greedy tokens of one process without the plugin, for every length."""
    found = []
    with one_thread():
        model = eager(folder)
        for length in LENGTHS:
            ids = torch.randint(3, 99, (1, length), generator=torch.Generator().manual_seed(length))
            out = model.generate(
                ids, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            assert_clear_choices(out.logits)
            found.append(out.sequences[0, length:].tolist())
    return found


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    return {name: answers(folder) for name, folder in folders.items()}


def arguments(config: str, folder: Path, out: Path, *more: str) -> list[str]:
    lengths = ",".join(map(str, LENGTHS))
    given = ["--deepspeed_config", config, "--model", str(folder), "--lengths", lengths, "--new", str(NEW)]
    return [*given, "--out", str(out), *more]


def only_long_prompts_were_pooled(stats: dict[str, Any]) -> None:
    long = sum(length > 64 for length in LENGTHS)
    assert stats["prefill"]["pooled_forwards"] == long, stats
    assert stats["prefill"]["local_forwards"] == len(LENGTHS) - long, stats
    assert stats["decode"]["pooled_calls"] == long * (NEW - 1) * LAYERS, stats
    assert (stats["activations"], stats["releases"]) == (long, long), stats["events"]
    kinds = [event["kind"] for event in stats["events"] if event["kind"] in ("activating", "idle")]
    assert kinds == ["activating", "idle"] * long, stats["events"]


LAYOUTS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "autotp 2 + 1": ("even", 3, {"tensor_parallel": {"tp_size": 2}}, {"base": {"tensor_parallel": "deepspeed"}}),
    "megatron 2 + 1": ("odd", 3, {"tensor_parallel": {"tp_size": 2}}, {}),
    "megatron 3 + 1": ("odd", 4, {}, {"base": {"tensor_parallel": "megatron", "tensor_parallel_size": 3}}),
    "1 + 2": ("odd", 3, {}, {"pool_ranks": 2}),
}


def mostly(names: Iterable[Any], *others: Any) -> list[Any]:
    """Parameters, of which ``others`` are near-duplicates: they run in the long matrix only."""
    return [pytest.param(name, marks=pytest.mark.full if name in others else ()) for name in names]


@pytest.mark.parametrize("layout", mostly(LAYOUTS, "megatron 3 + 1", "1 + 2", "autotp 2 + 1"))
def test_the_tokens_of_one_process(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], tmp_path: Path, layout: str
) -> None:
    name, ranks, settings, section = LAYOUTS[layout]
    if "megatron" in layout:
        pytest.importorskip("megatron.core")
    config = Setting(tmp_path, settings, section).write()
    done = run(tmp_path, [*deepspeed(ranks), *by_runner("infer.py"), *arguments(config, folders[name], tmp_path)])
    assert done.code == 0, done.said[-4000:]
    bases = ranks - section.get("pool_ranks", 1)
    for rank in range(bases):
        told = done.base(rank)
        assert told["answers"] == expected[name], f"base rank {rank}"
        only_long_prompts_were_pooled(told["stats"])
        size, rank_text = str(bases), str(rank)
        assert {told["world"][key] for key in ("WORLD_SIZE", "LOCAL_SIZE")} == {size}, told["world"]
        assert (told["world"]["RANK"], told["world"]["LOCAL_RANK"]) == (rank_text, rank_text), told["world"]
    assert f"attention replaced in {LAYERS} of {LAYERS} attention layers" in done.said


@pytest.mark.full
def test_torchrun_and_the_same_script(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    config = Setting(tmp_path, {"tensor_parallel": {"tp_size": 2}}, {"base": {"tensor_parallel": "deepspeed"}}).write()
    done = run(tmp_path, [*torchrun(3), *by_runner("infer.py"), *arguments(config, folders["even"], tmp_path)])
    assert done.code == 0, done.said[-4000:]
    assert done.base(0)["answers"] == done.base(1)["answers"] == expected["even"]
    only_long_prompts_were_pooled(done.base(0)["stats"])
    assert done.base(1)["world"]["LOCAL_WORLD_SIZE"] == "2"


def test_a_model_loaded_over_the_base_ranks(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Each reads and holds its part; no engine is needed."""
    pytest.importorskip("megatron.core")
    config = Setting(tmp_path, {}, {"base": {"tensor_parallel": "megatron"}}).write()
    done = run(tmp_path, [*torchrun(3), *by_runner("load.py"), *arguments(config, folders["odd"], tmp_path)])
    assert done.code == 0, done.said[-4000:]
    whole = sum(parameter.numel() for parameter in eager(folders["odd"]).parameters())
    for rank in range(2):
        told = done.base(rank)
        assert told["answers"] == expected["odd"], f"base rank {rank}"
        only_long_prompts_were_pooled(told["stats"])
        assert told["elements"] < 0.75 * whole, f"base rank {rank} holds {told['elements']} of {whole} elements"


@pytest.mark.full
def test_a_model_that_computes_attention_by_itself(tmp_path: Path) -> None:
    bloom = tiny_config("bloom", n_head=6, n_layer=2, without=("head_dim", "num_key_value_heads"))
    folder = save_config(bloom, tmp_path / "bloom")
    given = arguments(Setting(tmp_path).write(), folder, tmp_path)
    told_once(run(tmp_path, [*deepspeed(2), *by_runner("infer.py"), *given]), "computes attention by itself")


def test_one_line_at_the_top_of_a_script(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    config = Setting(tmp_path).write()
    script = tmp_path / "with_setup.py"
    lines = f"import fapool_plugin.integrations.deepspeed as fapool\nfapool.setup({config!r})\n"
    script.write_text(lines + (SCRIPTS / "infer.py").read_text())
    done = run(tmp_path, [*deepspeed(2), str(script), *arguments(config, folders["odd"], tmp_path)])
    assert done.code == 0, done.said[-4000:]
    assert done.base()["answers"] == expected["odd"]
    only_long_prompts_were_pooled(done.base()["stats"])


@pytest.mark.parametrize("section", mostly([None, {"enabled": False}], {"enabled": False}))
def test_nothing_changes_without_a_section(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], tmp_path: Path, section: Any
) -> None:
    config = tmp_path / "ds.json"
    tensor_parallel = {"dtype": "float32", "max_out_tokens": 1024, "tensor_parallel": {"tp_size": 2}}
    config.write_text(json.dumps(tensor_parallel | ({"fa_pool": section} if section else {})))
    script = by_runner("infer.py")
    done = run(tmp_path, [*deepspeed(2), *script, *arguments(str(config), folders["even"], tmp_path)])
    assert done.code == 0, done.said[-4000:]
    for rank in range(2):
        assert done.base(rank)["answers"] == expected["even"]
        assert done.base(rank)["stats"] is None
        assert done.base(rank)["world"]["WORLD_SIZE"] == "2"


def test_a_killed_worker_comes_back(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    config = Setting(tmp_path).write()
    command = [*deepspeed(2), *by_runner("infer.py"), *arguments(config, folders["odd"], tmp_path, "--pause", "4")]
    with launched(tmp_path, command) as launch:
        until(lambda: (tmp_path / "answered0").exists() and (tmp_path / "answered0").read_text() >= "2", 90)
        first = launch.workers()
        assert len(first) == 1
        os.kill(first.pop(), signal.SIGKILL)
        done = launch.wait()
    assert done.code == 0, done.said[-4000:]
    told = done.base()
    assert told["answers"] == expected["odd"]
    only_long_prompts_were_pooled(told["stats"])
    assert "its worker (pid" in done.said
    assert "ended with exit code -9" in done.said


@pytest.mark.full
@pytest.mark.parametrize("after", [1, 2])
def test_a_stopped_worker_is_replaced(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], tmp_path: Path, after: int
) -> None:
    """Before its first link, after the short prompt, and later."""
    config = Setting(tmp_path, fa_pool={"timeout_s": 1.0}).write()
    command = [*deepspeed(2), *by_runner("infer.py"), *arguments(config, folders["odd"], tmp_path, "--pause", "3")]
    with launched(tmp_path, command) as launch:
        until(lambda: (tmp_path / "answered0").exists() and (tmp_path / "answered0").read_text() >= str(after), 90)
        (stopped,) = launch.workers()
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: launch.workers() - {stopped}, 60)
        until(lambda: stopped not in launch.workers(), 10)
        done = launch.wait()
    assert done.code == 0, done.said[-4000:]
    assert done.base()["answers"] == expected["odd"]
    events = done.base()["stats"]["events"]
    assert any(event["kind"] == "fault" for event in events), events


@pytest.mark.parametrize(
    "victim", mostly(["base rank 0", "base rank 1", "launcher", "exception"], "base rank 1", "launcher", "exception")
)
def test_nobody_stays_when_base_ranks_are_gone(folders: dict[str, Path], tmp_path: Path, victim: str) -> None:
    config = Setting(tmp_path, {"tensor_parallel": {"tp_size": 2}}, {"base": {"tensor_parallel": "deepspeed"}}).write()
    given = arguments(config, folders["even"], tmp_path, "--pause", "60" if victim.startswith("base") else "1")
    if victim == "exception":
        given[given.index("--lengths") + 1] = "30,300,nonsense"
    with launched(tmp_path, [*deepspeed(3), *by_runner("infer.py"), *given]) as launch:
        if victim != "exception":
            until(lambda: (tmp_path / "answered1").exists() and launch.workers(), 90)
        if victim == "launcher":
            for process in launch.processes("deepspeed"):
                if _launches(process):
                    process.kill()
            until(lambda: (tmp_path / "base0.json").exists() and (tmp_path / "base1.json").exists(), 90)
        elif victim != "exception":
            (base,) = [p for p in launch.processes("fapool_plugin.run") if _is_base(p, victim[-1])]
            base.kill()
        if victim != "launcher":
            assert launch.wait().code != 0
        launch.all_gone(10.0)


def _launches(process: psutil.Process) -> bool:
    """Whether it is one of the launcher's own two processes."""
    return "RANK" not in process.environ()


def _is_base(process: psutil.Process, rank: str) -> bool:
    return process.environ().get("RANK") == rank and f"--local_rank={rank}" in process.cmdline()


def told_once(done: Launched, words: str) -> None:
    """An error of one paragraph, by one rank, and an exit code that says so."""
    assert done.code not in (0, None), done.said[-4000:]
    lines = [line for line in done.said.splitlines() if words in line]
    assert len(lines) == 1, f"{len(lines)} lines with {words!r}:\n{done.said[-4000:]}"
    # torch.distributed, once started, puts the rank before what is said at the end.
    assert lines[0].removeprefix("[rank0]: ").startswith("fa_pool: "), lines[0]
    assert "Traceback" not in done.said, done.said[-4000:]


WRONG: dict[str, tuple[int, dict[str, Any], dict[str, Any], list[str], str]] = {
    "no base rank": (2, {}, {"pool_ranks": 2}, [], "pool_ranks is 2, and the launch has 2 ranks"),
    "a typo": (2, {}, {"pool_rank": 1}, [], 'did you mean "pool_ranks"?'),
    "kernel injection": (
        2, {}, {}, ["--options", '{"replace_with_kernel_inject": true}'], "take over their attention",
    ),
    "more tensor-parallel ranks than KV heads": (
        5, {}, {"base": {"tensor_parallel": "megatron", "tensor_parallel_size": 4}}, [], "3 KV heads",
    ),
    "a busy port": (2, {}, {"store_port": -1}, [], "is in use"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", mostly(WRONG, *sorted(WRONG.keys() - {"a busy port"})))
def test_wrong_flags_are_told_once(folders: dict[str, Path], tmp_path: Path, wrong: str) -> None:
    ranks, settings, section, more, words = WRONG[wrong]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        if "store_port" in section:
            section = section | {"store_port": busy.getsockname()[1]}
        config = Setting(tmp_path, settings, section).write()
        given = arguments(config, folders["odd"], tmp_path, *more)
        told_once(run(tmp_path, [*deepspeed(ranks), *by_runner("infer.py"), *given]), words)


def test_a_launch_that_is_none(folders: dict[str, Path], tmp_path: Path) -> None:
    config = Setting(tmp_path).write()
    command = [sys.executable, "-m", "fapool_plugin.run", str(SCRIPTS / "infer.py")]
    told_once(run(tmp_path, [*command, *arguments(config, folders["odd"], tmp_path)]), "was not launched")


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_fifty_launches_on_a_busy_machine_end_with_code_0(folders: dict[str, Path], tmp_path: Path) -> None:
    """An interpreter that tears down beside threads of stores and links may abort, and a launcher tells of a failed
    job: seen in 2 of 22 launches. Four at a time keep each other waiting."""
    config = Setting(tmp_path, {}, {"pool_ranks": 2}).write()
    given = ["--deepspeed_config", config, "--model", str(folders["odd"]), "--lengths", "300", "--new", "2"]

    def launch(number: int) -> tuple[int | None, str]:
        out = tmp_path / str(number)
        out.mkdir()
        ended = run(out, [*deepspeed(3), *by_runner("infer.py"), *given, "--out", str(out)])
        assert (out / "base0.json").exists(), ended.said[-4000:]
        return ended.code, ended.said

    with ThreadPoolExecutor(4) as several:
        ended = list(several.map(launch, range(50)))
    assert [code for code, _ in ended] == [0] * 50, next(said for code, said in ended if code)[-4000:]
