"""A Llama-shaped model with a pool rank that shares its GPU: right, how long it takes, and where it waits.

What is computed in half precision is held against the same model in fp32: with the pool it may be no further from
that than without.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fapool_plugin import FAPoolForCausalLM
from fapool_plugin.integrations.huggingface.calibrate import calibrate_model
from tests.gpu.report import Report

SETTINGS = {"pool_ranks": 1, "threshold": 256, "activation": "length", "memory_limit_mib": 8192, "timeout_s": 20.0}
NOT_WORSE = 1.5
"""Times the plain model's distance from fp32."""
LAST = 64
"""Positions whose logits are compared."""


def model(report: Report, **changes: Any) -> Any:
    """Eight layers of Llama-3-8B, random; tiny in a rehearsal."""
    small: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    }  # fmt: skip
    full: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768,
    }  # fmt: skip
    values = (small if report.rehearsal else full) | {"max_position_embeddings": 1 << 18, "initializer_range": 0.05}
    torch.manual_seed(0)
    with torch.device(report.device):
        return LlamaForCausalLM(LlamaConfig(**values | changes)).eval()


def run(report: Report) -> None:
    """Prefill, tokens, blocks, gradients and a batch's steps."""
    exact = model(report)
    half = copy.deepcopy(exact).to(torch.bfloat16)
    tokens = report.size(16384, 512)
    ids = _ids(report, exact, 1, tokens)
    with torch.no_grad(), report.part("prefill"):
        want, plain = (_last(one, ids) for one in (exact, half))
        report.figure(f"prefill {tokens}, plain", report.timed(partial(_last, half, ids), 3), "s")
        for blocks in (1, 8):
            with _pooled(half, blocks=blocks) as ours:
                got = _last(ours, ids)
                _not_worse(report, f"logits, {blocks} blocks", got, plain, want)
                report.figure(f"prefill {tokens}, {blocks} blocks", report.timed(partial(_last, ours, ids), 3), "s")
                _was_pooled(report, ours, "prefill", f"prefill, {blocks} blocks")
                _count_waits(report, f"prefill {tokens}, {blocks} blocks", partial(_last, ours, ids))
    with torch.no_grad(), report.part("tokens"):
        _tokens(report, exact, half, ids[:, : report.size(4096, 320)])
    with report.part("gradients"):
        short = ids[:, : report.size(4096, 320)]
        want, plain = (_gradient(one, short) for one in (exact, half))
        with _pooled(half.train()) as ours:
            _not_worse(report, "gradient of the first query projection", _gradient(ours, short), plain, want)
            _was_pooled(report, ours, "training", "training")
    half.eval()
    del exact
    batch, keys = report.size(128, 4), report.size(2048, 300)
    rows = _ids(report, half, batch, keys)
    for kv_home in (None, "base", "pool"):
        with torch.no_grad(), report.part(f"decode, keys at {kv_home}"):
            _steps(report, half, rows, kv_home)


def run_predictions(report: Report) -> None:
    """Calibrates, and holds what the plan expects against what is measured."""
    half = model(report).to(torch.bfloat16 if report.device.type == "cuda" else torch.float32)
    with report.part("calibrate"), tempfile.TemporaryDirectory() as folder:
        profile = calibrate_model(half, quick=True, budget_s=report.size(60, 8))
        path = Path(folder) / "profile.json"
        profile.save(path)
        ids = _ids(report, half, 1, report.size(16384, 512))
        with torch.no_grad(), _pooled(half, profile=str(path)) as ours:
            for _ in range(3):
                _last(ours, ids)
            phase = ours.fa_pool.stats()["prefill"]
        if not phase.get("predicted_s"):
            raise RuntimeError("nothing was predicted")
        report.figure("measured over predicted, prefill", phase["measured_s"] / phase["predicted_s"], "")


def _tokens(report: Report, exact: Any, half: Any, ids: Tensor) -> None:
    """In fp32 greedy tokens are the same as far as the plain model's choices are no near-ties; in half precision they
    are counted."""
    arguments: dict[str, Any] = {
        "max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "output_logits": True,
        "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    for name, one in (("fp32", exact), ("bf16", half)):
        plain = one.generate(ids, **arguments)
        with _pooled(one) as ours:
            got = ours.generate(ids, **arguments)
            _was_pooled(report, ours, "decode", f"decode in {name}")
        equal = got.sequences[0, ids.shape[1] :] == plain.sequences[0, ids.shape[1] :]
        first = int(equal.int().cumprod(0).sum())
        report.figure(f"tokens in {name}, equal from the first on", first, "of 32")
        if name == "fp32" and first < 32:
            logits = plain.logits[first][0]
            best, second = logits.topk(2).values.tolist()
            tie = best - second <= 1e-4 * logits.abs().max().item()
            report.passed("tokens", tie, f"step {first} differs; the best two are {best - second:.3g} apart")
        elif name == "fp32":
            report.passed("tokens", True, "all equal")


def _steps(report: Report, half: Any, rows: Tensor, kv_home: str | None) -> None:
    name = f"step of {len(rows)} x {rows.shape[1]}, " + (f"keys at the {kv_home}" if kv_home else "plain")
    if kv_home is None:
        _step(report, half, rows, name)
        return
    with _pooled(half, kv_home=kv_home) as ours:
        _step(report, ours, rows, name)
        _was_pooled(report, ours, "decode", name)


def _step(report: Report, one: Any, rows: Tensor, name: str) -> None:
    cache = one(rows, use_cache=True, logits_to_keep=1).past_key_values
    token = rows[:, :1]
    report.figure(name, report.timed(lambda: one(token, past_key_values=cache), 8) * 1e3, "ms")
    _count_waits(report, name, lambda: one(token, past_key_values=cache))


def _count_waits(report: Report, name: str, work: Callable[[], object]) -> None:
    if report.device.type == "cuda":
        report.figure(f"{name}: synchronisations", _synchronisations(work), "")


def _synchronisations(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def _last(one: Any, ids: Tensor) -> Tensor:
    logits: Tensor = one(ids, logits_to_keep=LAST, use_cache=False).logits
    return logits


def _gradient(one: Any, ids: Tensor) -> Tensor:
    one.zero_grad()
    one(ids, labels=ids, use_cache=False).loss.backward()
    gradient: Tensor = one.model.layers[0].self_attn.q_proj.weight.grad
    return gradient.clone()


def _not_worse(report: Report, name: str, got: Tensor, plain: Tensor, want: Tensor) -> None:
    scale = want.float().abs().max()
    ours, theirs = (((x.float() - want.float()).abs().max() / scale).item() for x in (got, plain))
    fine = bool(got.isfinite().all()) and bool(scale > 0) and ours <= NOT_WORSE * theirs + 1e-4
    report.passed(name, fine, f"{ours:.3g} of the largest away from fp32, {theirs:.3g} without the pool")


def _was_pooled(report: Report, ours: Any, phase: str, name: str) -> None:
    stats = ours.fa_pool.stats()
    calls = stats[phase]["pooled_calls"]
    fine = calls > 0 and not stats["faults"]
    report.passed(f"{name} was pooled", fine, f"{calls} calls, {stats['faults']} faults, {stats['local_reasons']}")


@contextmanager
def _pooled(plain: Any, **settings: Any) -> Any:
    ours = FAPoolForCausalLM.wrap(copy.deepcopy(plain), SETTINGS | settings)
    with ours.fa_pool:
        yield ours


def _ids(report: Report, one: Any, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, one.config.vocab_size, (rows, tokens), generator=generator).to(report.device)
