"""Ray Train's workers as jobs on a standing pool, each with a model with the plugin and one without.

What is defined here travels by value: a worker imports neither this nor the tests.
"""

import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from fapool_plugin import FAPoolConfig
from fapool_plugin.ranks import directory as standing


def work(given: dict[str, Any]) -> None:
    """A worker: data parallelism by hand, two models beside each other."""
    import torch
    from torch import distributed
    from transformers import AutoModelForCausalLM

    from fapool_plugin import FAPoolForCausalLM

    settings = {"pool": "ray", "pool_name": "train", "pool_ranks": 2, "threshold": 64, "activation": "length"}
    pooled = FAPoolForCausalLM.from_pretrained(given["folder"], fa_pool=settings)
    models = [pooled, AutoModelForCausalLM.from_pretrained(given["folder"], attn_implementation="eager")]
    steps = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    rank = distributed.get_rank()
    torch.manual_seed(rank)
    for _ in range(5):
        ids, losses = torch.randint(0, 50, (2, 150)), []
        for model, optimizer in zip(models, steps, strict=True):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            for weight in model.parameters():
                distributed.all_reduce(weight.grad)
            optimizer.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-5 * losses[1], f"{losses} differ by {losses[0] - losses[1]:.2e}"
    stats = pooled.fa_pool.stats()
    pooled.fa_pool.close()
    assert (stats["faults"], stats["training"]["local_calls"]) == (0, 0), stats["events"]
    Path(given["out"], str(rank)).write_text(str(stats["training"]["pooled_calls"]))


def free() -> int:
    """Ranks of the pool that are free."""
    return sum(one["state"] == "free" for one in standing.told(ray, standing.standing(ray, "train")).values())


if __name__ == "__main__":
    folder, out, path = sys.argv[1:]
    environment = {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    standing.add(ray, "train", range(2), FAPoolConfig(pool="ray", memory_limit_mib=64), standing.Request(0.1))
    while free() < 2:
        time.sleep(0.2)
    trainer = TorchTrainer(
        work,
        train_loop_config={"folder": folder, "out": out},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=f"{out}/runs"),
    )
    assert trainer.fit().error is None
    ray.shutdown()
