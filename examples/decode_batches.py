"""A large batch of short sequences on a tiny random model: seconds of a prompt and of a decode step, pooled and plain.

    python examples/decode_batches.py --rows 256 --tokens 128

Both models have the same weights, compute in turns with one thread, and are compared.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

from fapool_plugin import FAPoolForCausalLM

TINY = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1 << 16}


@torch.no_grad()
def main(
    rows: Annotated[int, typer.Option(min=1, help="Sequences of the batch.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    pool_ranks: Annotated[int, typer.Option(min=1, help="Local pool ranks, one thread each.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 10,
    activation: Annotated[
        str, typer.Option(help='"length" pools always, "cost" where it is predicted to pay.')
    ] = "length",
) -> None:
    """Prints medians, their ratio, and the largest difference of logits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, **HEADS)).eval()
    fa_pool = {"pool_ranks": pool_ranks, "threshold": tokens // 2, "activation": activation}
    pooled = FAPoolForCausalLM.wrap(copy.deepcopy(plain), fa_pool)
    ids = torch.randint(0, TINY["vocab_size"], (rows, tokens))
    with pooled.fa_pool as pool:
        pooled(ids)  # starts the ranks, and measures what a plan needs
        took: dict[str, dict[Any, list[float]]] = {"a prompt": {}, "a decode step": {}}
        caches, logits = {}, {}
        for model in (plain, pooled):
            began = time.perf_counter()
            caches[model] = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            took["a prompt"][model] = [time.perf_counter() - began]
        for _ in range(steps):
            for model, cache in caches.items():
                began = time.perf_counter()
                logits[model] = model(ids[:, :1], past_key_values=cache).logits
                took["a decode step"].setdefault(model, []).append(time.perf_counter() - began)
        stats = pool.stats()
    for what, seconds in took.items():
        alone_s, pooled_s = (statistics.median(seconds[model]) for model in (plain, pooled))
        print(f"{what}: plain {alone_s:.4f} s, pooled {pooled_s:.4f} s, ratio {pooled_s / alone_s:.2f}")
    for phase in ("prefill", "decode"):
        print(f"{phase}: {stats[phase]['pooled_calls']} pooled calls, {stats[phase]['local_calls']} local ones")
    worst = (logits[pooled] - logits[plain]).abs().max().item()
    print(f"largest difference of logits: {worst:.1e} of {logits[plain].abs().max().item():.2g}")


if __name__ == "__main__":
    typer.run(main)
