"""An ordinary DeepSpeed inference script; nothing of the plugin in it but a look at its counters at the end."""

import argparse
import json
import os
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--model", required=True)
parser.add_argument("--lengths", default="300")
parser.add_argument("--new", type=int, default=4)
parser.add_argument("--pause", type=float, default=0.0, help="seconds between two prompts")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--options", default="{}", help="JSON: more arguments of init_inference")
parser = deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()

torch.set_num_threads(1)
# Built by a compiler and kept in shared memory: the runs without the plugin do without it, too.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
engine = deepspeed.init_inference(model, config=arguments.deepspeed_config, **json.loads(arguments.options))
rank = dist.get_rank() if dist.is_initialized() else 0
answers = []
for length in map(int, arguments.lengths.split(",")):
    ids = torch.randint(3, 99, (1, length), generator=torch.Generator().manual_seed(length))
    tokens = engine.generate(input_ids=ids, max_new_tokens=arguments.new, do_sample=False)
    answers.append(tokens[0, length:].tolist())
    (arguments.out / f"answered{rank}").write_text(str(len(answers)))
    time.sleep(arguments.pause)
world = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")}
pooled = getattr(engine.module, "fa_pool", None)
told = {
    "answers": answers,
    "world": world | {"size": dist.get_world_size() if dist.is_initialized() else 1},
    "stats": pooled.stats() if pooled is not None else None,
}
(arguments.out / f"base{rank}.json").write_text(json.dumps(told))
