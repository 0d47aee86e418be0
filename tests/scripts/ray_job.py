"""A job on a standing pool: takes its lease, says so, and keeps it until it is killed.

python ray_job.py MODEL_FOLDER POOL
"""

import sys
import time

import torch

from fapool_plugin import FAPoolForCausalLM

folder, pool = sys.argv[1:]
settings = {"pool": "ray", "pool_name": pool, "pool_ranks": 8, "threshold": 64, "activation": "length"}
model = FAPoolForCausalLM.from_pretrained(folder, fa_pool=settings)
with torch.no_grad():
    kept = model(torch.arange(3, 83)[None], use_cache=True).past_key_values
print("leased", model.fa_pool.stats()["leased_ranks"], flush=True)
time.sleep(600)
