"""One of two tensor-parallel ranks with a pool rank of its own: answers the questions of test_megatron_tp.

    python -m tests.megatron_ranks FOLDER RANK

Reads a model in FOLDER, writes what it computed there; knows no reference.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import distributed

from fapool_plugin.base.agreement import agree_over
from fapool_plugin.ranks.local import LocalPool
from tests import megatron_models as mm
from tests.models import random_ids

SIZE, LONG, NEW = 2, 60, 6


def counted(model: Any) -> dict[str, Any]:
    stats = model.fa_pool.stats()
    kept = ("prefill", "decode", "training", "backward", "faults", "stale", "local_reasons")
    return {name: stats[name] for name in kept}


def answers(folder: Path) -> dict[str, Any]:
    rank, groups = distributed.get_rank(), mm.groups()
    found: dict[str, Any] = {"agreed": agree_over(groups.tp)((rank + 1, 10 * rank + 5))}
    model = mm.build(folder, groups)
    ids = random_ids(2, LONG)
    with model.fa_pool as pool:
        with torch.no_grad():
            found["short"], found["long"] = mm.logits_of(model, ids[:, :12]), mm.logits_of(model, ids)
            texts = [random_ids(1, length, seed=length) for length in (40, 9, 30)]
            found["packed"] = mm.logits_of(model, torch.cat(texts, 1), packed_seq_params=mm.pack([40, 9, 30]))
            found["before_steps"] = counted(model)
            context, pieces, logits = StaticInferenceContext(2, 100), [ids], []
            for _ in range(NEW):
                logits += mm.steps(model, context, pieces[-1:])
                pieces.append(logits[-1].argmax(-1, keepdim=True))
            found["tokens"], found["logits"] = torch.cat(pieces, 1), torch.stack(logits, 1)
            found["after_steps"] = counted(model)
        trained = mm.logits_of(model, ids)
        loss = mm.loss_of(trained, ids)
        loss.backward()
        found["loss"] = loss.detach()
        found["gradients"] = {name: parameter.grad for name, parameter in model.named_parameters()}
        # Only one of the ranks loses its pool rank; the forwards of both go on together.
        if rank == 1:
            assert isinstance(pool.leases.pool, LocalPool)
            os.kill(pool.leases.pool.pids()[0], signal.SIGKILL)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found["last"] = mm.steps(model, context, pieces[-1:])[0]
        found["end"] = counted(model)
    return found


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), SIZE)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    try:
        torch.save(answers(folder), folder / f"rank{rank}.pt")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
