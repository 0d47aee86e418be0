"""`fapool plan --hardware` end to end: what it shows and writes against the planner's own numbers, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fapool_plugin.plan.alternatives import Outlook
from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.hardware import Hardware
from fapool_plugin.plan.training import Training
from fapool_plugin.tools import cli
from fapool_plugin.tools.cluster import elsewhere, read_model

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "configs" / "paper_8base_32pool.json"
A100 = ROOT / "configs" / "hardware" / "a100-sxm.json"
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_it_shows_and_writes_what_the_planner_says(tmp_path: Path) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    args = ("--hardware", "a100-sxm", "--config", PAPER, "--batch", 1024, "--lengths", "512,32768")
    done = invoke("plan", *args, "--pool-ranks", "0,8", "--json", out, "--plot", picture)
    assert done.exit_code == 0, done.output
    values = json.loads(out.read_text())
    assert (values["base_ranks"], values["model"]["gated"], values["hardware"]["licence"]) == (8, True, "Apache-2.0")
    model, base = read_model(PAPER, None)
    made = {link: Cluster(Hardware.load(A100), model, base, link) for link in ("between-nodes", "between-nodes-slow")}
    for plan in values["plans"]:
        assert [(row["pool_ranks"], row["tokens"]) for row in plan["rows"]] == [
            (p, n) for p in (0, 8) for n in (512, 32768)
        ]
        for row in plan["rows"]:
            ours = Outlook(made["between-nodes"], plan["kind"], 1024, row["tokens"], row["pool_ranks"])
            assert row["alone_s"] == ours.alone_s
            assert row["alone_holds"] == (row["tokens"] == 512), row["memory"]
            if ours.pooled:
                assert row["pooled"]["seconds"] == ours.pooled.seconds
                slow = made["between-nodes-slow"].pooled(plan["kind"], row["batch"], row["tokens"], 8)
                assert row["slow_link"]["seconds"] == slow.seconds > ours.pooled.seconds
                assert f"{ours.alone_s / ours.pooled.seconds:.2f}" in done.output
    assert "prefill of more than 16384 tokens is extrapolated" in done.output
    assert "32768~" in done.output
    assert "from 704 tokens on" in done.output, "decode's threshold"
    assert "…" not in done.output, "a column does not fit"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_oversubscription_is_a_slower_link(tmp_path: Path) -> None:
    args = ("--hardware", "a100-sxm", "--config", PAPER, "--batch", 64, "--lengths", 8192, "--pool-ranks", 8)
    done = invoke("plan", *args, "--oversubscription", 4, "--json", tmp_path / "plan.json")
    assert done.exit_code == 0, done.output
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["oversubscription"] == 4
    model, base = read_model(PAPER, None)
    made = Cluster(Hardware.load(A100), model, base, "between-nodes")
    for plan in values["plans"]:
        (row,) = [row for row in plan["rows"] if row["pool_ranks"]]
        assert row["pooled"]["seconds"] > made.pooled(plan["kind"], row["batch"], 8192, 8).seconds
        assert row["slow_link"]["seconds"] > row["pooled"]["seconds"]


def test_a_models_own_configuration_and_a_file_of_hardware(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    args = ("--config", tmp_path / "config.json", "--base-ranks", 4, "--lengths", 8192, "--batch", 8)
    model, _ = read_model(tmp_path / "config.json", 4)
    assert (model.kv_heads, model.head_dim, model.gated) == (8, 128, True)
    assert model.parameters == 8_030_261_248 - 65 * 4096, "Llama-3-8B without its norms"
    done = invoke("plan", "--hardware", A100, *args, "--pool-ranks", 4, "--link", "same-node")
    assert done.exit_code == 0, done.output
    assert "slow" not in done.output.split("A/L")[0], "a node's own link has no second bound"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"head_dim": 64}))
    done = invoke("plan", "--hardware", A100, *args, "--pool-ranks", 4)
    assert "head dim 64 has no table: scaled from 128" in done.output


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--hardware", "b300", "--config", PAPER), "there are a100-sxm, h100-sxm, h200-sxm"),
        (("--hardware", "b300", "--config", PAPER), "fapool calibrate"),
        (("--hardware", PAPER, "--config", PAPER), "is damaged at name"),
        (("--hardware", "a100-sxm"), "belong together"),
        (("--config", PAPER), "belong together"),
        (("--hardware", "a100-sxm", "--config", "none.json"), "is no file"),
        (("--hardware", "a100-sxm", "--config", ROOT / "README.md"), "is no JSON"),
        (("--hardware", "a100-sxm", "--config", A100.with_name("list.json")), "is no file"),
        (("--hardware", "a100-sxm", "--config", ROOT / "configs" / "fa_pool.json"), "names no hidden_size"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--base-ranks", 0), "--base-ranks is 0"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--base-ranks", 3), "cannot be shared by 3 base ranks"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--base-ranks", 16), "all-reduces of 2, 4, 8 GPUs, none of 16"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--link", "string"), "no link 'string'"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--ask-us", -1), "--ask-us is -1"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--batch", 0), "--batch is 0"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--oversubscription", 0.5), "an oversubscription of 0.5"),
        (("--train",), "--train needs --hardware"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--recompute"), "--recompute needs --train"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--train", "--plot", "x.png"), "does not draw training steps"),
        (("--hardware", "a100-sxm", "--config", PAPER, "--pool-ranks", "8,x"), "'x' is no whole number of at least 0"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_line(args, told: str) -> None:
    done = invoke("plan", *args)
    assert done.exit_code == 2, done.output
    assert told in done.output, done.output
    assert len(done.output.splitlines()) == 1, f"one line, not {done.output}"


def test_a_model_that_does_not_say_how_many_share_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    done = invoke("plan", "--hardware", "a100-sxm", "--config", tmp_path / "config.json")
    assert "give --base-ranks" in done.output, done.output
    (tmp_path / "config.json").write_text("[]")
    assert "holds no settings" in invoke("plan", "--hardware", "a100-sxm", "--config", tmp_path / "config.json").output


def test_the_demos_last_lines_are_the_plans(tmp_path: Path) -> None:
    path, model = tmp_path / "plan.json", ROOT / "configs" / "models" / "llama3_8b.json"
    told = ["--base-ranks", 8, "--batch", 64, "--lengths", 6000, "--pool-ranks", 8, "--link", "same-node"]
    done = invoke("plan", "--hardware", "h100-sxm", "--config", model, *told, "--json", path)
    assert done.exit_code == 0, done.stderr
    plans = {one["kind"]: one for one in json.loads(path.read_text(encoding="utf-8"))["plans"]}
    lines = dict(zip(("prefill", "decode"), elsewhere(6000), strict=True))
    for kind, line in lines.items():
        row = next(row for row in plans[kind]["rows"] if row["pool_ranks"] == 8)
        alone, pooled = (f"{seconds * 1e3:.3g}" for seconds in (row["alone_s"], row["pooled"]["seconds"]))
        assert f"takes {alone} ms alone and {pooled} with the pool" in line
        assert f"from {plans[kind]['thresholds']['8']} tokens on" in line


@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_step(recompute: bool, tmp_path: Path) -> None:
    out, more = tmp_path / "train.json", ["--recompute"] * recompute
    args = ("--hardware", "a100-sxm", "--config", PAPER, "--batch", 8, "--lengths", "4096,32768", "--pool-ranks", 8)
    done = invoke("plan", *args, "--train", *more, "--json", out)
    assert done.exit_code == 0, done.output
    values = json.loads(out.read_text())
    assert (values["kind"], values["recompute"], values["base_ranks"]) == ("training", recompute, 8)
    model, base = read_model(PAPER, None)
    made = Cluster(Hardware.load(A100), model, base, "between-nodes")
    assert [(row["pool_ranks"], row["tokens"]) for row in values["rows"]] == [
        (p, n) for p in (0, 8) for n in (4096, 32_768)
    ]
    for row in values["rows"]:
        ours = Training(made, 8, row["tokens"], row["pool_ranks"], recompute)
        assert row["alone_s"] == ours.alone_s
        assert row["holds"] == ours.holds
        assert [other["name"] for other in row["others"]] == [other.name for other in ours.others()]
        if ours.pooled:
            assert row["pooled"]["seconds"] == ours.pooled.seconds
            assert f"{ours.alone_s / ours.pooled.seconds:.2f}" in done.output
    assert "32768~" in done.output
    assert ("activations recomputed" in done.output) == recompute
    assert "assumed: backward is twice" in done.output
    assert "…" not in done.output, "a column does not fit"
