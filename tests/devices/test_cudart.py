"""Calls of CUDA's runtime, with a stand-in for the library: what fails says which call, and leaves torch nothing to
find; copies are done when they were waited for."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fapool_plugin.devices.copies import Cuda
from fapool_plugin.devices.cudart import CudaError, Cudart, library
from fapool_plugin.wire.device_memory import moved, pushed
from fapool_plugin.wire.messages import LinkLost, Room
from tests.fake_cudart import NO_MEMORY, FakeDevice, FakeRuntime


def test_there_is_none_without_cuda() -> None:
    assert Cudart.of(torch.device("cpu")) is None
    if torch.version.cuda is None:
        assert Cudart.of(torch.device("cuda:0")) is None
        with pytest.raises(OSError, match="without CUDA"):
            library()


@pytest.mark.parametrize("name", ["cudaMalloc", "cudaIpcGetMemHandle", "cudaIpcOpenMemHandle", "cudaHostRegister"])
def test_a_call_that_fails_raises_and_leaves_no_error_behind(name: str) -> None:
    device = FakeDevice()
    address, room = device.allocate(64), torch.zeros(64, dtype=torch.uint8)
    device.runtime.fails[name] = NO_MEMORY
    with pytest.raises(CudaError, match=f"{name} failed with error {NO_MEMORY}"):
        {
            "cudaMalloc": lambda: device.allocate(64),
            "cudaIpcGetMemHandle": lambda: device.handle(address),
            "cudaIpcOpenMemHandle": lambda: device.open(bytes(64)),
            "cudaHostRegister": lambda: device.register(room.data_ptr(), 64),
        }[name]()
    assert device.runtime.last_error == 0, "torch would raise it at its next kernel"
    device.free(address)


def test_what_is_opened_is_the_same_memory_and_copies_wait() -> None:
    mine, theirs = FakeDevice(), FakeDevice()
    address = mine.allocate(4096)
    opened = theirs.open(mine.handle(address))
    x, y = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    theirs.copy(opened + 128, x.data_ptr(), 64)
    assert ctypes.string_at(address + 128, 64) == bytes(64), "the stand-in copies too early to show anything"
    theirs.wait()
    mine.copy(y.data_ptr(), address + 128, 64)
    mine.wait()
    assert torch.equal(x, y)
    theirs.shut(opened)
    mine.free(address)
    for wrong in (lambda: theirs.shut(opened), lambda: mine.free(address)):
        with pytest.raises(CudaError):
            wrong()


def test_no_copy_is_under_way_after_one_that_failed() -> None:
    """What was begun before it would else be done in memory that is something else's by then."""
    device, memory = FakeDevice(), torch.zeros(128, dtype=torch.uint8)
    laid = [(Room(at, at + 64, (64,), torch.uint8, 64), [torch.ones(64, dtype=torch.uint8)]) for at in (0, 64)]
    copy, begun = device.runtime.cudaMemcpyAsync, list[int]()

    def second_fails(*arguments: Any) -> int:
        begun.append(1)
        return NO_MEMORY if len(begun) == 2 else copy(*arguments)

    device.runtime.cudaMemcpyAsync = second_fails  # type: ignore[assignment, method-assign]
    with pytest.raises(LinkLost, match="cudaMemcpyAsync failed"):
        list(pushed(device, memory.data_ptr(), laid, 128, 128))
    assert len(begun) == 2
    assert not device.runtime._waiting, "a copy is done when its memory may be another's"
    begun[:] = [1]
    with pytest.raises(LinkLost, match="cudaMemcpyAsync failed"):
        moved(device, memory.data_ptr(), memory.data_ptr() + 64, 64)
    with pytest.raises(KeyboardInterrupt):  # between a copy and its wait
        interrupted(device, memory)
    assert not device.runtime._waiting


def interrupted(device: FakeDevice, memory: torch.Tensor) -> None:
    wait = device.runtime.cudaStreamSynchronize

    def once(stream: Any) -> int:
        device.runtime.cudaStreamSynchronize = wait  # type: ignore[method-assign]
        raise KeyboardInterrupt

    device.runtime.cudaStreamSynchronize = once  # type: ignore[method-assign]
    moved(device, memory.data_ptr(), memory.data_ptr() + 64, 64)


def test_a_stream_is_current_inside_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has chosen no device is on the first one. Where a stream of another ends, torch makes the first one
    current by cudaSetDevice, which since CUDA 12 makes a context there: hundreds of MiB, for each rank."""
    asked, log = torch.device("cuda:2"), list[str]()

    @contextmanager
    def noted(what: str) -> Iterator[None]:
        log.append(f"{what} {{")
        yield
        log.append(f"}} {what}")

    stream = SimpleNamespace(device=asked, cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "device", lambda device: noted(f"device {device}"))
    monkeypatch.setattr(torch.cuda, "stream", lambda one: noted("stream" if one is stream else "another"))
    monkeypatch.setattr(torch, "empty", lambda *sizes, **keys: log.append("memory"))
    with Cuda().within(stream):
        log.append("copy")
    device = Cudart(asked, FakeRuntime, lambda device: stream)
    device.memory(64)
    device.copy(1, 1, 0)
    inside = ["device cuda:2 {", "stream {", "", "} stream", "} device cuda:2"]
    assert log[:5] == [line or "copy" for line in inside]
    assert log[5:10] == [line or "memory" for line in inside]
    assert log[10:] == ["device cuda:2 {", "} device cuda:2"], "a call of the runtime on the thread's own device"


@pytest.mark.parametrize("nbytes", [1, 300, 2**20])
def test_memory_of_the_host_is_aligned_page_locked_or_not(nbytes: int) -> None:
    """Where nothing can be page-locked, as here, it is the host's own."""
    room = Cudart.host_memory(FakeDevice(), nbytes)
    assert (room.dtype, room.numel(), room.data_ptr() % 64, room.device.type) == (torch.uint8, nbytes, 0, "cpu")
