"""`fapool simulate` end to end: its figures against the simulation's own, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.traffic import Planned, Request, Setting, simulate
from fapool_plugin.tools import cli
from fapool_plugin.tools.cluster import find_hardware, read_model

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "configs" / "models" / "llama3_8b.json"
HARDWARE = ("--hardware", "h100-sxm", "--config", LLAMA, "--base-ranks", 2)
TRACE = [Request(0.0, 1000, 50), Request(0.1, 40_000, 20), Request(0.2, 40_000, 20), Request(9.0, 500, 1)]


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_a_trace_with_a_pool_and_without(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text("".join(json.dumps(one._asdict()) + "\n" for one in TRACE))
    done = invoke("simulate", *HARDWARE, "--trace", trace, "--pool-ranks", "0,2", "--json", out)
    assert done.exit_code == 0, done.output
    assert "4 requests, 1 job(s) of 2 h100-sxm" in done.output
    rows = {row["name"]: row for row in json.loads(out.read_text())["pools"]}
    model, base = read_model(LLAMA, 2)
    speeds = Planned(Cluster(find_hardware("h100-sxm"), model, base, "between-nodes"))
    settings = {"0": Setting(1, 0, 0, 16_384), "2": Setting(1, 2, 2, 16_384), "2 as bases": Setting(2, 0, 0, 16_384)}
    assert rows.keys() == settings.keys()
    for name, setting in settings.items():
        found, row = simulate(TRACE, setting, speeds), rows[name]
        assert row["seconds"] == found.seconds
        assert row["tokens_per_s"] == pytest.approx(91 / found.seconds)
        assert (row["short"]["requests"], row["long"]["requests"]) == (2, 2)
        gpu_s = setting.jobs * 2 * found.seconds + found.leased_s
        assert row["gpu_hours_per_million"]["leased"] == pytest.approx(gpu_s / 3600 / 91 * 1e6)
    assert rows["2"]["long"]["ttft_s"][0] < rows["0"]["long"]["ttft_s"][0], "the pool makes long prompts faster"
    assert 0 < rows["2"]["pool_leased"] < 1


def test_speeds_are_the_planners() -> None:
    model, base = read_model(LLAMA, 2)
    made = Cluster(find_hardware("h100-sxm"), model, base, "between-nodes")
    speeds = Planned(made)
    assert speeds.step_s(8, 4096, 0) == made.alone_s("decode", 8, 4096)
    assert speeds.prompt_s(32_768, 2) == made.pooled("prefill", 1, 32_768, 2).seconds
    assert made.pooled("prefill", 1, 64, 2).seconds > made.alone_s("prefill", 1, 64) == speeds.prompt_s(64, 2)
    low, high = (made.alone_s("decode", 8, tokens) for tokens in (4096, 6144))
    assert speeds.step_s(7, 5120, 0) == pytest.approx((low + high) / 2), "rows are rounded up, tokens lie between"
    # 80 GiB less reserve for 2 GPUs, less 16 GB of weights, 128 KiB a token.
    assert speeds.room(0) == pytest.approx((2 * (80 * 2**30 - 4.17e9) - 16.06e9) / (128 * 1024), rel=0.01)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "has no line"),
        ('{"at_s": 0, "prompt": 5, "new": 5}\nx\n', "line 2: 'x' is no request"),
        ('{"at_s": 0, "prompt": 5}\n', "line 1"),
        ('{"at_s": -1, "prompt": 5, "new": 5}\n', "line 1"),
        ('{"at_s": 0, "prompt": 0, "new": 5}\n', "line 1"),
        ("[1, 2, 3]\n", "line 1"),
    ],
)
def test_a_wrong_trace_is_told_in_a_line(lines: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(lines)
    done = invoke("simulate", *HARDWARE, "--trace", tmp_path / "trace.jsonl")
    assert done.exit_code == 2, done.output
    assert told in done.output
    assert len(done.output.splitlines()) == 1, done.output


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--rate", 0), "--rate 0.0"),
        (("--long-part", 2), "a part of 0 to 1"),
        (("--jobs", 0), "--jobs is 0"),
        (("--trace", "none.jsonl"), "is no file"),
        (("--pool-ranks", "x"), "'x' is no whole number of at least 0"),
    ],
)
def test_what_cannot_be_simulated_is_told_in_a_line(args, told: str) -> None:
    done = invoke("simulate", *HARDWARE, *args)
    assert done.exit_code == 2, done.output
    assert told in done.output
    assert len(done.output.splitlines()) == 1, done.output
