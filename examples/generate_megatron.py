"""Generate from a long text by Megatron's own GPT model with borrowed attention ranks.

    python examples/generate_megatron.py MODEL_FOLDER PROMPT.txt configs/fa_pool.json
    torchrun --nproc-per-node 3 examples/generate_megatron.py MODEL_FOLDER PROMPT.txt configs/fa_pool.json

MODEL_FOLDER holds a Llama model as transformers saves it. Under torchrun the model is cut over all processes (tensor
parallel: their number must divide its KV heads), and each starts pool ranks of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file
from torch import Tensor, distributed
from transformers import AutoTokenizer

from fapool_plugin.base.agreement import agree_over
from fapool_plugin.integrations.megatron import FAPoolGPTModel, get_fapool_layer_spec
from fapool_plugin.integrations.megatron.weights import llama_arguments, llama_config, llama_state

NEW_TOKENS = 32


def groups() -> ProcessGroupCollection:
    """All processes are one tensor-parallel group; nothing else is parallel."""
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
    else:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    each = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    me = each[distributed.get_rank()]
    return ProcessGroupCollection(tp=distributed.group.WORLD, cp=me, pp=me, embd=None)


def load(folder: Path, config_file: str, pg: ProcessGroupCollection) -> FAPoolGPTModel:
    """This process's part of the model."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {name: w for path in sorted(folder.glob("*.safetensors")) for name, w in load_file(path).items()}
    rank, size = pg.tp.rank(), pg.tp.size()
    config = llama_config(settings, tp_size=size)
    agree = agree_over(pg.tp) if size > 1 else None
    spec = get_fapool_layer_spec(config, config_file, agree=agree)
    model = FAPoolGPTModel(config, spec, pg_collection=pg, **llama_arguments(settings))
    model.load_state_dict(llama_state(weights, config, tp_rank=rank, tp_size=size))
    return model.eval()


@torch.inference_mode()
def generate(model: FAPoolGPTModel, ids: Tensor, eos: int | None) -> Tensor:
    """Greedy, with Megatron's static KV cache: (1, new tokens)."""
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=ids.shape[1] + NEW_TOKENS)
    tokens = ids
    for _ in range(NEW_TOKENS):
        past = context.sequence_len_offset
        positions = torch.arange(past, tokens.shape[1])[None]
        logits = model(tokens[:, past:], positions, None, inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(tokens.shape[1] - past)
        context.enable_decode_mode()
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == eos:
            break
    return tokens[:, ids.shape[1] :]


def main(model_folder: str, prompt_file: str, config_file: str) -> None:
    """Prints the answer, then what was pooled."""
    pg = groups()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompt = tokenizer(Path(prompt_file).read_text(encoding="utf-8"), return_tensors="pt").input_ids
    model = load(Path(model_folder), config_file, pg)
    with model.fa_pool as pool:
        new = generate(model, prompt, tokenizer.eos_token_id)
        stats = pool.stats()
    if pg.tp.rank() == 0:
        print(tokenizer.decode(new[0]))
        for phase in ("prefill", "decode"):
            print(f"{phase}: {stats[phase]['pooled_calls']} pooled calls, {stats[phase]['local_calls']} local ones")
        for event in stats["events"]:
            print(f"{event['time']}  {event['kind']}: {event['reason']}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
