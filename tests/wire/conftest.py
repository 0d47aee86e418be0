"""Poll loops for the ends of a link."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fapool_plugin.wire.loop import Loop
from tests.thread_pool import two_loops


@pytest.fixture
def loops() -> Iterator[tuple[Loop, Loop]]:
    with two_loops() as made:
        yield made
