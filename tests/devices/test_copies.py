"""Copies between several devices, on CUDA tensors without numbers: whose stream has to be done with a tensor before its
memory is another's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.devices import clock
from fapool_plugin.devices.copies import Copies, Cuda
from fapool_plugin.devices.cudart import Cudart
from tests.fake_cuda import fake_cuda
from tests.fake_cudart import FakeDevice


class Kept(Cuda):
    """Writes down which tensor is kept for which stream."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name=f"copies of {device}", wait_stream=lambda other: None)

    def current(self, device: torch.device) -> Any:
        return SimpleNamespace(name=f"{device}", wait_event=lambda event: None)

    @contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        yield

    def event(self, stream: Any) -> Any:
        return None

    def pinned(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="cpu")

    def keep(self, x: Tensor, stream: Any) -> None:
        self.log.append(f"{x.device} for {stream.name}")


@pytest.mark.parametrize(
    ("source", "log"),
    [
        ("cpu", ["cuda:1 for cuda:1"]),
        ("cuda:1", ["cuda:1 for cuda:1"]),
        # A carrier's body is of the base's device; a model on several has layers on others. The copy between them is
        # on the current stream of the first, which did not make it: the next body would be written over it.
        ("cuda:0", ["cuda:0 for cuda:0", "cuda:1 for cuda:1"]),
    ],
)
def test_what_comes_in_is_kept_for_who_reads_it(source: str, log: list[str]) -> None:
    api = Kept()
    with fake_cuda():
        (x,) = Copies(api).bring([torch.zeros(8, device=source)], torch.device("cuda:1"))
        assert str(x.device) == "cuda:1"
    assert api.log == log


class Said:
    """Stands for torch.cuda's streams and events: writes down what is asked."""

    def __init__(self, log: list[str], name: str, **keys: Any) -> None:
        self.name, self.log = name, log
        log.append(f"{name} {keys}")

    def record(self, stream: Said) -> None:
        self.log.append(f"{self.name} on {stream.name}")

    def synchronize(self) -> None:
        self.log.append(f"waits for {self.name}")


def test_cuda_is_asked_what_the_stand_ins_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own methods run nowhere without a GPU."""
    device, log = torch.device("cuda:1"), list[str]()
    monkeypatch.setattr(torch.cuda, "Stream", partial(Said, log, "stream"))
    monkeypatch.setattr(torch.cuda, "Event", partial(Said, log, "event"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Said(log, f"current of {device}"))
    cuda, x = Cuda(), torch.zeros(2, 3)
    cuda.event(cuda.stream(device))
    with monkeypatch.context() as memory:
        memory.setattr(torch, "empty", lambda shape, **keys: log.append(f"{tuple(shape)} {keys}"))
        cuda.pinned(x)
    clock.recorded(device)
    assert log == [
        "stream {'device': device(type='cuda', index=1)}", "event {}", "event on stream",
        "(2, 3) {'dtype': torch.float32, 'pin_memory': True}",
        "event {'enable_timing': True}", "current of cuda:1 {}", "event on current of cuda:1",
    ]  # fmt: skip
    assert cuda.current(device).name == "current of cuda:1"
    log.clear()
    with fake_cuda():
        rows = torch.zeros(4, 8, device="cuda:0")
        assert Cudart.flat(FakeDevice(), rows) is rows
        assert Cudart.holds(FakeDevice(), rows)
        assert Cudart.flat(FakeDevice(), rows.T).is_contiguous()
    assert log == ["current of cuda:0 {}", "waits for current of cuda:0"], "a copy that is not there yet would be sent"


def test_what_goes_out_is_kept_for_the_copy() -> None:
    api = Kept()
    with fake_cuda():
        keys = torch.zeros(4, 8, device="cuda:0")
        parts = Copies(api).start([torch.zeros(3), keys[:, 2:4]]).wait()
        assert [(str(x.device), x.shape) for x in parts] == [("cpu", (3,)), ("cpu", (4, 2))]
    assert api.log == ["cuda:0 for copies of cuda:0"]
