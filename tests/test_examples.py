"""Examples and configurations in the repository work as they stand."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from matplotlib import image as mpimg
from typer.testing import CliRunner

from fapool_plugin import FAPoolConfig
from tests.models import save_model, save_tokenizer, words

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_a_configuration_is_valid(path: Path) -> None:
    config = FAPoolConfig.load(path)
    assert config.to_dict() | json.loads(path.read_text())["fa_pool"] == config.to_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_model("llama", tmp_path_factory.mktemp("model")))


def run(example: str, *arguments: object, limit_s: float = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / example), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("example", ["generate_hf.py", "generate_megatron.py"])
def test_an_example_pools_a_long_prompt(folder: Path, tmp_path: Path, example: str) -> None:
    if "megatron" in example:
        pytest.importorskip("megatron.core")
    (tmp_path / "prompt.txt").write_text(words(60))
    config = json.loads((ROOT / "configs" / "fa_pool.json").read_text())
    config["fa_pool"] |= {"activation": "length", "threshold": 16, "kv_block": 8, "memory_limit_mib": 64}
    (tmp_path / "fa_pool.json").write_text(json.dumps(config))
    done = run(example, folder, tmp_path / "prompt.txt", tmp_path / "fa_pool.json")
    assert done.returncode == 0, done.stderr
    assert "prefill: 2 pooled calls, 0 local ones" in done.stdout
    assert "decode: 62 pooled calls, 0 local ones" in done.stdout
    assert "draining: the last long sequence ended" in done.stdout


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_long_batch_lives_on_the_pool(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(words(160))
    done = run("long_batch.py", folder, tmp_path / "text.txt", "--rows", 3, "--tokens", 50, "--new-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert "token 1: keys in MiB: base 0, rank 0 0, rank 1 0; base process" in done.stdout, done.stdout
    assert "pooled calls: 2 of the prompts, 6 of steps" in done.stdout
    assert done.stdout.endswith("replays: 0\n")
    done = run("long_batch.py", folder, tmp_path / "text.txt", "--rows", 9, "--tokens", 50)
    assert done.returncode == 2
    assert "9 rows of 50 need 450" in done.stderr.replace("\n", " ").replace("│", "")


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_large_batch_is_compared() -> None:
    done = run("decode_batches.py", "--rows", 20, "--tokens", 40, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert "decode: 8 pooled calls, 0 local ones" in done.stdout, done.stdout
    (worst,) = re.findall(r"largest difference of logits: (\S+) of", done.stdout)
    assert float(worst) < 1e-4, done.stdout


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_serve_mixed_leases_for_long_prompts_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(words(100))
    options = ("--model", folder, "--prompt-file", tmp_path / "prompt.txt", "--threshold", 40, "--new-tokens", 3)
    picture = tmp_path / "serve.png"
    done = run("serve_mixed.py", *options, "--lengths", "8,60,10,70,12", "--plot", picture)
    assert done.returncode == 0, done.stderr
    served = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines() if re.match(r" +\d", line)]
    assert [(row[0], row[2], row[3]) for row in served] == [
        ("8", "local", "idle, then idle"),
        ("60", "pooled", "active, then idle"),
        ("10", "local", "idle, then idle"),
        ("70", "pooled", "active, then idle"),
        ("12", "local", "idle, then idle"),
    ]
    assert all(float(row[1]) >= 0 for row in served)
    assert "2 activations, 2 releases, 0 faults" in done.stdout
    kinds = re.findall(r"^\S+  (\w+): ", done.stdout, re.MULTILINE)
    assert kinds == 2 * ["activating", "active", "draining", "idle"]
    pixels = mpimg.imread(picture)
    assert pixels.shape[:2] == (600, 1080)
    # The spans of pooled and of local requests, in matplotlib's first two colors; the legend stands at the right.
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        same = abs(pixels[:, : 3 * pixels.shape[1] // 4, :3] * 255 - color).max(axis=-1) < 1
        assert same.sum() > 100, f"hardly a pixel of {color}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--lengths", "8,many"), "--lengths 8,many are no whole numbers; give such as"),
        (("--lengths", "0,8"), "--lengths is 0; give at least 1"),
        (("--lengths", "8,90"), "--lengths asks for 90 tokens; the text has 50: give fewer"),
        (("--lengths", "8", "--new-tokens", "250"), "are 258, the model has 256 positions: give lengths of at most 6"),
        (("--lengths", "8", "--plot", "serve.txt"), "--plot serve.txt is no picture"),
        (("--lengths", "8", "--activation", "never"), 'activation = "never"'),
    ],
)
def test_serve_mixed_tells_what_is_wrong(folder: Path, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    (tmp_path / "prompt.txt").write_text(words(50))
    app = typer.Typer()
    app.command()(runpy.run_path(str(ROOT / "examples" / "serve_mixed.py"))["main"])
    options = ["--model", str(folder), "--prompt-file", str(tmp_path / "prompt.txt")]
    done = CliRunner().invoke(app, [*options, *arguments])
    assert done.exit_code == 2, done.output
    assert told in done.stderr.splitlines()[-1]


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_finetuning_draws_the_same_losses_twice(folder: Path, tmp_path: Path) -> None:
    given = ["--model", folder, "--tokens", 40, "--steps", 2, "--threshold", 16, "--plot", tmp_path / "losses.png"]
    done = run("finetune_long.py", *given, "--full")
    assert done.returncode == 0, done.stderr
    assert "training: 4 attention calls pooled, 0 local" in done.stdout, done.stdout
    assert "backward: 4 attention calls pooled, 0 local" in done.stdout, done.stdout
    (apart,) = re.findall(r"losses differ by (\S+) at most", done.stdout)
    assert float(apart) < 1e-5, done.stdout
    assert (tmp_path / "losses.png").stat().st_size > 5000


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.timeout(300)
def test_jobs_share_a_pool(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out, given = tmp_path / "out.json", ("--split", "1,2", "--seconds", 4, "--tokens", 400, "--pause-s", 0.2)
    done = run("shared_pool.py", *given, "--json", out, limit_s=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tokens are equal, 0 faults") == 2, done.stdout
    found = json.loads(out.read_text())
    for how, most in (("shared", (3, 3)), ("own", (1, 2))):
        answers = found[how]["answers"]
        assert {each["job"] for each in answers} == {0, 1}, answers
        assert all(each["tokens"] >= 200 for each in answers if each["ranks"]), "short prompts stay local"
        assert all(len(each["ranks"]) <= most[each["job"]] for each in answers), answers
        assert found[how]["useful_s"] > 0
    long = [each for each in found["own"]["answers"] if each["tokens"] >= 200]
    assert long, "each third prompt is short"
    assert all(each["ranks"] for each in long), f"its own ranks are always free: {long}"
    assert any(len(each["ranks"]) == 3 for each in found["shared"]["answers"]), "a job that is alone has them all"
