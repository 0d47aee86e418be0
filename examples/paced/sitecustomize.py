"""For processes of ``shared_pool.py --device-gflops N``, which have this folder in PYTHONPATH: attention takes as long
as on a device of that speed. It is computed as always, and then the process sleeps for the rest of the time.

So several processes on few cores behave as ranks with devices of their own, if what they compute is small beside it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

SPEED = "SHARED_POOL_GFLOPS"


def paced(attend: Callable[..., Any], flop: Callable[..., float]) -> Callable[..., Any]:
    """``attend``, which returns no sooner than a device would that has ``flop`` of its arguments to do."""
    per_s = float(os.environ[SPEED]) * 1e9

    def waiting(*given: Any, **settings: Any) -> Any:
        due = time.perf_counter() + flop(*given) / per_s
        found = attend(*given, **settings)
        time.sleep(max(0.0, due - time.perf_counter()))
        return found

    return waiting


def of_rectangles(parts: Any) -> float:
    """What a pool rank is asked; each is (q_BSHD, k_BTKD, v_BTKE, position of the first query)."""
    return sum(4.0 * q.shape[0] * q.shape[2] * q.shape[3] * _pairs(q.shape[1], k.shape[1], at) for q, k, _, at in parts)


def of_layer(q_BHSD: Any, k_BHTD: Any, *_: Any) -> float:
    """What a layer of the model attends to by itself; the last query sees all keys."""
    batch, heads, queries, dim = q_BHSD.shape
    keys = k_BHTD.shape[2]
    return 4.0 * batch * heads * dim * _pairs(queries, keys, keys - queries)


def _pairs(queries: int, keys: int, first: int) -> float:
    """(query, key) pairs of a causal lane whose first query is at this position."""
    return float(sum(min(keys, first + query + 1) for query in range(queries)))


if SPEED in os.environ:
    if "fapool_plugin.pool.rank" in sys.orig_argv:
        from fapool_plugin.pool import worker

        worker.attend_all = paced(worker.attend_all, of_rectangles)
    elif "job" in sys.orig_argv:
        from torch.nn import functional

        functional.scaled_dot_product_attention = paced(functional.scaled_dot_product_attention, of_layer)
