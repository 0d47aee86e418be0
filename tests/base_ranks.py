"""Base ranks for tests: processes that stay, and run one function at a time, each in its rank.

Knows torch.distributed and no model. A test asks for 2 or 3 of them; groups of both sizes are there from the start,
so the group under test is not the default one.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_START_S = 120.0


class BaseRanks:
    """``most`` processes over gloo. After a failure, or a time limit, all are ended, and started anew when asked."""

    def __init__(self, folder: Path, most: int = 3) -> None:
        self.folder, self.most = folder, most
        self._starts = 0
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, size: int, function: Callable[..., Any], *args: Any, limit_s: float = 120.0) -> list[Any]:
        """``function(group, *args)`` on the first ``size`` ranks at once; its results, by rank.

        Raises AssertionError with a rank's traceback if one fails, or with their numbers if some are not ready in time.
        """
        if not self._ranks:
            self._start()
            limit_s += _START_S
        asked = self._ranks[:size]
        for _, connection in asked:
            # Plain pickle: multiprocessing's would put tensors into shared memory.
            connection.send_bytes(pickle.dumps((size, function, args)))
        results: dict[int, Any] = {}
        until = time.monotonic() + limit_s
        while len(results) < size:
            for rank, (process, connection) in enumerate(asked):
                if rank in results:
                    continue
                if not connection.poll(0.01):
                    if not process.is_alive() and not connection.poll():
                        self.close()
                        raise AssertionError(f"base rank {rank} ended with code {process.exitcode}")
                    continue
                failed, results[rank] = pickle.loads(connection.recv_bytes())
                if failed:
                    self.close()
                    raise AssertionError(f"base rank {rank}:\n{results[rank]}")
            if time.monotonic() > until:
                self.close()
                raise AssertionError(f"only base ranks {sorted(results)} of {size} were ready within {limit_s:g} s")
        return [results[rank] for rank in range(size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._starts += 1
        store = str(self.folder / f"store{self._starts}")
        for rank in range(self.most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, store, rank, self.most), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def close(self) -> None:
        """Ends them all."""
        for process, connection in self._ranks:
            connection.close()
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._ranks = []


@contextmanager
def base_ranks(folder: Path) -> Iterator[BaseRanks]:
    """Base ranks for a while."""
    ranks = BaseRanks(folder)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(connection: Connection, store: str, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    # The asking process may be gone.
    with suppress(EOFError, OSError):
        while True:
            size, function, args = pickle.loads(connection.recv_bytes())
            try:
                answer = False, function(groups[size], *args)
            except BaseException:
                answer = True, traceback.format_exc()
            connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
