"""The command line end to end, on a tiny model: its answers against a loop of plain forwards, its refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from fapool_plugin import FAPoolConfigError
from fapool_plugin.integrations.huggingface import runs
from fapool_plugin.observe.trace import summary
from fapool_plugin.tools import cli, doctor

WORDS, POSITIONS, LAYERS = 99, 64, 2
PROMPT = [(7 * i * i + 3 * i) % WORDS for i in range(40)]
NEW = 8


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_hidden_layers=LAYERS,
        intermediate_size=64,
        vocab_size=WORDS,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(" ".join(f"w{token}" for token in PROMPT), encoding="utf-8")
    return path


def greedy(model: Path) -> list[int]:
    """Every token from a forward over everything before it: no cache, no generate(), eager attention."""
    reference = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(NEW):
            top = reference(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
            assert top.values[0] - top.values[1] > 1e-3, "a near-tie decides nothing: choose another seed"
            tokens.append(int(top.indices[0]))
    return tokens[len(PROMPT) :]


@pytest.mark.processes
@pytest.mark.parametrize("partition", ["line", "query_blocks"])
def test_generate_compares_a_pooled_run_with_plain_sdpa(model, prompt, tmp_path, partition) -> None:
    out = tmp_path / "out.json"
    args = ("--model", model, "--prompt-file", prompt, "--max-new-tokens", NEW, "--pool-ranks", 1, "--threads", 1)
    done = invoke(
        "generate",
        *args,
        "--threshold",
        16,
        "--partition",
        partition,
        "--compare",
        "--json",
        out,
        "--activation",
        "length",
        "--trace",
        tmp_path / "trace.json",
    )
    assert done.exit_code == 0, done.output
    values, expected = json.loads(out.read_text()), greedy(model)
    assert values["tokens"] == expected, f"fapool {values['tokens']}, forward by forward {expected}"
    assert values["reference"]["tokens"] == expected, "the reference run is wrong"
    assert values["identical"] is True
    assert values["text"] == " ".join(f"w{token}" for token in expected)
    assert values["prompt_tokens"] == len(PROMPT)
    assert values["ttft_s"] > values["tpot_s"] > 0, "a prefill takes longer than a decode step"
    assert values["reference"]["ttft_s"] > 0
    assert values["reference"]["tpot_s"] > 0
    stats = values["stats"]
    assert stats["prefill"]["pooled_calls"] == LAYERS, stats["prefill"]
    assert stats["decode"]["pooled_calls"] == LAYERS * (NEW - 1), stats["decode"]
    assert (stats["activations"], stats["releases"], stats["faults"]) == (1, 1, 0)
    assert stats["state"] == "closed", "the reference ran beside an open pool"
    assert values["text"] in done.stdout
    assert "prefill of 40 tokens" in done.stderr
    shown = {row.split("│")[1].strip(): row.split("│")[2:-1] for row in done.stdout.splitlines() if "│" in row}
    together = min(2, os.cpu_count() or 1)
    assert [cell.strip() for cell in shown["threads, lent to the pool"]] == ["1, 1", str(together)]
    assert shown["decode calls, pooled / local"][0].strip() == f"{LAYERS * (NEW - 1)} / 0"
    assert shown["tokens identical"][0].strip() == "yes"
    assert summary(tmp_path / "trace.json").keys() == {"base", "pool rank 0"}


def test_generate_without_ranks_is_local_and_restores_threads(model, prompt, tmp_path) -> None:
    out, before = tmp_path / "out.json", torch.get_num_threads()
    args = ("--model", model, "--prompt-file", prompt, "--max-new-tokens", NEW, "--threads", before + 1)
    done = invoke("generate", *args, "--pool-ranks", 0, "--threshold", 16, "--json", out)
    assert done.exit_code == 0, done.output
    values = json.loads(out.read_text())
    assert values["tokens"] == greedy(model)
    assert "reference" not in values
    assert values["stats"]["prefill"]["pooled_calls"] == 0
    assert values["threads"] == {"base": before + 1, "pool": 0}
    assert torch.get_num_threads() == before


def test_one_new_token_has_no_time_per_token(model, prompt, tmp_path) -> None:
    out = tmp_path / "out.json"
    args = ("--model", model, "--prompt-file", prompt, "--max-new-tokens", 1, "--max-prompt-tokens", 12)
    done = invoke("generate", *args, "--compare", "--json", out)
    assert done.exit_code == 0, done.output
    values = json.loads(out.read_text())
    assert (values["prompt_tokens"], len(values["tokens"]), values["tpot_s"]) == (12, 1, None)
    assert "nothing was pooled: no forward was longer than the threshold (12 <= 4096 tokens)" in done.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tokens: [*tokens[:3], tokens[3] + 1, *tokens[4:]], "new token 3"),
        (lambda tokens: tokens[:5], "has ended after 5 tokens"),
    ],
)
def test_differing_tokens_are_told_and_fail(model, prompt, tmp_path, monkeypatch, change, told) -> None:
    plain = runs.plain_run

    def other(job: runs.Job, progress: runs.Progress) -> runs.Run:
        run = plain(job, progress)
        return dataclasses.replace(run, tokens=change(run.tokens))

    monkeypatch.setattr(runs, "plain_run", other)
    out = tmp_path / "out.json"
    args = ("--model", model, "--prompt-file", prompt, "--max-new-tokens", NEW, "--pool-ranks", 0)
    done = invoke("generate", *args, "--compare", "--json", out)
    assert done.exit_code == 1, done.output
    values = json.loads(out.read_text())
    assert values["identical"] is False
    tokens = values["tokens"]
    assert told in done.stderr
    index = 3 if "3" in told else 5
    assert f"fapool has token {tokens[index]}" in done.stderr
    if index == 3:
        assert f"plain sdpa has token {tokens[3] + 1}" in done.stderr


@pytest.mark.parametrize(
    ("ours", "theirs", "index"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [3, 2], 0), ([1, 2], [1], 1), ([], [4], 0)],
)
def test_first_difference(ours, theirs, index) -> None:
    assert runs.first_difference(ours, theirs) == index


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "no prompt": ({"--prompt-file": "missing.txt"}, "missing.txt does not exist"),
    "prompt is a folder": ({"--prompt-file": "."}, "is a folder"),
    "empty prompt": ({"--prompt-file": "empty.txt"}, "has no text in its 2 bytes"),
    "prompt not UTF-8": ({"--prompt-file": "latin.txt"}, "is not UTF-8: byte 0xe9 at offset 3 of 4"),
    "no new tokens": ({"--max-new-tokens": 0}, "--max-new-tokens is 0; give at least 1"),
    "no prompt tokens": ({"--max-prompt-tokens": 0}, "--max-prompt-tokens is 0"),
    "no threads": ({"--threads": -1}, "--threads is -1"),
    "negative ranks": ({"--pool-ranks": -1}, "pool_ranks = -1: must be a whole number >= 0"),
    "too many ranks": ({"--pool-ranks": 10**6}, "2248000000 MiB"),
    "negative threshold": ({"--threshold": -5}, "threshold = -5"),
    "no output folder": ({"--json": "nowhere/out.json"}, "there is no folder nowhere"),
    "output is a folder": ({"--json": "."}, "is a folder"),
    "no model": ({}, "model there is no folder"),
    "empty model": ({"--model": "."}, "has no config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(case, prompt, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    changed, told = WRONG[case]
    # No model is there: whatever else is wrong has to be told before one is looked for.
    options = {"--model": "there", "--prompt-file": prompt, "--pool-ranks": 1, **changed}
    done = invoke("generate", *(part for pair in options.items() for part in pair))
    assert done.exit_code == 2, done.output
    assert told in done.stderr, done.stderr
    assert done.stderr.startswith("fapool: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


def test_too_long_for_the_model_is_refused_before_weights(model, prompt, tmp_path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.suffix == ".json":
            (bare / file.name).write_bytes(file.read_bytes())
    args = ("--model", bare, "--prompt-file", prompt)
    done = invoke("generate", *args, "--max-new-tokens", 25)
    assert done.exit_code == 2, done.output
    assert "40 prompt tokens + 25 new ones = 65, but the model has 64 positions" in done.stderr
    assert "a prompt of at most 39 tokens" in done.stderr
    done = invoke("generate", *args, "--max-new-tokens", 24)
    assert done.exit_code == 2, done.output
    assert "positions" not in done.stderr, "64 tokens fit 64 positions"


def test_damaged_weights_are_one_line(model, prompt, tmp_path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 500 if file.suffix == ".safetensors" else None])
    done = invoke("generate", "--model", tmp_path, "--prompt-file", prompt, "--max-new-tokens", NEW)
    assert done.exit_code == 2, done.output
    assert f"the weights in {tmp_path} are damaged" in done.stderr.splitlines()[-1]


def test_a_refused_model_is_one_line(prompt, tmp_path, model) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    for file in model.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    done = invoke("generate", "--model", tmp_path, "--prompt-file", prompt)
    assert done.exit_code == 2, done.output
    assert "computes attention by itself" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--tokens", 0), "--tokens is 0"),
        (("--max-new-tokens", 0), "--max-new-tokens is 0"),
        (("--pool-ranks", -1), "pool_ranks = -1"),
        (("--json", "nowhere/out.json"), "there is no folder nowhere"),
        (("--cache", __file__), "is not a folder"),
    ],
)
def test_demo_checks_before_it_downloads(args, told, monkeypatch) -> None:
    monkeypatch.setattr(runs, "_download", lambda folder: pytest.fail("it downloads"))
    done = invoke("demo", *args)
    assert done.exit_code == 2, done.output
    assert told in done.stderr


def test_module_runs_and_loads_no_torch_for_its_version() -> None:
    code = "import sys, fapool_plugin.tools.cli as c\ntry: c.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["fapool", "0.1.0", "False"]
    command = [sys.executable, "-m", "fapool_plugin.tools.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert all(word in done.stdout for word in ("generate", "demo", "doctor"))


def test_doctor_finds_what_the_tests_themselves_use() -> None:
    before = set(sys.modules)
    done = invoke("doctor", "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    checks = {check["name"]: check for check in values["checks"]}
    assert values["healthy"] is True
    assert checks["torch"]["version"] == torch.__version__
    for name in ("Python", "torch", "links", "transformers", "memory"):
        assert checks[name]["usable"], checks[name]
    if not torch.cuda.is_available():
        assert not checks["NCCL"]["usable"]
        assert "needs CUDA" in checks["flash-attn"]["why"]
    assert "deepspeed" not in set(sys.modules) - before
    table = invoke("doctor")
    assert table.exit_code == 0
    assert all(name in table.stdout for name in checks), table.stdout


def test_doctor_says_what_is_missing(monkeypatch) -> None:
    find = doctor.importlib.util.find_spec

    def without(name: str) -> object:
        if name.startswith("megatron"):
            raise ModuleNotFoundError(name)
        return None if name in ("transformers", "deepspeed") else find(name)

    monkeypatch.setattr(doctor.importlib.util, "find_spec", without)
    done = invoke("doctor", "--json")
    assert done.exit_code == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["deepspeed"]["why"] == "not installed: pip install fapool-plugin[deepspeed]"
    assert checks["megatron-core"]["why"] == "not installed: pip install fapool-plugin[megatron]"
    assert checks["transformers"]["why"] == "not installed: pip install fapool-plugin[hf]"
    assert checks["links"]["usable"]
    assert "fapool-plugin[megatron]" in invoke("doctor").stdout


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FAPoolConfigError("no Ray cluster was found"), "no Ray cluster was found"),
        (RuntimeError("it hangs\nand more"), "the Ray cluster does not answer: it hangs"),
    ],
)
def test_doctor_is_healthy_without_a_cluster(monkeypatch, error: Exception, told: str) -> None:
    pytest.importorskip("ray")

    def joined(address: str | None) -> None:
        raise error

    monkeypatch.setattr(doctor.directory, "join", joined)
    done = invoke("doctor", "--json")
    assert done.exit_code == 0, done.output
    pools = next(check for check in json.loads(done.stdout)["checks"] if check["name"] == "standing pools")
    assert not pools["usable"]
    assert pools["why"].startswith(told)
    assert "\n" not in pools["why"]


def test_doctor_fails_without_links(monkeypatch) -> None:
    def broken() -> None:
        raise RuntimeError("no interface\nand more")

    monkeypatch.setattr(doctor, "_exchange", broken)
    done = invoke("doctor", "--json")
    assert done.exit_code == 1
    links = next(check for check in json.loads(done.stdout)["checks"] if check["name"] == "links")
    assert links["why"] == "RuntimeError: no interface"
