"""Copies between a device and host memory that nothing waits for but what needs their bytes.

    compute stream   q, k, v ── pack ── the base's own share ───────────────▶
    copy stream                   └─ waits ── copy ── event
    host             start ......................... wait ─ └─ the link has the bytes

A stream is current inside :meth:`Copies.start` only, so no block in flight finds another one's. Knows tensors and
streams, no messages. Has run with a stand-in for streams only, never on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Payload = Sequence[Tensor | Sequence[Tensor]]
"""A list of tensors stands for their elements end to end."""


class Cuda:
    """Streams, events and memory as copies need them: CUDA's. Tests have another that writes down what is asked."""

    def stream(self, device: torch.device) -> Any:
        """A new one."""
        return torch.cuda.Stream(device=device)

    def current(self, device: torch.device) -> Any:
        """The stream on which work is launched now."""
        return torch.cuda.current_stream(device)

    def within(self, stream: Any) -> AbstractContextManager[Any]:
        """Work is launched on ``stream``."""
        return torch.cuda.stream(stream)

    def event(self, stream: Any) -> Any:
        """Happens when ``stream`` has come as far."""
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor is on a device."""
        return x.is_cuda

    def pinned(self, x: Tensor) -> Tensor:
        """Host memory for it. torch gives it to no other while a copy into it runs."""
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)

    def keep(self, x: Tensor, stream: Any) -> None:
        """Its memory is no other tensor's before ``stream`` has read it."""
        x.record_stream(stream)


class Copies:
    """From devices to pinned host memory.

    Args:
        api: streams and events.
    """

    def __init__(self, api: Any = None) -> None:
        self._api: Any = api if api is not None else Cuda()
        self._streams: dict[torch.device, Any] = {}

    def start(self, payload: Payload) -> Staged:
        """Packs each part on the current stream, and copies it on another. What is on the host already stays there."""
        api, parts = self._api, [_packed(part) for part in payload]
        device = next((x.device for x in parts if api.holds(x)), None)
        if device is None:
            return Staged(parts, None)
        if device not in self._streams:
            self._streams[device] = api.stream(device)
        copying, there = self._streams[device], list[Tensor]()
        copying.wait_stream(api.current(device))
        with api.within(copying):
            for x in parts:
                if api.holds(x) and x.numel():
                    there.append(api.pinned(x).copy_(x, non_blocking=True))
                    api.keep(x, copying)
                else:
                    there.append(x.cpu())  # a table, or nothing
        return Staged(there, api.event(copying))


class Staged:
    """A payload on its way to host memory."""

    def __init__(self, parts: list[Tensor], event: Any) -> None:
        self._parts, self._event = parts, event

    def wait(self) -> list[Tensor]:
        """The payload in host memory. Waits for its own copy, and for nothing that was launched after it."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._parts

    def is_there(self) -> bool:
        """Whether nothing would be waited for."""
        return self._event is None or bool(self._event.query())


def on_host(copies: Copies | None, payload: Payload) -> Payload:
    """A payload in host memory, waited for; as it is where nothing has to be copied."""
    return payload if copies is None else copies.start(payload).wait()


def onto(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of host memory, on a device.

    From pageable memory CUDA has taken all bytes when the call returns, so that the stream need not be waited for. From
    pinned memory it reads later, while a message's memory may be given back: that is waited for.
    """
    return x if x.device == device else x.to(device, non_blocking=not x.is_pinned())


def _packed(part: Tensor | Sequence[Tensor]) -> Tensor:
    """All elements of a part in one piece: one pack, however many tensors there are."""
    if isinstance(part, Tensor):
        return part.detach().contiguous()
    pieces = [x.detach().reshape(-1) for x in part if x.numel()]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0, device="cpu")
