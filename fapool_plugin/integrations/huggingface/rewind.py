"""Hugging Face: a forward taken back to its beginning, to be run once more."""

from __future__ import annotations

from fapool_plugin.base.random_numbers import RandomNumbers
from fapool_plugin.integrations.huggingface.attention import Scope
from fapool_plugin.integrations.huggingface.cache import PooledCache


class Rewind:
    """Takes a forward back to where it is now: what its cache was given, and what it drew, if it is pooled. Of
    short forwards caches with recurrent states are left as the plain model leaves them: copies in each step would be
    dear."""

    def __init__(self, scope: Scope) -> None:
        self._random = RandomNumbers.now() if scope.decided.pooled else None
        long = scope.decided.geometry is not None
        self._cache = scope.cache.rewinder(recurrent=long) if isinstance(scope.cache, PooledCache) else None

    def __call__(self, *, random: bool = True) -> None:
        if random and self._random is not None:
            self._random.set()
        if self._cache is not None:
            self._cache()
