"""A launch over two machines whose bodies NIXL writes: the same tokens, and refused by name where one has none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.blocks import save_long
from tests.ranks.test_strangers import launch, machines, pytestmark

__all__ = ["machines"]
pytestmark = [
    *pytestmark,
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed"),
]
SECTION: dict[str, Any] = {"insecure": True, "carrier": "nixl"}
TOKENS = 12_000
"""So that a layer's body is longer than 2 MiB, of which 1 is enough to go that way."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=2 * TOKENS)


def test_two_machines_pool_by_nixl(machines: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    section = SECTION | {"blocks": 1, "timeout_s": 10.0}
    codes, said, errors = launch(machines, folder, tmp_path, (section, section), TOKENS)
    assert codes == [0, 0], errors
    carriers, (equal, pooled, faults, told) = map(json.loads, said.splitlines()[-2:])
    assert equal
    assert (pooled > 0, faults) == (True, 0), told
    assert [kind for kind, _ in carriers] == ["nixl"]
    assert carriers[0][1] > 2 * 2**21, "nothing was long enough to be written by NIXL"


def test_a_rank_that_was_not_told_of_it_is_not_used(machines: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    codes, said, errors = launch(machines, folder, tmp_path, (SECTION, {"insecure": True}))
    assert codes[0] == 0, errors
    equal, pooled, _, told = json.loads(said.splitlines()[-1])
    assert equal
    assert pooled == 0
    assert "carrier is nixl, and not for pool rank 0" in str(told)
