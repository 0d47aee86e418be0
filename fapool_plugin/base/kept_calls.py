"""The base's record of training calls that pool ranks keep whole, and how it knows that a call is the same as before.

A kept call has the number that its request had on the link. Gradients use it up; gradient checkpointing asks for it
once more before, by the same bits. Knows tensors and tiles; not who keeps anything, nor how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from fapool_plugin.plan.line import Tile

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def fingerprint(*tensors: Tensor) -> bytes:
    """Of the bits of some tensors (B, H, S, D): whatever differs in one head or at one position differs in this.

    Words of 64 bits are summed as integers over the positions, and over heads and dims: what random numbers change
    does not cancel out in both. The same values in other strides may have another fingerprint.
    """
    digest = hashlib.blake2b(digest_size=16)
    for x in tensors:
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        words = _words(x.detach())
        for sums in (words.sum(dim=2, dtype=torch.int64), words.sum(dim=(1, 3), dtype=torch.int64)):
            digest.update(sums.cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _words(x: Tensor) -> Tensor:
    try:
        # Ten times as fast to sum as shorter ones.
        return x.view(torch.int64)
    except RuntimeError:  # strides or dims that do not allow it
        return x.view(_INTEGERS[x.element_size()])
