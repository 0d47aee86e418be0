"""Models whose prompts are cut into blocks in flight, and the claim that they were.

Pool ranks are threads here: quick to start, and their memory can be looked into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.models import load_pooled, pools, save_model
from tests.thread_pool import ThreadPool

LONG = {"max_position_embeddings": 1024}


def save_long(name: str, folder: Path, **changes: Any) -> Path:
    """A model of this family for prompts of many blocks."""
    return save_model(name, folder, **{"n_positions": 1024, **LONG, **changes})


@contextmanager
def in_blocks(folder: Path, blocks: int | None, **changes: Any) -> Iterator[Any]:
    """The model with pool ranks that are threads, its prompts cut into so many blocks."""
    model = load_pooled(folder, blocks=blocks, **changes)
    model.fa_pool.leases.source = ThreadPool
    with model.fa_pool:
        yield model


@contextmanager
def overlaps(model: Any, blocks: int, full: int = 2, forwards: int = 1, decode: int = 0) -> Iterator[None]:
    """What runs inside makes so many forwards of a prompt, each of so many blocks; ``full`` layers are pooled."""
    before = model.fa_pool.stats()
    with pools(model, prefill=full * blocks * forwards, decode=full * decode):
        yield
    after = model.fa_pool.stats()
    made = after["prefill"]["overlapped_forwards"] - before["prefill"]["overlapped_forwards"]
    assert made == (forwards if blocks > 1 else 0), f"{made} forwards overlapped; {after['not_overlapped_reasons']}"
