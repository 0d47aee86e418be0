"""Fine-tune on long text, once without the pool and once with it, and draw both loss curves on top of each other.

    python examples/finetune_long.py --plot losses.png
    python examples/finetune_long.py --model MODEL_FOLDER --tokens 4500 --steps 8 --full --profile profile.json

Without --model the demo model is fetched. LoRA (needs peft) by default, every weight with --full.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fapool_plugin import FAPoolForCausalLM
from fapool_plugin.integrations.huggingface.runs import demo_model, demo_prompt

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder in Hugging Face format; default: the demo model")
    parser.add_argument("--tokens", type=int, default=4500, help="length of each row")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threshold", type=int, default=4096, help="longer rows are pooled")
    parser.add_argument("--pool-ranks", type=int, default=1)
    parser.add_argument("--profile", help="made by fapool calibrate: tells which part of attention the base keeps")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--full", action="store_true", help="train every weight instead of LoRA adapters")
    parser.add_argument("--plot", type=Path, help="picture to write")
    return parser.parse_args()


def rows(tokenizer: Any, count: int, length: int) -> Tensor:
    """Pieces of a real text, one after the other; from the beginning again where it ends."""
    ids_S = tokenizer(demo_prompt(), return_tensors="pt", verbose=False)["input_ids"][0]
    return ids_S.repeat(-(-count * length // len(ids_S)))[: count * length].view(count, length)


def train(model: Any, text_NS: Tensor, given: argparse.Namespace, label: str) -> list[float]:
    """Losses of all steps."""
    torch.manual_seed(0)
    if not given.full:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=given.lr)
    losses = []
    model.train()
    for step, ids_BS in enumerate(text_NS.split(given.batch)):
        began = time.perf_counter()
        loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"{label}, step {step + 1} of {given.steps}: loss {losses[-1]:.5f}, {time.perf_counter() - began:.1f} s")
    return losses


def draw(path: Path, losses: dict[str, list[float]]) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (label, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axis.plot(range(1, len(values) + 1), values, style, label=label, linewidth=3 if style == "-" else 1.5)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend()
    figure.savefig(path)
    print(f"drawn into {path}")


def main() -> None:
    given = arguments()
    folder = given.model or demo_model(progress=lambda stage, *_: print(stage, "..."))
    text_NS = rows(AutoTokenizer.from_pretrained(folder), given.batch * given.steps, given.tokens)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = {"without the pool": train(plain, text_NS, given, "without the pool")}
    settings = {"pool_ranks": given.pool_ranks, "threshold": given.threshold, "activation": "length"}
    settings |= {"profile": given.profile} if given.profile else {}
    pooled = FAPoolForCausalLM.from_pretrained(folder, dtype=torch.float32, fa_pool=settings)
    with pooled.fa_pool as pool:
        losses["with the pool"] = train(pooled, text_NS, given, "with the pool")
        stats = pool.stats()
    for phase in ("training", "backward"):
        print(f"{phase}: {stats[phase]['pooled_calls']} attention calls pooled, {stats[phase]['local_calls']} local")
    one, other = losses.values()
    apart = max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
    print(f"losses differ by {apart:.1e} at most, relative; why local: {stats['local_reasons']}")
    if given.plot:
        draw(given.plot, losses)


if __name__ == "__main__":
    main()
