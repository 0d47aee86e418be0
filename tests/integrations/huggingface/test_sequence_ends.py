"""A sequence ends whenever its last reference goes, in the middle of anything: ranks learn of it, and none is lost."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.blocks import in_blocks
from tests.models import one_thread, random_ids, save_model

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]
LENGTH = 200


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    with one_thread(), in_blocks(save_model("llama", tmp_path), 1) as model:
        yield model


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_a_sequence_that_ends_under_tensors_without_memory(model: Any, mode: Callable[[], Any]) -> None:
    """Garbage is collected at any moment, in the middle of loading another model too."""
    with torch.no_grad():
        output = model(random_ids(1, LENGTH))
        with mode():
            del output
            gc.collect()
        model(random_ids(1, 10))
        stats = model.fa_pool.stats()
    assert (stats["state"], stats["faults"], stats["releases"]) == ("idle", 0, 1), stats["events"]


def test_a_graph_that_is_gone_gives_the_lease_back_at_once(model: Any) -> None:
    """Nothing in it refers to itself: what waits for garbage to be collected holds ranks for long."""
    gc.collect()
    gc.disable()
    try:
        loss = model(random_ids(1, LENGTH), labels=random_ids(1, LENGTH)).loss
        loss.backward()
        assert model.fa_pool.stats()["state"] == "active"
        del loss
        assert model.fa_pool.stats()["state"] == "idle"
    finally:
        gc.enable()
