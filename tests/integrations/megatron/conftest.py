"""A tiny Llama on disk, in transformers and for Megatron: each file has its own.

Imports Megatron when a test asks: files skip themselves where it is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import eager


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import megatron_models

    return megatron_models.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    from tests import megatron_models

    with megatron_models.alone() as groups:
        yield groups


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return eager(folder)
