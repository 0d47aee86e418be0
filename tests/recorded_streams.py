"""A stand-in for CUDA's streams and events on tensors of a CPU: writes down, in order, what is asked of them.

Memory that a copy on another stream fills is filled when that copy's event has been waited for, by the host or, of what
comes in, by the compute stream, and not before: who reads too early reads the filling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

UNWRITTEN = -7.0


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")
        event.happen()


class Event:
    def __init__(self, log: list[str], name: str, late: list[Callable[[], object]]) -> None:
        self.log, self.name, self.late = log, name, late

    def query(self) -> bool:
        return not self.late

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")
        self.happen()

    def happen(self) -> None:
        for fill in self.late:
            fill()
        self.late.clear()


class Recorder:
    """What :class:`fapool_plugin.devices.copies.Cuda` is, for tensors that have at least ``least`` elements of floats:
    smaller ones and integers count as the host's."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.inside: list[str] = []
        """Streams that are current now."""
        self._late: list[Callable[[], object]] = []
        self._events = self._streams = 0

    def stream(self, device: torch.device) -> Stream:
        self._streams += 1
        return Stream(self.log, "copy" if self._streams == 1 else f"copy {self._streams}")

    def current(self, device: torch.device) -> Stream:
        return Stream(self.log, "compute")

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        self.inside.append(stream.name)
        yield
        self.inside.pop()

    def event(self, stream: Any) -> Event:
        self._events += 1
        late, self._late = self._late, []
        self.log.append(f"event {self._events} on {stream.name}")
        return Event(self.log, f"event {self._events}", late)

    def holds(self, x: Tensor) -> bool:
        return x.is_floating_point()

    def is_on(self, x: Tensor, device: torch.device) -> bool:
        return not x.is_floating_point()

    def sent(self, x: Tensor, device: torch.device) -> Tensor:
        return _Late(self, x).copy_(x, non_blocking=True)

    def pinned(self, x: Tensor) -> Any:
        return _Late(self, x)

    def keep(self, x: Tensor, stream: Stream) -> None:
        self.log.append(f"memory kept for {stream.name}")


class _Late:
    def __init__(self, recorder: Recorder, x: Tensor) -> None:
        self.recorder, self.memory = recorder, torch.full(x.shape, UNWRITTEN, dtype=x.dtype)

    def copy_(self, x: Tensor, non_blocking: bool) -> Tensor:
        assert non_blocking
        assert len(self.recorder.inside) == 1, "copied on the compute stream"
        source = x.clone()  # what the stream reads is what was launched before
        self.recorder._late.append(lambda: self.memory.copy_(source))
        self.recorder.log.append("copy")
        return self.memory


class Ticks:
    """Events of a device that has come as far as ``now``, and reaches each event ``takes`` seconds after the last."""

    def __init__(self, takes: float = 1.0) -> None:
        self.takes, self.launched, self.now = takes, 0, 0

    def __call__(self, device: torch.device) -> Tick:
        self.launched += 1
        return Tick(self, self.launched)


class Tick:
    def __init__(self, ticks: Ticks, at: int) -> None:
        self.ticks, self.at = ticks, at

    def query(self) -> bool:
        return self.ticks.now >= self.at

    def synchronize(self) -> None:
        self.ticks.now = max(self.ticks.now, self.at)

    def elapsed_time(self, other: Tick) -> float:
        assert other.query(), "asked of an event that has not happened"
        return (other.at - self.at) * self.ticks.takes * 1e3
