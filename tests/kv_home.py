"""Models whose keys live on the pool, step by step beside the same model without the plugin.

Knows caches by what they answer; which rank owns what is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from fapool_plugin.integrations.huggingface.layer import PooledLayer
from tests.models import TOLERANCE, Pair, assert_close, eager, load_pooled, random_ids, workers
from tests.thread_pool import ThreadPool

ON_THE_POOL: dict[str, Any] = {"kv_home": "pool", "timeout_s": 2.0}
LENGTHS = [90, 61, 90]
NEW = 6


def kill(count: int) -> None:
    """Ends so many pool ranks that run, the ones that started first, and waits until they have."""
    for one in [one for one in map(psutil.Process, sorted(workers())) if not _has_ended(one)][:count]:
        one.kill()
        until = time.monotonic() + 5
        while not _has_ended(one):
            assert time.monotonic() < until, f"{one} lives on after SIGKILL"
            time.sleep(0.002)


def _has_ended(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@contextmanager
def in_threads(folder: Path, **settings: Any) -> Iterator[Pair]:
    """Both models; the pool ranks are threads, so that there is no process to wait for."""
    model = load_pooled(folder, **settings)
    model.fa_pool.leases.source = ThreadPool
    with model.fa_pool:
        yield Pair(folder, eager(folder), model)


def cut(model: Any) -> None:
    """A pool rank is lost, if any is leased."""
    for rank in model.fa_pool.ranks[:1]:
        rank.link.fail("cut")


class Steps:
    """The same tokens to both models, each with a cache of its own."""

    def __init__(self, pair: Pair, ids: Tensor, mask: Tensor) -> None:
        self.pair, self.mask = pair, mask
        self.cache, self.expected = (
            model(ids, attention_mask=mask, use_cache=True).past_key_values for model in (pair.model, pair.reference)
        )

    def __call__(self, count: int, what: str, tolerance: float = TOLERANCE) -> None:
        ids = random_ids(self.mask.shape[0], count, seed=count)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), count)], dim=1)
        actual, expected = (
            model(ids, attention_mask=self.mask, past_key_values=cache).logits
            for model, cache in ((self.pair.model, self.cache), (self.pair.reference, self.expected))
        )
        assert_close(actual, expected, what=what, tolerance=tolerance)

    def both(self, change: Callable[[Any], object]) -> None:
        change(self.cache)
        change(self.expected)

    def are_away(self) -> bool:
        """Whether no layer has keys here."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, PooledLayer)]
        assert layers
        return all(vars(layer)["_away"] and not layer._kv.length for layer in layers)
