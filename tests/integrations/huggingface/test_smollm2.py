"""The demo model on long real text: tokens and logits are those of plain sdpa, prefill and decode are pooled."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fapool_plugin import FAPoolForCausalLM
from fapool_plugin.integrations.huggingface.runs import demo_model, demo_prompt
from tests.models import assert_same_tokens, pools

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

LAYERS, NEW = 30, 32


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_model()


@functools.cache
def prompt(folder: Path, length: int) -> Tensor:
    return AutoTokenizer.from_pretrained(folder)(demo_prompt(), return_tensors="pt", verbose=False).input_ids[
        :, :length
    ]


def generate(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """New tokens (32,) and the logits each was chosen from (32, V)."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, ids.shape[1] :], torch.cat(out.logits).float()


@functools.cache
def reference(folder: Path, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Plain sdpa, without the plugin."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return generate(model, prompt(folder, length))


BLOCKS = 4
"""Of the prompt, in flight."""


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


def pooled(folder: Path, length: int, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Tensor, Tensor]:
    ours = {"activation": "length", "blocks": BLOCKS} | settings
    model = FAPoolForCausalLM.from_pretrained(folder, dtype=dtype, fa_pool=ours)
    with model.fa_pool, pools(model, prefill=LAYERS * BLOCKS, decode=LAYERS * (NEW - 1)):
        return generate(model, prompt(folder, length))


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert got[1].isfinite().all()
    assert got[1].any(), "all zero"
    difference = (got[1] - want[1]).abs().max().item()
    assert difference < 1e-3, f"largest logit difference {difference:.2e}"
    assert_same_tokens(got[0], want[0])


def test_2500_tokens_with_one_pool_rank(folder: Path) -> None:
    check(pooled(folder, 2500, pool_ranks=1, threshold=1024), reference(folder, 2500, torch.float32))


@pytest.mark.full
@pytest.mark.parametrize("partition", ["line", "query_blocks"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [6000, 8000])
def test_every_length_rank_count_and_partition(folder: Path, length: int, ranks: int, partition: str) -> None:
    check(pooled(folder, length, pool_ranks=ranks, partition=partition), reference(folder, length, torch.float32))


@pytest.mark.full
@pytest.mark.parametrize("partition", ["line", "query_blocks"])
def test_bfloat16_is_within_its_own_noise(folder: Path, partition: str) -> None:
    """The pool may be as far from fp32 as plain bf16 sdpa is, on the first new token; later ones may part."""
    exact = reference(folder, 6000, torch.float32)[1][0]
    plain = reference(folder, 6000, torch.bfloat16)[1][0]
    got = pooled(folder, 6000, torch.bfloat16, pool_ranks=2, partition=partition)[1][0]
    noise = (plain - exact).abs().max().item()
    error = (got - exact).abs().max().item()
    assert got.isfinite().all()
    assert 0 < error <= 1.5 * noise, f"pooled bf16 is {error:.3f} from fp32, plain bf16 {noise:.3f}"
