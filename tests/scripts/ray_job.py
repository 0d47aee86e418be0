"""A job on a standing pool: takes its lease, says so, and goes on with its sequence once it is told to.

python ray_job.py MODEL_FOLDER POOL
"""

import sys

import torch

from fapool_plugin import FAPoolForCausalLM

folder, pool = sys.argv[1:]
settings = {
    "pool": "ray",
    "pool_name": pool,
    "pool_ranks": 8,
    "threshold": 64,
    "activation": "length",
    "timeout_s": 2.0,
}
model = FAPoolForCausalLM.from_pretrained(folder, fa_pool=settings)
with torch.no_grad():
    kept = model(torch.arange(3, 83)[None], use_cache=True).past_key_values
print("leased", model.fa_pool.stats()["leased_ranks"], flush=True)
for _ in sys.stdin:
    out = model.generate(
        torch.arange(3, 84)[None], past_key_values=kept, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    print("said", out[0, 81:].tolist(), flush=True)
    print("knows", sorted({event["kind"] for event in model.fa_pool.stats()["events"]}), flush=True)
