"""An ordinary DeepSpeed training script with an evaluation of a long sequence; it knows the plugin's counters only."""

import argparse
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import deepspeed
import psutil
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--model", required=True)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--length", type=int, default=200)
parser.add_argument("--checkpointing", action="store_true")
parser.add_argument("--kill-forward", type=int, default=-1, help="step in whose forward a pool rank's worker is killed")
parser.add_argument("--kill-backward", type=int, default=-1)
parser.add_argument("--pause", type=float, default=0.0, help="seconds after each step")
parser.add_argument("--hold", type=int, default=-1, help="step that begins once there is a file --out/go")
parser.add_argument("--out", type=Path, required=True)
parser = deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()

torch.set_num_threads(1)
# Built by a compiler and kept in shared memory: the runs without the plugin do without it, too.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
if arguments.checkpointing:
    model.gradient_checkpointing_enable()
engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
rank = dist.get_rank()


def batch(seed: int) -> torch.Tensor:
    return torch.randint(3, 99, (1, arguments.length), generator=torch.Generator().manual_seed(seed))


def kill(*_: object) -> None:
    """Ends the job's workers, wherever they are in their work."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            mark = process.environ().get("FAPOOL_TEST_LAUNCH")
            if "fapool_plugin.pool.rank" in process.cmdline() and mark == os.environ["FAPOOL_TEST_LAUNCH"]:
                process.kill()


layer = engine.module.model.layers[0]
forward = type(layer).forward


def in_the_middle(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
    output = forward(self, *args, **kwargs)
    if self is not layer:
        return output
    if rank == 0 and step == arguments.kill_forward:
        kill()
    hidden = output[0] if isinstance(output, tuple) else output
    if rank == 0 and step == arguments.kill_backward and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
        hidden.register_hook(kill)
    return output


# In the class: with a hook a model is left whole.
type(layer).forward = in_the_middle
losses, step = [], 0
for step in range(arguments.steps):
    while step == arguments.hold and not (arguments.out / "go").exists():
        time.sleep(0.05)
    ids = batch(step * dist.get_world_size() + rank)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    losses.append(float(loss))
    del loss  # as when a function returns: with its graph the sequence ends
    (arguments.out / f"steps{rank}").write_text(str(len(losses)))
    time.sleep(arguments.pause)
step = -2  # what follows is no step
engine.eval()
with torch.no_grad():
    ids = batch(1000 + rank)
    evaluated = float(engine(input_ids=ids, labels=ids).loss)
engine.save_checkpoint(str(arguments.out / "checkpoint"))
pooled = getattr(engine.module, "fa_pool", None)
told = {
    "losses": losses,
    "evaluated": evaluated,
    "world": {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")},
    "stats": pooled.stats() if pooled is not None else None,
}
(arguments.out / f"base{rank}.json").write_text(json.dumps(told))
