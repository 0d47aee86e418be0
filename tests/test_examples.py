"""Examples and configurations in the repository work as they stand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fapool_plugin import FAPoolConfig
from tests.models import VOCABULARY, save_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_a_configuration_is_valid(path: Path) -> None:
    config = FAPoolConfig.load(path)
    assert config.to_dict() | json.loads(path.read_text())["fa_pool"] == config.to_dict()


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("example", ["generate_hf.py", "generate_megatron.py"])
def test_an_example_pools_a_long_prompt(tmp_path: Path, example: str) -> None:
    if "megatron" in example:
        pytest.importorskip("megatron.core")
    folder = save_model("llama", tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    (tmp_path / "prompt.txt").write_text(" ".join(f"w{3 + i % 90}" for i in range(60)))
    config = json.loads((ROOT / "configs" / "fa_pool.json").read_text())
    config["fa_pool"] |= {"activation": "length", "threshold": 16, "kv_block": 8, "memory_limit_mib": 64}
    (tmp_path / "fa_pool.json").write_text(json.dumps(config))
    arguments = (ROOT / "examples" / example, folder, tmp_path / "prompt.txt", tmp_path / "fa_pool.json")
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "prefill: 2 pooled calls, 0 local ones" in done.stdout
    assert "decode: 62 pooled calls, 0 local ones" in done.stdout
    assert "draining: the last long sequence ended" in done.stdout
