"""`fapool plan` and `fapool calibrate` end to end: their numbers against the forecast's own, and their refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from fapool_plugin.integrations.huggingface import calibrate as huggingface_calibrate
from fapool_plugin.measure.calibrate import machine
from fapool_plugin.plan.forecast import Cores, auto_threshold, choose_prefill
from fapool_plugin.plan.line import Row
from fapool_plugin.plan.profile import AttentionCost, Fit, LinearCost, LinkCost, Profile
from fapool_plugin.tools import cli, options

TINY = LlamaConfig(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    intermediate_size=48,
    vocab_size=60,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
)


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path: Path) -> Path:
    """No test looks at the user's own profiles."""
    monkeypatch.setattr(huggingface_calibrate, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A model without weights."""
    TINY.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def profile(config_only: Path) -> Profile:
    zero: dict[str, Any] = {"error": 0.0, "spread": 0.0}
    return Profile(
        date="2026-01-01",
        quick=False,
        machine=machine(),
        shape=huggingface_calibrate.shape_of_path(config_only, "float32"),
        attention=tuple(
            AttentionCost(
                kernel="torch_flash",
                dtype="float32",
                threads=threads,
                prefill=Fit(a=1e-5, b=0.0, c=4e-9 / threads, **zero),
                decode=Fit(a=1e-5, b=1e-8, c=0.0, **zero),
            )
            for threads in (1, 2, 3)
        ),
        linear=tuple(
            LinearCost(
                threads=threads,
                prefill=Fit(a=1e-3, b=1e-6 / threads, c=0.0, **zero),
                decode=Fit(a=1e-3, b=0.0, c=0.0, **zero),
            )
            for threads in (1, 2, 3)
        ),
        link=LinkCost(to_rank=Fit(a=1e-5, b=1e-10, c=0.0, **zero), to_base=Fit(a=1e-5, b=1e-10, c=0.0, **zero)),
        activation_s=1e-3,
        start_s=1.0,
    )


@pytest.fixture
def forbidden(monkeypatch) -> None:
    def measured(*args, **kwargs):
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(huggingface_calibrate, "calibrate_model", measured)


def test_plan_shows_what_the_forecast_says(profile, forbidden, tmp_path) -> None:
    saved, out, picture = (tmp_path / name for name in ("profile.json", "plan.json", "plan.png"))
    profile.save(saved)
    args = ("--profile", saved, "--lengths", "8192,512", "--pool-ranks", "1,2", "--threads", 3, "--threads-per-rank", 0)
    done = invoke("plan", *args, "--max-blocks", 4, "--json", out, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "note:" not in done.output, done.output
    values = json.loads(out.read_text())
    cores = Cores(total=3, per_rank=0)
    for plan, ranks in zip(values["plans"], (1, 2), strict=True):
        assert plan["pool_ranks"] == ranks
        for line, length in zip(plan["lengths"], (512, 8192), strict=True):
            choice = choose_prefill(
                profile, [Row(0, length, length)], ranks=ranks, cores=cores, max_blocks=4, alone=False
            )
            assert line["seconds"] == choice.seconds, f"{line} is not {choice}"
            assert line["pays"] == (choice.seconds < choice.alone_s)
            assert (line["tokens"], line["ranks"]) == (length, choice.ranks)
            assert f"{choice.seconds:.2f}" in done.output
        thresholds = auto_threshold(profile, ranks=ranks, cores=cores, longest=8192, max_blocks=4)
        assert plan["thresholds"] == {"auto": thresholds.auto, "crossing": thresholds.crossing}
        assert f"from {thresholds.crossing} tokens on" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_kept_profile_needs_no_weights(profile, forbidden, config_only) -> None:
    kept = huggingface_calibrate.keep(profile)
    done = invoke("plan", "--model", config_only, "--lengths", 512, "--pool-ranks", 1, "--threads", 2)
    assert done.exit_code == 0, done.output
    kept.write_text(kept.read_text()[:100])
    damaged = invoke("plan", "--model", config_only, "--lengths", 512)
    assert damaged.exit_code == 2
    assert "damaged" in damaged.output
    assert "fapool calibrate" in damaged.output


def test_without_a_profile_one_is_measured_and_kept(profile, config_only, monkeypatch) -> None:
    asked = []

    def measured(model, **kwargs) -> Profile:
        asked.append((model, kwargs["quick"], kwargs["threads"]))
        return profile

    monkeypatch.setattr(huggingface_calibrate, "calibrate_model", measured)
    for _ in range(2):
        done = invoke("plan", "--model", config_only, "--lengths", 512, "--pool-ranks", "1,2", "--threads", 3)
        assert done.exit_code == 0, done.output
    assert asked == [(config_only, True, [1, 2, 3])], "measured once, with the threads that are planned for"


def test_another_machines_profile_is_told(profile, forbidden, tmp_path, config_only) -> None:
    other = profile.machine.model_copy(update={"processor": "another"})
    shape = profile.shape.model_copy(update={"layers": 7})
    profile.model_copy(update={"machine": other, "shape": shape, "quick": True}).save(tmp_path / "profile.json")
    args = ("--profile", tmp_path / "profile.json", "--model", config_only, "--lengths", 512, "--threads", 9)
    done = invoke("plan", *args, "--pool-ranks", 1)
    assert done.exit_code == 0, done.output
    for told in ("processor was another", "layers was 7, is 2", "in a hurry", "[8, 9]"):
        assert told in done.output, done.output


def test_plan_says_what_fits_with_keys_on_the_pool(config_only: Path, tmp_path: Path) -> None:
    file = tmp_path / "fits.json"
    args = ("--kv-home", "pool", "--model", config_only, "--lengths", "512,2048", "--batch", 4, "--pool-ranks", "1,3")
    room = ("--memory-limit-mib", 8, "--base-memory-mib", 8)
    done = invoke("plan", *args, *room, "--json", file)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    # Keys and values of 2 heads of 8 in 2 layers in fp32.
    position = 2 * 2 * 2 * 8 * 4
    for ranks in (0, 1, 3):
        positions = (1 + ranks) * 8 * 2**20 // position
        for tokens in (512, 2048):
            fits, most = found["batches"][str(ranks)][str(tokens)], positions // tokens
            assert most * 0.9 - 1 <= fits <= most, f"{fits} of at most {most} rows of {tokens} with {ranks} ranks"
            assert str(fits) in done.output, done.output
        most = positions // 4
        assert 0.9 * most <= found["longest"][str(ranks)] <= most, f"{found['longest']}, at most {most}"
    refused = invoke("plan", *args, *room, "--plot", tmp_path / "fits.png")
    assert refused.exit_code == 2, refused.output
    assert "--plot does not draw what fits" in refused.output, refused.output


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_calibrate_measures_a_real_model_and_plan_uses_it(tmp_path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(TINY).save_pretrained(tmp_path / "tiny")
    out = tmp_path / "profile.json"
    done = invoke("calibrate", "--model", tmp_path / "tiny", "--quick", "--threads", 2, "--out", out)
    assert done.exit_code == 0, done.output
    for told in ("prefill, torch_flash", "decode, linear", "link, back", "error", "spread", str(out)):
        assert told in done.output.replace("\n", ""), done.output
    measured = Profile.load(out)
    assert {cost.threads for cost in measured.linear} == {1, 2}
    assert measured.shape.kv_heads == 2
    planned = invoke("plan", "--profile", out, "--model", tmp_path / "tiny", "--lengths", 512, "--threads", 2)
    assert planned.exit_code == 0, planned.output
    assert "something else" not in planned.output, planned.output


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--lengths", "512,x"), "'x' is no whole number"),
        (("--lengths", "0"), "'0' is no whole number"),
        (("--lengths", ""), "'' is no whole number"),
        (("--pool-ranks", "-1"), "'-1' is no whole number"),
        (("--threads", 0), "--threads is 0"),
        (("--threads-per-rank", -1), "--threads-per-rank is -1"),
        (("--max-blocks", 0), "--max-blocks is 0"),
        (("--json", "missing/plan.json"), "no folder"),
        (("--plot", "missing/plan.png"), "no folder"),
        (("--plot", "plan.xyz"), "no picture that can be drawn"),
        (("--profile", "missing.json"), "cannot be read"),
        (("--model", "missing"), "is no folder"),
    ],
)
def test_plan_refuses_before_any_work(forbidden, args, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("plan", *args)
    assert done.exit_code == 2, done.output
    assert told in done.output, done.output
    assert len(done.output.splitlines()) == 1, f"one line, not {done.output}"


def test_calibrate_refuses_before_any_work(forbidden, tmp_path) -> None:
    done = invoke("calibrate", "--out", tmp_path)
    assert done.exit_code == 2
    assert "is a folder" in done.output
    done = invoke("calibrate", "--model", tmp_path, "--out", tmp_path / "p.json")
    assert done.exit_code == 2
    assert "no config.json" in done.output


def test_a_picture_needs_its_library(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"fapool-plugin\[plot\]"):
        options.check_picture(tmp_path / "plan.png")


def test_a_profile_of_gpus_moves_no_threads(profile: Profile, config_only: Path, tmp_path: Path) -> None:
    """Found out from the profile, whatever `--threads-per-rank` says."""
    on_gpus, found = profile.model_copy(update={"on_devices": True}), []
    for name, told, per_rank in (("gpus", on_gpus, 2), ("elsewhere", profile, 0)):
        path, written = tmp_path / f"{name}.json", tmp_path / f"{name}-plan.json"
        told.save(path)
        result = invoke(
            "plan", "--profile", path, "--lengths", "512,4096", "--pool-ranks", 2, "--threads", 2,
            "--threads-per-rank", per_rank, "--json", written,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        found.append(json.loads(written.read_text()))
    for plan in found:
        assert plan["threads_per_rank"] == 0
    # This profile's messages cost no processor time, so that nothing else differs.
    assert found[0]["plans"] == found[1]["plans"]
