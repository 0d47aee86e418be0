"""Hugging Face: a forward taken back to its beginning, to be run once more."""

from __future__ import annotations

import torch

from fapool_plugin.integrations.huggingface.attention import Scope
from fapool_plugin.integrations.huggingface.cache import PooledCache


class Rewind:
    """Takes a forward back to where it is now: what it drew and what its cache was given."""

    def __init__(self, scope: Scope) -> None:
        on_cuda = torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing()
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_cuda else []
        self._cache = scope.cache.rewinder() if isinstance(scope.cache, PooledCache) else None

    def __call__(self) -> None:
        cpu, cuda = self._random
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if self._cache is not None:
            self._cache()
