"""`fapool simulate` end to end: its figures against the simulation's own, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fapool_plugin.plan.arrivals import Request
from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.context_parallel import keys_divided_s, ring_s, ulysses_s
from fapool_plugin.plan.jobs import Setting
from fapool_plugin.plan.speeds import Divided, Planned, Speeds
from fapool_plugin.plan.traffic import simulate
from fapool_plugin.tools import cli
from fapool_plugin.tools.cluster import find_hardware, read_model
from fapool_plugin.tools.traffic_plot import within

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
    made = Cluster(find_hardware("h100-sxm"), model, base, "between-nodes")
    ways: dict[str, tuple[Setting, Speeds]] = {
        "0": (Setting(1, 0, 0, 16_384), Planned(made)),
        "2": (Setting(1, 2, 2, 16_384), Planned(made)),
        "2 fixed": (Setting(1, 2, 2, 16_384, fixed=True), Planned(made)),
        "2 as bases": (Setting(2, 0, 0, 16_384), Planned(made)),
        "2 as CP": (Setting(1, 0, 0, 16_384), Divided(made, 2)),
    }
    assert rows.keys() == ways.keys()
    for name, (setting, speeds) in ways.items():
        found, row = simulate(TRACE, setting, speeds), rows[name]
        assert row["seconds"] == found.seconds
        assert row["tokens_per_s"] == pytest.approx(91 / found.seconds)
        assert (row["short"]["requests"], row["long"]["requests"]) == (2, 2)
        gpu_s = (4 if name == "2 as CP" else setting.jobs * 2) * found.seconds + found.leased_s
        assert row["gpu_hours_per_million"]["leased"] == pytest.approx(gpu_s / 3600 / 91 * 1e6)
        assert row["bases_busy"] == pytest.approx(found.base_busy_s / setting.jobs / found.seconds)
    assert rows["2"]["long"]["ttft_s"][0] < rows["0"]["long"]["ttft_s"][0], "the pool makes long prompts faster"
    assert 0 < rows["2"]["pool_leased"] < 1 == rows["2 fixed"]["pool_leased"]


def test_divided_speeds_are_the_formulas() -> None:
    model, base = read_model(LLAMA, 2)
    made = Cluster(find_hardware("h100-sxm"), model, base, "between-nodes")
    two, three = Divided(made, 2), Divided(made, 3)
    ring, ulysses = ring_s(made, 32_768, 2), ulysses_s(made, 32_768, 2)
    assert two.prompt_s(32_768, 0) == min(ring, ulysses)
    assert three.prompt_s(32_768, 0) == ring_s(made, 32_768, 3), "16 heads have no whole thirds"
    assert two.step_s(8, 4096, 0) == keys_divided_s(made, 8, 4096, 2)
    assert two.room(0) == 2 * Planned(made).room(0)


def test_losses_joins_leaves_and_chunks(tmp_path: Path) -> None:
    """Each is told and counted, and the same seed gives the same."""
    args = ("--pool-ranks", 4, "--jobs", 2, "--rate", 1, "--seconds", 20, "--long-part", 0.3, "--threshold", 500)
    more = ("--mtbf-hours", 0.005, "--restart-s", 10, "--joins", "5:2", "--pools", 2, "--chunk", 8192)
    lost = ("--base-mtbf-hours", 0.009, "--base-restart-s", 5, "--detect-s", 2, "--wait")
    found = []
    for name in ("a", "b"):
        out = tmp_path / name
        done = invoke(
            "simulate", *HARDWARE, *args, *more, *lost, "--leaf-gpus", 8, "--oversubscription", 4, "--json", out
        )
        assert done.exit_code == 0, done.output
        found.append(json.loads(out.read_text()))
        for row in found[-1]["pools"]:
            row.pop("simulated_in_s")
    assert found[0] == found[1]
    assert (found[0]["joins"], found[0]["oversubscription"], found[0]["chunk"]) == ([[5.0, 2]], 4.0, 8192)
    elastic, fixed, bases, divided = found[0]["pools"]
    assert elastic["losses"] > 0
    assert elastic["lost_s"] > 0
    assert f"{elastic['losses']} ranks lost" in done.output
    assert (bases["name"], bases["jobs"], bases["losses"]) == ("4 as bases", 2 + 8 // 2, 0)
    assert divided["base_losses"] > elastic["base_losses"] > 0, "three times as many GPUs"
    assert elastic["base_losses"] < bases["base_losses"], "three times as many bases"
    assert f"{elastic['base_losses']} base(s) lost" in " ".join(done.output.split())
    assert fixed["lease"] == 4
    requests = sum(elastic[kind]["requests"] for kind in ("short", "long"))
    assert all(sum(row[kind]["requests"] for kind in ("short", "long")) == requests for row in found[0]["pools"])


def test_ranks_under_other_leaves_are_slower() -> None:
    model, base = read_model(LLAMA, 2)
    made = Cluster(find_hardware("h100-sxm"), model, base, "between-nodes")
    speeds = Planned(made, oversubscription=4)
    far = Cluster(made.hardware, model, base, "between-nodes", oversubscription=4).pooled("prefill", 1, 65_536, 4)
    assert far.seconds > speeds.prompt_s(65_536, 4, False) == made.pooled("prefill", 1, 65_536, 4).seconds
    assert speeds.prompt_s(65_536, 4, True) == min(far.seconds, made.alone_s("prefill", 1, 65_536))
    assert Planned(made).prompt_s(65_536, 4, True) == speeds.prompt_s(65_536, 4, False), "1: nothing is shared"


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
        ('{"at_s": 0, "prompt": 5.5, "new": 5}\n', "line 1"),
        ('{"at_s": 0, "prompt": "5", "new": 5}\n', "line 1"),
        ('{"at_s": NaN, "prompt": 5, "new": 5}\n', "line 1"),
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
        (("--rate", "nan"), "--rate nan"),
        (("--seconds", "inf"), "--seconds inf"),
        (("--bursts", "nan"), "--bursts nan"),
        (("--rate", 1e6, "--seconds", 1e6), "is 1e+12 requests; give at most 1e+07"),
        (("--long-part", 2), "a part of 0 to 1"),
        (("--jobs", 0), "--jobs is 0"),
        (("--trace", "none.jsonl"), "is no file"),
        (("--pool-ranks", "x"), "'x' is no whole number of at least 0"),
        (("--mtbf-hours", 0), "--mtbf-hours 0.0"),
        (("--mtbf-hours", -1), "--mtbf-hours -1.0"),
        (("--mtbf-hours", "nan"), "--mtbf-hours nan"),
        (("--mtbf-hours", 0.01, "--restart-s", 60), "a time to restart that is shorter"),
        (("--mtbf-hours", 1, "--restart-s", 0), "--restart-s 0.0"),
        (("--mtbf-hours", 1, "--detect-s", 90), "--detect-s 90.0: give numbers above 0"),
        (("--detect-s", "inf"), "--detect-s is inf"),
        (("--base-mtbf-hours", "nan"), "--base-mtbf-hours nan"),
        (("--base-mtbf-hours", 0.1), "bases are lost after 180 s in the mean, missed after 0 s and back after 300 s"),
        (("--oversubscription", 0.5, "--leaf-gpus", 8), "--oversubscription is 0.5"),
        (("--oversubscription", 2), "and --leaf-gpus"),
        (("--leaf-gpus", 1), "1 GPUs under a leaf switch, 2 of a base"),
        (("--leaf-gpus", 0), "--leaf-gpus is 0"),
        (("--joins", "600"), "'600' is no time with a number of ranks"),
        (("--joins", "600:8,-1:2"), "'-1:2' is no time"),
        (("--pools", 2), "2 pools for 1 jobs"),
        (("--chunk", -5), "--chunk is -5"),
        (("--plot", "x.txt"), "is no picture"),
    ],
)
def test_what_cannot_be_simulated_is_told_in_a_line(args, told: str) -> None:
    done = invoke("simulate", *HARDWARE, *args)
    assert done.exit_code == 2, done.output
    assert told in done.output
    assert len(done.output.splitlines()) == 1, done.output


def test_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "traffic.png"
    args = ("--pool-ranks", "0,4", "--rate", 0.2, "--seconds", 60, "--plot", picture)
    done = invoke("simulate", *HARDWARE, *args)
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn_over_time_is_the_mean_of_each_span() -> None:
    spans = [(0.0, 2.5), (1.0, 1.5), (1.2, 4.0)]
    edges = np.array([0.0, 1.0, 2.0, 4.0])
    assert within(spans, edges) == pytest.approx([1.0, 1 + 0.5 + 0.8, (0.5 + 2.0) / 2])
