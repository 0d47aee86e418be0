"""An ordinary Accelerate script, of DeepSpeed or not: some steps of training, then a long sequence."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--model", required=True)
parser.add_argument("--length", type=int, default=200)
parser.add_argument("--fa_pool", help="a config for FAPoolPlugin, if the script is to use it")
parser.add_argument("--out", type=Path, required=True)
arguments = parser.parse_args()

plugin = None
if arguments.fa_pool:
    from fapool_plugin.integrations.accelerate import FAPoolPlugin

    plugin = FAPoolPlugin(arguments.fa_pool)
torch.set_num_threads(1)
by_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
accelerator = Accelerator(cpu=not by_deepspeed, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
if plugin is not None:
    plugin.attach(accelerator)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rows = [torch.randint(3, 99, (arguments.length,), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
loader: Any = torch.utils.data.DataLoader(dataset, batch_size=1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
for batch in loader:
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
model.eval()
with torch.no_grad():
    evaluated = float(model(**batch).loss)
pooled = getattr(accelerator.unwrap_model(model), "fa_pool", None)
told = {
    "losses": losses,
    "evaluated": evaluated,
    "processes": accelerator.num_processes,
    "world": {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")},
    "stats": pooled.stats() if pooled is not None else None,
}
(arguments.out / f"base{accelerator.process_index}.json").write_text(json.dumps(told))
accelerator.end_training()
