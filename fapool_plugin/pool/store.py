"""What a pool rank keeps of training: whole calls, until their gradients are asked for.

Knows tensors, but no model, no link and no plan.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fapool_plugin.store.prefixes import PrefixStore


class KeptTile(NamedTuple):
    """What a tile's gradients are made of beside dout, as kernels take it: (rows, S, H, D) and so on."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class CallStore:
    """The training calls a pool rank keeps whole, by sequence and number, until their gradients are asked for.

    Nothing is copied, so what is kept may not be written to. Where there is no room left nothing makes way.

    Args:
        prefixes: with which they share one limit.
    """

    def __init__(self, prefixes: PrefixStore) -> None:
        self.prefixes = prefixes
        self._sequences: dict[int, dict[int, tuple[list[KeptTile], int]]] = {}

    def put(self, sequence: int, call: int, tiles: list[KeptTile]) -> bool:
        """Keeps one call, if memory suffices; whether it did."""
        # What is kept is all of a message, table and padding included.
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for tile in tiles for x in tile}
        size, held = sum(storages.values()), self.prefixes.nbytes + self.prefixes.reserved
        if held + size > self.prefixes.limit_bytes:
            return False
        self._sequences.setdefault(sequence, {})[call] = tiles, size
        self.prefixes.reserved += size
        return True

    def get(self, sequence: int, call: int) -> list[KeptTile] | None:
        """A kept call; None if it is not here."""
        return self._sequences.get(sequence, {}).get(call, (None, 0))[0]

    def pop(self, sequence: int, call: int) -> list[KeptTile] | None:
        """A kept call, for the last time; None if it is not here."""
        tiles, size = self._sequences.get(sequence, {}).pop(call, (None, 0))
        self.prefixes.reserved -= size
        return tiles

    def free(self, sequence: int) -> None:
        """Forgets one sequence."""
        for call in list(self._sequences.get(sequence, {})):
            self.pop(sequence, call)
        self._sequences.pop(sequence, None)

    def clear(self) -> None:
        """Forgets everything."""
        for sequence in list(self._sequences):
            self.free(sequence)
