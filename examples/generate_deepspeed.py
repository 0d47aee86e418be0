"""Generate greedily with an ordinary DeepSpeed inference script: there is no line of the plugin in it.

    deepspeed --num_gpus 3 --module fapool_plugin.run examples/generate_deepspeed.py \\
        --deepspeed_config configs/ds_inference_fapool.json --model MODEL_FOLDER --prompt-file PROMPT.txt
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=0, help="from the launcher")
    parser.add_argument("--model", help="model folder; without it the config's own model section, with random weights")
    parser.add_argument("--prompt-file", type=Path, help="text; without it random tokens")
    parser.add_argument("--prompt-tokens", type=int, default=6000, help="length of the prompt, at most")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each base rank")
    parser.add_argument("--json", type=Path, help="also write tokens, seconds and counters to this file")
    given = deepspeed.add_config_arguments(parser).parse_args()
    if not given.deepspeed_config:
        parser.error("--deepspeed_config is missing: give a JSON file such as configs/ds_inference_fapool.json")
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    config = json.loads(Path(given.deepspeed_config).read_text(encoding="utf-8"))
    sizes = config.pop("model", None)
    tokenizer = None
    if given.model:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(given.model)
    elif sizes:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.float32).eval()
    else:
        raise SystemExit("--model is missing, and the config has no model section: give one of both")
    if given.prompt_file and tokenizer:
        text = given.prompt_file.read_text(encoding="utf-8")
        ids_BS = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : given.prompt_tokens]
    else:
        seeded = torch.Generator().manual_seed(0)
        ids_BS = torch.randint(model.config.vocab_size, (1, given.prompt_tokens), generator=seeded)

    engine = deepspeed.init_inference(model, config=config)
    began = time.perf_counter()
    # Without a mask generate() takes every pad token in the prompt for padding.
    mask_BS = torch.ones_like(ids_BS)
    out_BS = engine.generate(
        input_ids=ids_BS, attention_mask=mask_BS, max_new_tokens=given.max_new_tokens, do_sample=False
    )
    took_s = time.perf_counter() - began
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    tokens = out_BS[0, ids_BS.shape[1] :].tolist()
    print(f"tokens: {tokens}")
    if tokenizer:
        print(f"text: {tokenizer.decode(tokens)!r}")
    print(f"{ids_BS.shape[1]} prompt tokens, {len(tokens)} new ones: {took_s:.1f} s")
    pool = getattr(engine.module, "fa_pool", None)
    stats = pool.stats() if pool else None
    if given.json:
        given.json.write_text(json.dumps({"tokens": tokens, "seconds": took_s, "stats": stats}), encoding="utf-8")
    if stats:
        for phase in ("prefill", "decode"):
            print(
                f"{phase}: {stats[phase]['pooled_calls']} attention calls pooled, {stats[phase]['local_calls']} local"
            )
        print(f"why local: {stats['local_reasons']}; ranks lost: {stats['faults']}")


if __name__ == "__main__":
    main()
