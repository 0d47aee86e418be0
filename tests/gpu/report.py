"""What a step of the GPU check says: lines of JSON, each out before the next is tried, so that a step that hangs has
told all before. Knows no step.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import torch
from torch import Tensor


class Missing(Exception):
    """What a part needs is not here: it is skipped, and says why."""


class Report:
    """Of one step, on one device.

    Args:
        stream: where lines go.
        device: what is checked.
        rehearsal: sizes are a hundredth, and nothing is proved but that the script runs.
    """

    def __init__(self, stream: TextIO, device: torch.device, rehearsal: bool) -> None:
        self.stream, self.device, self.rehearsal = stream, device, rehearsal

    def size(self, full: int, small: int) -> int:
        """``full`` on a device, ``small`` in a rehearsal."""
        return small if self.rehearsal else full

    def passed(self, name: str, ok: bool, detail: str = "") -> None:
        self._say("PASS" if ok else "FAIL", name, detail)

    def close(self, name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        """Finite, not all zero, and equal within ``tolerance`` of the largest expected value."""
        actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
        scale = expected.abs().max().item()
        worst = (actual - expected).abs().max().item()
        fine = bool(actual.isfinite().all()) and scale > 0 and worst <= tolerance * scale
        self.passed(name, fine, f"largest difference {worst:.3g}, {tolerance * scale:.3g} allowed")

    def skipped(self, name: str, why: str) -> None:
        self._say("SKIP", name, why)

    def figure(self, name: str, value: float, unit: str) -> None:
        self._say("FIGURE", name, unit, value)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What raises inside fails under this name, and the step goes on."""
        try:
            yield
        except Missing as missing:
            self.skipped(name, str(missing))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error).strip().splitlines() or [""]
            self.passed(name, False, f"{type(error).__name__}: {text[0][:300]} ({last.name}, line {last.lineno})")

    def timed(self, work: Callable[[], object], repeats: int = 5) -> float:
        """The median of ``repeats`` runs in seconds, after one that does not count; by the device's own clock."""
        work()
        seconds = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                end.synchronize()
                seconds.append(start.elapsed_time(end) / 1e3)
            else:
                began = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def _say(self, kind: str, name: str, detail: str, value: float | None = None) -> None:
        said = {"kind": kind, "name": name, "detail": detail} | ({"value": value} if value is not None else {})
        print(json.dumps(said), file=self.stream, flush=True)
