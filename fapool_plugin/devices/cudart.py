"""CUDA's runtime as carriers need it: memory that other processes write to, page-locked memory, copies between them.

    host            copy ── copy ── wait ─ └─ the other end is told
    own stream        └─ copy ── copy ── done ┘          nothing that computes is on it

Torch's allocator gives out parts of what it has, and a handle opens the whole: so memory for other processes comes from
cudaMalloc itself. Failed calls raise, and leave nothing behind for torch to find (cudaGetLastError). Knows addresses
and bytes; not what they are. Has run with a stand-in for the library only, never on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DEFAULT_KIND = 4
"""cudaMemcpyDefault: the runtime finds out by the addresses where they are."""
_LAZY_PEER_ACCESS = 1
HANDLE_BYTES = 64
_MOST_PINNED = 256 * 1024 * 1024
"""What is larger arrives in pageable memory: page-locked memory is kept for the next message."""
_ALIGNED = 64


class CudaError(RuntimeError):
    """A call of the runtime failed."""


class _Handle(ctypes.Structure):
    """Travels by value."""

    _fields_ = (("bytes", ctypes.c_char * HANDLE_BYTES),)


def library() -> Any:
    """The runtime that torch has loaded. Raises OSError if there is none."""
    if torch.version.cuda is None:
        raise OSError("this torch is built without CUDA")
    return ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")


class Cudart:
    """What one link does on one device, on a stream of its own.

    Args:
        device: whose memory and stream.
        runtime: functions of the runtime; tests have others.
        stream: makes a stream of torch's that has a ``cuda_stream``; tests have others.

    Raises:
        OSError: there is no such library.
    """

    def __init__(
        self,
        device: torch.device,
        runtime: Callable[[], Any] = library,
        stream: Callable[[torch.device], Any] = lambda device: torch.cuda.Stream(device, priority=-1),
    ) -> None:
        self.device, self._runtime = device, runtime()
        self._stream = stream(device)
        """Before others: what computes does not hold copies up for longer than a block of it takes."""
        self._raw = ctypes.c_void_p(self._stream.cuda_stream)

    @classmethod
    def of(cls, device: torch.device) -> Cudart | None:
        """A device's; None on a CPU, and where torch's runtime is not found by its name."""
        try:
            return cls(device) if device.type == "cuda" else None
        except OSError:
            return None

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor is on a device."""
        return x.is_cuda

    def flat(self, x: Tensor) -> Tensor:
        """All elements in one piece, computed; as it is where it is so already."""
        if x.is_contiguous():
            return x
        x = x.contiguous()
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()
        return x

    def memory(self, nbytes: int) -> Tensor:
        """Bytes on the device, to be copied to by this object. Raises torch.OutOfMemoryError."""
        with self._current(), torch.cuda.stream(self._stream):  # else its end makes a context on the thread's device
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_memory(self, nbytes: int) -> Tensor:
        """Bytes of the host, page-locked if they can be. Torch gives them to no other tensor while a copy from a view
        of this one runs, and keeps them for the next: as many as were outstanding at a time, each size a power of
        two."""
        if nbytes <= _MOST_PINNED:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                self._forget_error()
        room = np.empty(nbytes + _ALIGNED, dtype=np.uint8)
        start = -room.ctypes.data % _ALIGNED
        return torch.from_numpy(room[start : start + nbytes])

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Begins to copy between two addresses, whosever memory they are. Raises CudaError."""
        self._call("cudaMemcpyAsync", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(nbytes),
                   _DEFAULT_KIND, self._raw)  # fmt: skip

    def wait(self) -> None:
        """Until all copies have been done. Raises CudaError."""
        self._call("cudaStreamSynchronize", self._raw)

    def register(self, address: int, nbytes: int) -> None:
        """Page-locks memory of the host. Raises CudaError."""
        self._call("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 0)

    def unregister(self, address: int) -> None:
        """No longer. Raises CudaError."""
        self._call("cudaHostUnregister", ctypes.c_void_p(address))

    def allocate(self, nbytes: int) -> int:
        """Device memory that may be opened elsewhere; its address. Raises CudaError."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value or 0

    def free(self, address: int) -> None:
        """Gives it back. Raises CudaError."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def handle(self, address: int) -> bytes:
        """By which another process of this machine opens what was allocated here. Raises CudaError."""
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Where another process's memory is in this one. Raises CudaError: it is none, or on a device that this
        process does not see or reach."""
        address = ctypes.c_void_p()
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
        return address.value or 0

    def shut(self, address: int) -> None:
        """Another process's memory is not used here any more. Raises CudaError."""
        self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(address))

    def _call(self, name: str, *arguments: Any) -> None:
        with self._current():
            code = getattr(self._runtime, name)(*arguments)
            if code:
                self._forget_error()
                raise CudaError(f"{name} failed with error {code}")

    def _current(self) -> AbstractContextManager[Any]:
        """Calls are about this device."""
        return torch.cuda.device(self.device)

    def _forget_error(self) -> None:
        """Torch would take it for its next kernel's."""
        self._runtime.cudaGetLastError()
