"""Models whose keys live on the pool, beside the same without the plugin; files about other models have their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kv_home import LENGTHS, ON_THE_POOL, Steps
from tests.models import Pair, padded_batch


@pytest.fixture
def pair(folder: Path) -> Iterator[Pair]:
    """A Llama with two pool ranks that own its keys."""
    with Pair.of(folder, pool_ranks=2, **ON_THE_POOL) as pair:
        yield pair


@pytest.fixture
def steps(pair: Pair) -> Iterator[Steps]:
    """A prompt of three rows is done, by both."""
    with torch.no_grad():
        yield Steps(pair, *padded_batch(LENGTHS))
