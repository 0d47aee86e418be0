"""A base rank of a launch whose pool ranks are struck at random by base rank 0, while all base ranks work."""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import torch

from fapool_plugin import FAPoolForCausalLM
from fapool_plugin.config import section_of
from tests.models import assert_close, eager
from tests.strikes import WAYS, possible_ways, strike_at_random, work

parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed_config", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--models", type=int, default=1, help="each is struck once in every way")
parser.add_argument("--ways", type=int, default=len(WAYS), help="only so many")
parser.add_argument("--out", type=Path, required=True)
arguments = parser.parse_args()

torch.set_num_threads(1)
rank, random_ = int(os.environ["RANK"]), random.Random(arguments.models)
want = [x.clone() for x in work(eager(arguments.model))]
settings, over = section_of(arguments.deepspeed_config), arguments.out / "over"
assert settings is not None
told: dict[str, Any] = {"trials": 0, "longest_s": 0.0, "faults": 0, "pooled": 0, "descriptors": []}
for number in range(arguments.models):
    changes = {"blocks": random_.choice([1, 3]), "kv_home": ["base", "pool"][number % 2]}
    section = settings.model_copy(update=changes)
    with (model := FAPoolForCausalLM.from_pretrained(arguments.model, fa_pool=section).eval()).fa_pool:
        if rank == 0:
            ways = possible_ways()[: arguments.ways]
            told["longest_s"] = max(told["longest_s"], strike_at_random(model, want, ways, random_))
            told["trials"] += len(ways)
        while rank and not over.exists():
            for result, (got, expected) in enumerate(zip(work(model), want, strict=True)):
                assert_close(got, expected, what=f"base rank {rank}: result {result}")
            told["trials"] += 1
        stats = model.fa_pool.stats()
    told["faults"] += stats["faults"]
    told["pooled"] += sum(stats[phase]["pooled_calls"] for phase in ("prefill", "decode", "training"))
    told["descriptors"].append(len(os.listdir("/proc/self/fd")))
over.touch()
(arguments.out / f"base{rank}.json").write_text(json.dumps(told))
