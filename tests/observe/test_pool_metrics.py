"""What ranks of a standing pool say, scraped: every figure, and nothing of a rank that says nothing."""

from __future__ import annotations

import inspect
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from fapool_plugin.observe.prometheus import HOST, RANK_STATES, of_standing_ranks, serve
from fapool_plugin.ranks.directory import OTHER
from fapool_plugin.ranks.standing import StandingRank

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).resolve().parents[2]
RANKS: list[dict[str, Any]] = [
    {"rank": 0, "state": "leased", "requests": 11, "busy_s": 1.5, "held_bytes": 2**20, "leased_s": 3.25, "lives": 1},
    {"rank": 4, "state": "free", "requests": 12, "busy_s": 2.5, "held_bytes": 0, "leased_s": 0.0, "lives": 7},
    {"rank": 5, "state": "waiting"},
]


def scrape() -> tuple[dict[str, float], str]:
    """(number by sample as it is written, the whole page)."""
    with serve(lambda: RANKS, 0, of_standing_ranks) as server:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        text = opener.open(f"http://{HOST}:{server.port}/metrics", timeout=10).read().decode()
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(number) for name, number in samples}, text


def test_a_scrape_shows_what_ranks_say() -> None:
    expected = {f'fapool_pool_ranks{{state="{state}"}}': 0.0 for state in RANK_STATES}
    expected |= {f'fapool_pool_ranks{{state="{state}"}}': 1.0 for state in ("leased", "free", "waiting")}
    for rank, numbers in ((0, (11, 1.5, 2**20, 3.25, 1)), (4, (12, 2.5, 0, 0, 7))):
        names = ("requests_total", "busy_seconds_total", "held_bytes", "lease_seconds", "starts_total")
        expected |= {f'fapool_pool_rank_{n}{{rank="{rank}"}}': one for n, one in zip(names, numbers, strict=True)}
    found, _ = scrape()
    assert found == expected, set(found.items()) ^ set(expected.items())


def test_every_metric_is_explained() -> None:
    found = set(re.findall(r"^# TYPE (\w+) ", scrape()[1], re.MULTILINE))
    text = (ROOT / "docs" / "pool.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| `(fapool_\w+)` \|", text, re.MULTILINE))
    assert {name.removesuffix("_total") for name in found} == shown


def test_every_state_of_a_rank_is_counted() -> None:
    states = set(re.findall(r'"(\w+)"', inspect.getsource(StandingRank._state)))
    assert states | {"waiting", OTHER} == set(RANK_STATES)
