"""Standing pools for tests: ranks that are made and ended, what they say, and a job that borrows them.

Needs a Ray cluster that this process is in; knows no test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fapool_plugin import FAPoolConfig, FAPoolForCausalLM
from fapool_plugin.ranks import directory
from tests.launches import until

SETTINGS = FAPoolConfig(pool="ray", memory_limit_mib=64, timeout_s=2.0)
COMES_S = 60.0


def said(ray: Any, pool: str) -> dict[int, dict[str, Any]]:
    """What each rank says of itself, by number."""
    return directory.told(ray, directory.standing(ray, pool))


def serving(ray: Any, pool: str) -> set[int]:
    """Numbers of the ranks that serve, leased or not."""
    return {number for number, one in said(ray, pool).items() if one["state"] in ("free", "leased")}


def all_free(ray: Any, pool: str) -> bool:
    """Whether no rank is leased."""
    return {one["state"] for one in said(ray, pool).values()} == {"free"}


def grow(ray: Any, pool: str, numbers: range, cpus: float = 0.1) -> None:
    """Adds these ranks, and waits until they serve."""
    directory.add(ray, pool, numbers, SETTINGS, directory.Request(cpus))
    until(lambda: set(numbers) <= serving(ray, pool), COMES_S, lambda: f"ranks stand: {said(ray, pool)}")


def end(ray: Any, pool: str) -> None:
    """Ends a pool; nothing of it is left."""
    actors = directory.standing(ray, pool)
    ray.get([actors[number].leave.remote(0.0) for number in said(ray, pool)])
    for actor in actors.values():
        ray.kill(actor, no_restart=True)


@contextmanager
def job(folder: Path, pool: str, **more: Any) -> Iterator[Any]:
    """A model that borrows ranks of the pool for more than 16 tokens."""
    settings: dict[str, Any] = {"pool": "ray", "pool_name": pool, "pool_ranks": 8, "threshold": 16, "kv_block": 4}
    settings |= {"activation": "length", "blocks": 1, "timeout_s": 5.0}
    model = FAPoolForCausalLM.from_pretrained(folder, fa_pool=settings | more).eval()
    with model.fa_pool:
        yield model


def leased(model: Any) -> list[int]:
    """Numbers of the ranks that a job has now."""
    return list(model.fa_pool.stats()["leased_ranks"])
