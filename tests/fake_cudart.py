"""A stand-in for CUDA's runtime on a machine without one: device memory is memory that other processes can map, a copy
is done when its stream is waited for and not before, and every call is written down.

It is called as the library is, by ctypes, so that what calls the library is tried, too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fapool_plugin.devices.cudart import HANDLE_BYTES, Cudart

UNWRITTEN = 0xA5
INVALID, NO_MEMORY, UNREGISTERED = 1, 2, 713
_HANDLE = struct.Struct("<8sqqq")
OPEN: dict[int, tuple[int, int]] = {}
"""What runtimes of this process have open, by address: of which process, and which descriptor there."""


class FakeRuntime:
    """Functions of libcudart. ``fails``: error codes by their names."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails: dict[str, int] = {}
        self.last_error = 0
        self.registered: dict[int, int] = {}
        self.opened: dict[int, Any] = {}
        self.allocated: dict[int, tuple[int, Any]] = {}
        """By address: descriptor and memory."""
        self.freed_open = 0
        """Times that memory was given back while it was open elsewhere in this process: undefined, says CUDA."""
        self._waiting: list[tuple[int, int, int]] = []

    def _said(self, name: str, detail: str = "") -> int:
        self.log.append(f"{name} {detail}".strip())
        self.last_error = self.fails.get(name, self.last_error)
        return self.fails.get(name, 0)

    def _failed(self, code: int) -> int:
        self.last_error = code
        return code

    def cudaGetLastError(self) -> int:
        code, self.last_error = self.last_error, 0
        return code

    def cudaHostRegister(self, address: Any, size: Any, flags: int) -> int:
        if code := self._said("cudaHostRegister"):
            return code
        if address.value in self.registered:
            return self._failed(INVALID)
        self.registered[address.value] = size.value
        return 0

    def cudaHostUnregister(self, address: Any) -> int:
        if code := self._said("cudaHostUnregister"):
            return code
        assert _is_mapped(address.value), "unmapped before it was unregistered"
        return 0 if self.registered.pop(address.value, None) else self._failed(UNREGISTERED)

    def cudaMalloc(self, address: Any, size: Any) -> int:
        if code := self._said("cudaMalloc", str(size.value)):
            return code
        descriptor = os.memfd_create("fake device")
        os.ftruncate(descriptor, size.value)
        place, memory = _mapped(descriptor, size.value)
        address._obj.value, self.allocated[place] = place, (descriptor, memory)
        return 0

    def cudaFree(self, address: Any) -> int:
        if code := self._said("cudaFree"):
            return code
        if address.value not in self.allocated:
            return self._failed(INVALID)
        descriptor = self.allocated.pop(address.value)[0]
        self.freed_open += (os.getpid(), descriptor) in OPEN.values()
        os.close(descriptor)
        return 0

    def cudaIpcGetMemHandle(self, handle: Any, address: Any) -> int:
        if code := self._said("cudaIpcGetMemHandle"):
            return code
        descriptor, memory = self.allocated[address.value]
        told = _HANDLE.pack(b"fake ipc", os.getpid(), descriptor, len(memory)).ljust(HANDLE_BYTES, b"\x01")
        ctypes.memmove(ctypes.addressof(handle._obj), told, HANDLE_BYTES)
        return 0

    def cudaIpcOpenMemHandle(self, address: Any, handle: Any, flags: int) -> int:
        if code := self._said("cudaIpcOpenMemHandle"):
            return code
        magic, pid, number, size = _HANDLE.unpack(bytes(handle)[: _HANDLE.size])
        if magic != b"fake ipc" or flags != 1:
            return self._failed(INVALID)
        descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        place, memory = _mapped(descriptor, size)
        os.close(descriptor)
        address._obj.value, self.opened[place] = place, memory
        OPEN[place] = pid, number
        return 0

    def cudaIpcCloseMemHandle(self, address: Any) -> int:
        if code := self._said("cudaIpcCloseMemHandle"):
            return code
        OPEN.pop(address.value, None)
        return 0 if self.opened.pop(address.value, None) is not None else self._failed(INVALID)

    def cudaMemcpyAsync(self, target: Any, source: Any, size: Any, kind: int, stream: Any) -> int:
        assert (kind, stream.value) == (4, 77), "another stream, or a direction that is said and not found out"
        if code := self._said("cudaMemcpyAsync", str(size.value)):
            return code
        self._waiting.append((target.value, source.value, size.value))
        return 0

    def cudaStreamSynchronize(self, stream: Any) -> int:
        if code := self._said("cudaStreamSynchronize"):
            return code
        waiting, self._waiting = self._waiting, []
        for copy in waiting:
            self.done(*copy)
        return 0

    def done(self, target: int, source: int, size: int) -> None:
        """A copy takes place."""
        known = [*self.opened.items(), *((place, memory) for place, (_, memory) in self.allocated.items())]
        for place, memory in known:
            for start in (target, source):
                outside = place <= start < place + len(memory) < start + size
                assert not outside, f"{size} bytes from {start - place} of memory of {len(memory)}"
        ctypes.memmove(target, source, size)


LOST = ("a byte of each", "the last", "behind a half", "beside its place", "the second pass")


class Losing(FakeRuntime):
    """Copies into memory that another process made lose bytes, and nothing says so.

    Args:
        how: of LOST.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.before = how, 0

    def done(self, target: int, source: int, size: int) -> None:
        found = [(place, len(memory)) for place, memory in self.opened.items() if 0 <= target - place < len(memory)]
        if not found:
            super().done(target, source, size)
            return
        (place, ring), third = found[0], size // 3
        at, done = target - place, super().done
        if self.how == "a byte of each":
            done(target, source, third)
            done(target + third + 1, source + third + 1, size - third - 1)
        elif self.how == "the last":
            done(target, source, size - (at + size == ring))
        elif self.how == "behind a half":
            done(target, source, max(0, min(size, ring // 2 - at)))
        elif self.how == "beside its place":
            done(target - min(64, at), source, size)
        elif self.before < ring:
            done(target, source, size)
        self.before += size


class FakeDevice(Cudart):
    """A device whose tensors are those that it made, those that it was given, and with ``all_floats`` all of floats."""

    def __init__(self, runtime: FakeRuntime | None = None, *, all_floats: bool = False) -> None:
        self.runtime, self._all_floats = runtime or FakeRuntime(), all_floats
        self.there: list[Tensor] = []
        self.is_full = False
        super().__init__(torch.device("cuda:0"), lambda: self.runtime, lambda device: SimpleNamespace(cuda_stream=77))

    def holds(self, x: Tensor) -> bool:
        if self._all_floats and x.is_floating_point():
            return True
        at = x.data_ptr()
        return any(one.data_ptr() <= at < one.data_ptr() + max(1, one.nbytes) for one in self.there)

    def memory(self, nbytes: int) -> Tensor:
        if self.is_full:
            raise torch.OutOfMemoryError("no memory is left")
        return self.given(torch.full((nbytes,), UNWRITTEN, dtype=torch.uint8))

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), UNWRITTEN, dtype=torch.uint8)

    def given(self, x: Tensor) -> Tensor:
        """A tensor that is the device's from now on. All are kept: memory that is used again would be mistaken."""
        self.there.append(x)
        return x

    def _current(self) -> AbstractContextManager[Any]:
        return nullcontext()


def _is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges)


def _mapped(descriptor: int, size: int) -> tuple[int, Any]:
    memory = np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
    return memory.ctypes.data, memory
