"""Copies between several devices, on CUDA tensors without numbers: whose stream has to be done with a tensor before its
memory is another's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.devices.copies import Copies, Cuda
from tests.fake_cuda import fake_cuda


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


def test_what_goes_out_is_kept_for_the_copy() -> None:
    api = Kept()
    with fake_cuda():
        keys = torch.zeros(4, 8, device="cuda:0")
        parts = Copies(api).start([torch.zeros(3), keys[:, 2:4]]).wait()
        assert [(str(x.device), x.shape) for x in parts] == [("cpu", (3,)), ("cpu", (4, 2))]
    assert api.log == ["cuda:0 for copies of cuda:0"]
