"""What a call asks of pool ranks, and the one loop around it.

      base                                   pool ranks
    stage     on a device: requests packed, their copies to the host begun, the base's own share launched
    post  ──── a request to each ──────────▶ compute
          the base's own share, on a CPU        │
          (other blocks in flight go on)        │
    wait  ◀──── partial results ────────────────┘
          what is missing: asked for once more, or resolved here

Forward and backward are calls of one kind: what they ask and merge is theirs, what happens when an answer does not
come is decided here only. Knows calls by what they can do, not what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fapool_plugin.base.lease import Expected, PoolRank, expected
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.devices.copies import Staged, sendable
from fapool_plugin.observe.timeline import MERGE, SEND, WAIT
from fapool_plugin.plan.line import Tile
from fapool_plugin.wire import messages as wire
from fapool_plugin.wire.messages import Header, Message, Status

Payload = list[Tensor | list[Tensor]]
Resolve = Callable[[Iterable[Tile]], None]
"""Gets what pool ranks did not deliver: the base computes it from its own keys."""


@dataclass(eq=False)
class Request:
    """What one rank is asked, and all that is needed to compute it elsewhere should its answer not come."""

    rank: PoolRank
    tiles: list[Tile]
    """What it is to compute."""
    notes: Any = None
    """What its call has worked out for it: attention's ``Work``, nothing for gradients."""
    call: int | None = None
    """Its number on the link; None: not asked."""
    kept: int = 0
    """The number of the call that the rank keeps, this one or the same before; 0: none."""
    merge: int = 0
    """The number of this call at all ranks that work on it together; 0: this rank works alone."""
    above: Request | None = None
    """Whose answer brings this one's; None: it answers by itself."""
    below: list[Request] = field(default_factory=list)
    staged: tuple[Header, Staged] | None = None
    """Its message, on the way from a device to the host."""

    def all(self) -> list[Request]:
        """This one and all whose parts come with its answer."""
        return [self, *(one for child in self.below for one in child.all())]

    def joined(self, header: Header, tensors: wire.Payload) -> tuple[Header, wire.Payload]:
        """The request as one to a rank that may work with others; the one above it was asked before."""
        if not self.merge:
            return header, tensors
        if self.above is not None and self.above.call is None:
            # It answers by itself after all.
            self.above.below.remove(self)
            self.above = None
        below = [torch.tensor([child.rank.number for child in self.below], device="cpu")] if self.below else []
        peer = 1 + self.above.rank.number if self.above is not None else 0
        return header._replace(merge=self.merge, peer=peer, peers=len(self.below)), [*tensors, *below]

    def expected(self, header: Header) -> Expected | None:
        """What its answer announces; None: it goes to another rank."""
        if not self.merge:
            return expected(header, self.tiles)
        team = self.all()
        return expected(header, (tile for one in team for tile in one.tiles), len(team)) if self.above is None else None


class Part(NamedTuple):
    """What an answer says of one rank's part."""

    status: int = Status.MISSING
    took_ns: int = 0
    began_ns: int = 0
    kept: bool = False


class Call(Protocol):
    """What a call knows of its own requests."""

    def message(self, request: Request) -> tuple[Header, Payload]:
        """What is sent."""

    def sent(self, request: Request) -> None:
        """It has been sent."""

    def check(self, answer: Message, request: Request) -> None:
        """Holds an answer against what was asked, before anything of it is taken. Raises LinkLost."""

    def merge(self, answer: Message, request: Request) -> None:
        """Takes the results that an answer has, of this request or of what it says."""

    def arrived(self, request: Request, part: Part) -> None:
        """Its part is in what was merged."""

    def lacks(self, request: Request, part: Part) -> bool:
        """Its part is not. Whether to ask for it once more, with all that it takes."""


