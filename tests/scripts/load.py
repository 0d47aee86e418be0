"""No engine: a model loaded over the base ranks of a launch, each reading its part, then two prompts."""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

from fapool_plugin import FAPoolForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--deepspeed_config", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--lengths", default="300")
parser.add_argument("--new", type=int, default=4)
parser.add_argument("--out", type=Path, required=True)
arguments = parser.parse_args()

torch.set_num_threads(1)
model = FAPoolForCausalLM.from_pretrained(arguments.model, fa_pool=arguments.deepspeed_config, dtype=torch.float32)
answers = []
for length in map(int, arguments.lengths.split(",")):
    ids = torch.randint(3, 99, (1, length), generator=torch.Generator().manual_seed(length))
    answers.append(model.generate(ids, max_new_tokens=arguments.new, do_sample=False)[0, length:].tolist())
rank = dist.get_rank()
told = {
    "answers": answers,
    "stats": model.fa_pool.stats(),
    "elements": sum(parameter.numel() for parameter in model.parameters()),
}
(arguments.out / f"base{rank}.json").write_text(json.dumps(told))
