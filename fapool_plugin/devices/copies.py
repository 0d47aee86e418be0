"""Copies between a device and host memory that nothing waits for but what needs their bytes.

    compute stream   q, k, v ── pack ── the base's own share ───────────────▶
    copy stream                   └─ waits ── copy ── event
    host             start ......................... wait ─ └─ the link has the bytes

    host             a body has come, into page-locked memory ── bring ── goes on
    copy stream, in                                               └─ copy ── event ── that memory may be used again
    compute stream   what was launched before ──────────────────────────────  └─ waits ── reads

A carrier that takes bodies from the device copies them by itself: then only the pack is waited for. What comes in has a
stream of its own, or it would wait for all that goes out, and so for what computes. A stream is current inside these
methods only, so no block in flight finds another one's. Knows tensors and streams, no messages. Has run with a stand-in
for streams only, never on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Payload = Sequence[Tensor | Sequence[Tensor]]
"""A list of tensors stands for their elements end to end."""
Takes = Callable[[int], bool]
"""Whether a body of so many bytes stays on its device: its carrier copies it."""


class Cuda:
    """Streams, events and memory as copies need them: CUDA's. Tests have another that writes down what is asked."""

    def stream(self, device: torch.device) -> Any:
        """A new one."""
        return torch.cuda.Stream(device=device)

    def current(self, device: torch.device) -> Any:
        """The stream on which work is launched now."""
        return torch.cuda.current_stream(device)

    @contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        """Work is launched on ``stream``. Its device is current, too: a stream that ends makes the thread's own device
        current again, and with it a context there, which a thread on another one may not have."""
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            yield

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

    def is_on(self, x: Tensor, device: torch.device) -> bool:
        """Whether a tensor is on this device."""
        return x.device == device

    def sent(self, x: Tensor, device: torch.device) -> Tensor:
        """A tensor of host memory, on its way to a device. From pageable memory CUDA has taken all bytes when this
        returns; page-locked memory torch gives to no other before they are read."""
        return x.to(device, non_blocking=True)

    def keep(self, x: Tensor, stream: Any) -> None:
        """Its memory is no other tensor's before ``stream`` has read it."""
        x.record_stream(stream)


def _never(nbytes: int) -> bool:
    return False


class Copies:
    """Between devices and page-locked host memory.

    Args:
        api: streams and events.
    """

    def __init__(self, api: Any = None) -> None:
        self._api: Any = api if api is not None else Cuda()
        self._out: dict[torch.device, Any] = {}
        self._in: dict[torch.device, Any] = {}

    def start(self, payload: Payload, takes: Takes = _never) -> Staged:
        """Packs each part on the current stream, and copies it on another, unless it is taken from the device. What is
        on the host already stays there."""
        api, parts = self._api, [_packed(part) for part in payload]
        device = next((x.device for x in parts if api.holds(x)), None)
        if device is None:
            return Staged(parts, None)
        if takes(sum(x.numel() * x.itemsize for x in parts)):
            return Staged(parts, api.event(api.current(device)))
        copying, there = self._stream(self._out, device), list[Tensor]()
        copying.wait_stream(api.current(device))
        with api.within(copying):
            for x in parts:
                if api.holds(x) and x.numel():
                    there.append(api.pinned(x).copy_(x, non_blocking=True))
                    api.keep(x, copying)
                else:
                    there.append(x.cpu())  # a table, or nothing
        return Staged(there, api.event(copying))

    def bring(self, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Tensors of a message that has come, on a device: what is launched on the current stream from now on finds
        them there. The host waits for nothing."""
        api, there = self._api, list(tensors)
        away = [at for at, x in enumerate(there) if x.numel() and not api.is_on(x, device)]
        current = api.current(device)
        if away:
            coming = self._stream(self._in, device)
            with api.within(coming):
                for at in away:
                    there[at], source = api.sent(there[at], device), there[at]
                    if source.is_cuda:
                        api.keep(source, api.current(source.device))  # which reads it, and did not make it
            current.wait_event(api.event(coming))
        for x in there:
            if x.numel():
                api.keep(x, current)  # it was made on another stream, here or by a carrier
        return there

    def _stream(self, streams: dict[torch.device, Any], device: torch.device) -> Any:
        if device not in streams:
            streams[device] = self._api.stream(device)
        return streams[device]


class Staged:
    """A payload on its way to host memory, or to be taken from a device."""

    def __init__(self, parts: list[Tensor], event: Any) -> None:
        self._parts, self._event = parts, event

    def wait(self) -> list[Tensor]:
        """The payload in host memory, or computed. Waits for its own copy, and for nothing that was launched after
        it."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._parts


def sendable(copies: Copies | None, payload: Payload, takes: Takes = _never) -> Payload:
    """A payload as a link sends it, waited for; as it is where nothing has to be copied."""
    return payload if copies is None else copies.start(payload, takes).wait()


def brought(copies: Copies | None, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """What a message has brought, where it is computed with."""
    return copies.bring(tensors, device) if copies is not None else [x.to(device) for x in tensors]


def _packed(part: Tensor | Sequence[Tensor]) -> Tensor:
    """All elements of a part in one piece: one pack, however many tensors there are."""
    if isinstance(part, Tensor):
        return part.detach().contiguous()
    pieces = [x.detach().reshape(-1) for x in part if x.numel()]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0, device="cpu")
