"""Calls of CUDA's runtime, with a stand-in for the library: what fails says which call, and leaves torch nothing to
find; copies are done when they were waited for."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fapool_plugin.devices.cudart import CudaError, Cudart, library
from tests.fake_cudart import NO_MEMORY, FakeDevice


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


@pytest.mark.parametrize("nbytes", [1, 300, 2**20])
def test_memory_of_the_host_is_aligned_page_locked_or_not(nbytes: int) -> None:
    """Where nothing can be page-locked, as here, it is the host's own."""
    room = Cudart.host_memory(FakeDevice(), nbytes)
    assert (room.dtype, room.numel(), room.data_ptr() % 64, room.device.type) == (torch.uint8, nbytes, 0, "cpu")