class Requests:
    """The requests of one call. The call is given each time: a circle of references would keep a graph, and with it a
    lease, until garbage is collected."""

    def __init__(self, manager: ResourceManager) -> None:
        self._manager = manager
        self.asked: list[Request] = []
        self._given_back: list[Request] = []

    def stage(self, call: Call, requests: Sequence[Request]) -> bool:
        """Where a call is on a device: packs all requests and starts to copy them, so that what is launched until
        :meth:`post` is computed beside that. Whether it is."""
        copies = self._manager.copies
        if copies is None:
            return False
        for request in requests:
            header, tensors = call.message(request)
            request.staged = header, copies.start(tensors, request.rank.link.carrier.takes)
        return True

    def post(self, call: Call, requests: Sequence[Request]) -> list[Tile]:
        """Sends them, without waiting. Returns the tiles of ranks that could not be asked."""
        self.asked = list(requests)
        for request in self.asked:
            self._ask(call, request)
        self._given_back = [request for request in self.asked if request.call is None and request.above is None]
        return [tile for request in self._given_back for tile in request.tiles]

    def again(self, call: Call, request: Request) -> None:
        """Sends one once more, which could not be sent."""
        self._ask(call, request)

    def wait(self, call: Call, resolve: Resolve) -> bool:
        """Merges the answers and resolves what is missing. Whether any part came from a rank."""
        answering = [request for request in self.asked if request.above is None and request.call is not None]
        came = [self._gather(call, request, resolve) for request in answering]
        return any(came)

    def tiles_asked(self) -> dict[int, list[Tile]]:
        """Who was asked for what, by rank number."""
        # Each tile is given back at first, or has a rank, whatever became of its request later.
        return {request.rank.number: request.tiles for request in self.asked if request not in self._given_back}

    def _ask(self, call: Call, request: Request) -> None:
        """Leaves ``request.call`` at None if the rank is lost."""
        request.call = None
        if request.staged is not None:
            (header, staged), request.staged = request.staged, None
            payload: wire.Payload = staged.wait()
        else:
            header, tensors = call.message(request)
            payload = sendable(self._manager.copies, tensors, request.rank.link.carrier.takes)
        header, payload = request.joined(header, payload)
        with self._manager.guard(request.rank):
            request.call = request.rank.ask(header, payload, request.expected(header))
            call.sent(request)

    def _gather(self, call: Call, request: Request, resolve: Resolve) -> bool:
        timeline, answer = self._manager.timeline, None
        timeline.switch(WAIT)
        if request.call is not None:
            with self._manager.guard(request.rank):
                received = request.rank.answer(request.call)
                call.check(received, request)  # what does not pass is no answer
                answer = received
        timeline.switch(MERGE)
        if answer is not None and answer.tensors:
            call.merge(answer, request)
        parts, came, missing = _told(answer, request.rank.number), False, list[Tile]()
        for one in request.all():
            part = parts.get(one.rank.number, Part())
            self._settle(one, part)
            if part.status == Status.OK:
                came = True
                call.arrived(one, part)
            elif call.lacks(one, part):
                # Only calls that take no turns with others on a link, and no part in a tree, are asked for again.
                assert one.merge == 0
                timeline.switch(SEND)
                self._ask(call, one)
                came = self._gather(call, one, resolve) or came
            else:
                missing += one.tiles
        if missing:
            resolve(missing)
        return came

    def _settle(self, one: Request, part: Part) -> None:
        """Its rank is asked no more of this."""
        if part.status == Status.MISSING or one.merge:
            with self._manager.guard(one.rank):
                if part.status == Status.MISSING:
                    one.rank.check()
                else:
                    one.rank.count_bytes()
        if part.status == Status.STALE and one.rank.is_recalled:
            self._manager.leases.recalled(one.rank)
        if part.status == Status.MISSING:
            # What failed between ranks would fail again: they work apart until the lease ends.
            for request in self.asked:
                request.rank.apart = request.rank.apart or request.merge > 0


def _told(answer: Message | None, number: int) -> dict[int, Part]:
    """What an answer of rank ``number`` says of its part, and of those that were merged into it."""
    if answer is None:
        return {}
    header = answer.header
    if header.parts:
        return {rank: Part(*rest) for rank, *rest in answer.tensors[-1].tolist()}
    return {number: Part(header.status, header.extra, header.clock, header.keep == 2)}
