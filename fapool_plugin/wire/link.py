"""Links: how one base rank and one pool rank exchange messages, and notice that the other is gone.

A link is a pair of two-member gloo groups on a TCPStore, outside torch.distributed's WORLD: one for messages, one
for heartbeats. This module does not know what the messages mean.

Tensors on other devices are staged through host memory; NCCL links do not exist yet.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from fapool_plugin.wire.messages import Header, LinkLost, Message, Op, Wire, fill, frame_bytes

_FOREVER = timedelta(days=365)
"""For waits that a lost link ends: gloo closes a pair when a wait of its own times out."""


def _group(store: dist.Store, name: str, rank: int, timeout: timedelta, host: str | None) -> Any:
    """A two-member gloo group. Typed as Any: torch's stubs do not know its methods."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout, options._threads = timeout, 1
    options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
    return gloo(dist.PrefixStore(name, store), rank, 2, options)


class Link:
    """One end of a link.

    A reader thread receives ahead into a queue, so that a message never waits for the computation before it, and a
    heartbeat thread watches the other end: the base asks, the pool rank answers, each ``timeout_s / 5``. Whichever
    finds the other end gone ends the queue with :class:`LinkLost`, so every wait is bounded.

    Args:
        store: where the two ends meet.
        name: unique for this link; both ends give the same.
        side: "base" asks for heartbeats, "pool" answers them.
        timeout_s: silence, in seconds, after which the other end is lost.
        connect_timeout_s: how long to wait for the other end at first; a RuntimeError after that.
        host: address to bind to; None for the default interface.
        into: called by the reader with all that arrives, when several links share a queue; None for one of its own.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        side: Literal["base", "pool"],
        *,
        timeout_s: float,
        connect_timeout_s: float = 60.0,
        host: str | None = None,
        into: Callable[[tuple[Link, Message | LinkLost]], object] | None = None,
    ) -> None:
        rank = 0 if side == "base" else 1
        self.name, self._peer, self._tag = name, 1 - rank, rank
        connect = timedelta(seconds=connect_timeout_s)
        self._data, self._pulse = (_group(store, f"{name}/{use}", rank, connect, host) for use in ("data", "pulse"))
        self._timeout_s, self._silence = timeout_s, timedelta(seconds=timeout_s)
        self._received: queue.SimpleQueue[tuple[Link, Message | LinkLost]] = queue.SimpleQueue()
        self._into = into if into is not None else self._received.put
        self.lost: str | None = None
        self._over, self._lost_lock, self._said_goodbye = threading.Event(), threading.Lock(), False
        # The reader says goodbye on its own: between two transfers of one message it would break the protocol, and
        # gloo ends a process that receives more than it expects.
        self._sending = threading.Lock()
        self._outgoing: deque[tuple[int, torch.Tensor, dist.Work]] = deque()
        self.messages_sent = 0
        self.bytes_sent = self.bytes_received = 0
        beat = self._ask if side == "base" else self._answer
        self._threads = [
            threading.Thread(target=target, name=f"fapool {name}", daemon=True) for target in (self._read, beat)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, header: Header, tensors: Sequence[torch.Tensor | Sequence[torch.Tensor]] = ()) -> None:
        """Copies and sends without waiting; :meth:`settle` waits.

        Args:
            header: announces the payload.
            tensors: the payload, in the header's order; a list of tensors stands for their elements end to end.

        Raises:
            LinkLost: the other end is known to be gone.
            ValueError: the payload is not what the header announces.
        """
        with _real_tensors():
            wire = Wire(header, torch.empty(frame_bytes(), dtype=torch.uint8, device="cpu"))
            fill(wire, header, tensors)
        with self._sending:
            if self.lost:
                raise LinkLost(self.lost)
            self.messages_sent, half = self.messages_sent + 1, False
            try:
                for transfer in wire.transfers:
                    self._post(transfer)
                    half = True
            except BaseException as error:
                # Half a message may be out: nothing after it could be understood, not even a goodbye.
                self._said_goodbye = self._said_goodbye or half
                reason = self.fail(f"send failed: {first_line(error)}")
                if isinstance(error, RuntimeError):
                    raise LinkLost(reason) from error
                raise
            self.bytes_sent += wire.nbytes

    def settle(self, through: int) -> None:
        """Waits until the first ``through`` messages have gone. Call it after the reply, not before: a large send
        ends only when the other end posts its receive."""
        try:
            while self._outgoing and self._outgoing[0][0] <= through:
                if self.lost:
                    raise LinkLost(self.lost)
                self._outgoing[0][2].wait(_FOREVER)
                self._outgoing.popleft()
        except RuntimeError as error:
            if isinstance(error, LinkLost):
                raise
            raise LinkLost(self.fail(f"send failed: {first_line(error)}")) from error

    def receive(self) -> Message:
        """The next message. Raises LinkLost once the other end is gone."""
        _, item = self._received.get()
        if isinstance(item, LinkLost):
            self._received.put((self, item))
            raise LinkLost(str(item))  # the kept one would keep the frames that it passes, and a graph in them
        return item

    def fail(self, reason: str) -> str:
        """Marks the link as lost, once, and wakes whoever waits for it. Returns the first reason given."""
        with self._lost_lock:
            first = self.lost is None
            self.lost = self.lost or reason
        self._over.set()
        if first:
            self._into((self, LinkLost(self.lost)))
        return self.lost

    def close(self) -> None:
        """Says goodbye and ends; the other end says it too, so that neither waits any longer."""
        self._say_goodbye()
        self.fail("closed")

    def join(self, timeout_s: float) -> None:
        """Waits for the link's threads, which end when the other end has gone."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _post(self, transfer: torch.Tensor) -> None:
        # A send reads its tensor until it has ended: both are kept until then.
        self._outgoing.append((self.messages_sent, transfer, self._data.send([transfer], self._peer, self._tag)))

    def _say_goodbye(self) -> None:
        with _real_tensors():
            goodbye = torch.zeros(frame_bytes(), dtype=torch.uint8, device="cpu")
            fill(Wire(Header(), goodbye), Header(op=Op.BYE), ())
        with self._sending, suppress(RuntimeError):
            said, self._said_goodbye = self._said_goodbye, True
            if not said:
                self._post(goodbye)

    def _read(self) -> None:
        try:
            while True:
                frame = torch.empty(frame_bytes(), dtype=torch.uint8, device="cpu")
                self._data.recv([frame], self._peer, 1 - self._tag).wait(_FOREVER)
                header = Header(*frame[: 8 * len(Header())].view(torch.int64).tolist())
                if header.op == Op.BYE:
                    self._say_goodbye()
                    self.fail("the other end said goodbye")
                    return
                wire = Wire(header, frame)
                if wire.body is not None:
                    self._data.recv([wire.body], self._peer, 1 - self._tag).wait(_FOREVER)
                self.bytes_received += wire.nbytes
                self._into((self, Message(header, wire.tensors)))
                del frame, wire
        except Exception as error:  # whatever it was, nothing more will be read
            self.fail(f"connection ended: {first_line(error)}")

    def _ask(self) -> None:
        beat = torch.zeros(1, dtype=torch.int64, device="cpu")
        try:
            while not self.lost:
                self._pulse.send([beat], self._peer, 0).wait(self._silence)
                self._pulse.recv([beat], self._peer, 1).wait(self._silence)
                self._over.wait(self._timeout_s / 5)
            beat -= 1
            self._pulse.send([beat], self._peer, 0).wait(self._silence)
        except RuntimeError as error:
            self.fail(f"no heartbeat within {self._timeout_s:g} s: {first_line(error)}")

    def _answer(self) -> None:
        beat = torch.zeros(1, dtype=torch.int64, device="cpu")
        try:
            while True:
                self._pulse.recv([beat], self._peer, 0).wait(self._silence)
                if beat < 0:
                    return
                self._pulse.send([beat], self._peer, 1).wait(self._silence)
        except RuntimeError as error:
            self.fail(f"no heartbeat within {self._timeout_s:g} s: {first_line(error)}")


def _real_tensors() -> AbstractContextManager[Any]:
    """Frames have memory in the middle of anything: a sequence may end while a mode makes all other tensors fake."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, where it says what happened."""
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
