"""Training calls that pool ranks keep whole: the base's record of them, and one step of a call that asks for it.

A kept call has the number that its request had on the link. Gradients use it up; gradient checkpointing asks for it
once more before, by the same bits. Knows tensors and tiles; not how calls are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from fapool_plugin.plan.line import Tile
from fapool_plugin.wire.messages import Header

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptCalls:
    """Which calls of one sequence pool ranks keep. Ranks are named by their key, so that no record outlives a lease.

    Of a call that may be made a second time, its layer, tiles and bits are remembered, the latest for each.
    """

    def __init__(self) -> None:
        self._kept: set[tuple[int, int]] = set()
        self._latest: dict[tuple[int, int, tuple[Tile, ...]], tuple[int, bytes]] = {}

    def add(self, rank: int, call: int, layer: int, tiles: Iterable[Tile], bits: bytes) -> None:
        """``rank`` keeps the call with this number. ``bits``: of what it was made, if it may come once more; else
        empty."""
        self._kept.add((rank, call))
        if bits:
            self._latest[rank, layer, tuple(tiles)] = call, bits

    def take(self, rank: int, call: int) -> bool:
        """Whether ``rank`` keeps it; it is used up with that."""
        kept = (rank, call) in self._kept
        self._kept.discard((rank, call))
        return kept

    def again(self, rank: int, layer: int, tiles: Iterable[Tile], bits: bytes) -> tuple[int, int]:
        """A call of these tiles comes. (number of the same call, if ``rank`` keeps it; number of one that this one
        takes the place of, since it was of other bits); 0 for none."""
        call, known = self._latest.get((rank, layer, tuple(tiles)), (0, b""))
        if not bits or (rank, call) not in self._kept:
            return 0, 0
        if bits == known:
            return call, 0
        self.take(rank, call)
        return 0, call


class Asked(Protocol):
    """A request to a rank."""

    call: int | None
    kept: int

    @property
    def rank(self) -> Any:
        """Whose key names it in this lease."""

    @property
    def tiles(self) -> list[Tile]:
        """What it is to compute."""


class KeepingStep:
    """What one call of layer ``layer`` has to do so that pool ranks keep it.

    Args:
        bits: of what the call is made, if it may be made once more; else empty.
    """

    def __init__(self, calls: KeptCalls, layer: int, bits: bytes) -> None:
        self._calls, self._layer, self._bits = calls, layer, bits

    def marked(
        self, request: Asked, header: Header, tensors: list[Tensor | list[Tensor]]
    ) -> tuple[Header, list[Tensor | list[Tensor]]]:
        """A request that the rank is to keep; only the number, if it keeps the same already."""
        request.kept, replaced = self._calls.again(request.rank.key, self._layer, request.tiles, self._bits)
        header = header._replace(keep=2, extra=request.kept or replaced)
        if not request.kept:
            return header, tensors
        return header._replace(tiles=0, q_elements=0, k_elements=0, v_elements=0), [[], [], [], []]

    def arrived(self, request: Asked, kept: bool) -> None:
        """Records whether the rank keeps this call."""
        counters = request.rank.counters
        counters.reused_calls += request.kept > 0
        if not request.kept and kept and request.call is not None:
            request.kept = request.call
            self._calls.add(request.rank.key, request.call, self._layer, request.tiles, self._bits)
            counters.kept_calls += 1
        counters.unkept_calls += not request.kept

    def lost(self, request: Asked) -> bool:
        """The rank does not keep it any more; whether it was to."""
        was, request.kept = request.kept, 0
        self._calls.take(request.rank.key, was)
        return was > 0


def keeping_step(calls: KeptCalls, layer: int, takes_turns: bool, *qkv: Tensor) -> KeepingStep | None:
    """What a call of these tensors has to do so that ranks keep it for its gradients; None if it has none."""
    # Without gradients now they may come yet, by checkpointing; with them, only where they are asked for.
    wanted = not torch.is_grad_enabled() or any(x.requires_grad for x in qkv)
    # Only a call that takes no turns with others can be made once more.
    return KeepingStep(calls, layer, b"" if takes_turns else fingerprint(*qkv)) if wanted else None


def fingerprint(*tensors: Tensor) -> bytes:
    """Of the bits of some tensors (B, H, S, D): whatever differs in one head or at one position differs in this.

    Words of 64 bits are summed as integers over the positions, and over heads and dims: what random numbers change
    does not cancel out in both. The same values in other strides may have another fingerprint. A device is waited for
    once.
    """
    digest, sums = hashlib.blake2b(digest_size=16), list[Tensor]()
    for x in tensors:
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        words = _words(x.detach())
        sums += [words.sum(dim=2, dtype=torch.int64).flatten(), words.sum(dim=(1, 3), dtype=torch.int64).flatten()]
    digest.update(torch.cat(sums).cpu().numpy().tobytes())
    return digest.digest()


def _words(x: Tensor) -> Tensor:
    try:
        # Ten times as fast to sum as shorter ones.
        return x.view(torch.int64)
    except RuntimeError:  # strides or dims that do not allow it
        return x.view(_INTEGERS[x.element_size()])
