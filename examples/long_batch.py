"""Generate for a batch of long prompts whose keys live on the pool: the base holds weights and token ids.

    python examples/long_batch.py MODEL_FOLDER TEXT.txt --rows 8 --tokens 2000 --pool-ranks 2

Each row is a piece of the text. While tokens come, a line says what base and pool ranks hold.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from transformers import AutoTokenizer, StoppingCriteria

from fapool_plugin import FAPoolForCausalLM

MIB = 2**20


class Watch(StoppingCriteria):
    """Says what is held where, every so many tokens; stops nothing."""

    def __init__(self, model: Any, every: int) -> None:
        self.model, self.every, self.step, self.began = model, every, 0, time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.step % self.every == 0:
            held = self.model.fa_pool.stats()["kv_bytes"]
            ranks = ", ".join(f"rank {number} {nbytes / MIB:.0f}" for number, nbytes in sorted(held["ranks"].items()))
            resident = psutil.Process().memory_info().rss / MIB
            print(
                f"{time.perf_counter() - self.began:6.1f} s, token {self.step + 1}: keys in MiB: base "
                f"{held['base'] / MIB:.0f}, {ranks or 'no rank'}; base process {resident:.0f} MiB"
            )
        self.step += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def main(
    model_folder: str,
    text_file: Path,
    rows: Annotated[int, typer.Option(min=1, help="Prompts of the batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 2000,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each.")] = 16,
    pool_ranks: Annotated[int, typer.Option(min=1, help="Local pool ranks, one thread each.")] = 2,
    memory_limit_mib: Annotated[int, typer.Option(min=1, help="MiB of keys that one pool rank may hold.")] = 2048,
) -> None:
    """Prints a line as it goes, the first words of each answer, and what was replayed, if anything was."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(text_file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < rows * tokens:
        raise typer.BadParameter(f"{text_file} has {len(ids)} tokens; {rows} rows of {tokens} need {rows * tokens}")
    fa_pool = {"pool_ranks": pool_ranks, "kv_home": "pool", "base_share": 0.0, "activation": "length"}
    fa_pool |= {"threshold": tokens // 2, "memory_limit_mib": memory_limit_mib}
    model = FAPoolForCausalLM.from_pretrained(model_folder, fa_pool=fa_pool)
    prompts = ids[: rows * tokens].view(rows, tokens)
    with model.fa_pool as pool:
        answers = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[Watch(model, max(1, new_tokens // 4))],
        )
        stats = pool.stats()
    for row, answer in enumerate(answers[:, tokens:]):
        print(f"{row}: {tokenizer.decode(answer, skip_special_tokens=True)[:60]!r}")
    print(
        f"pooled calls: {stats['prefill']['pooled_calls']} of the prompts, {stats['decode']['pooled_calls']} of steps"
    )
    print(f"replays: {stats['replays']}")


if __name__ == "__main__":
    typer.run(main)
