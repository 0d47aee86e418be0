"""One rectangle of the attention matrix as every kernel sees it: its mask as a band, and what is trimmed off.

Forward and backward share this, so that they agree on which query sees which key. Nothing is computed here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Band(NamedTuple):
    """What a rectangle's mask lets through: query i sees key j if i + low <= j <= i + high."""

    low: int
    high: int

    @classmethod
    def of(cls, S: int, T: int, offset: int, causal: bool, window_size: tuple[int, int]) -> "Band":
        left, right = window_size
        if causal:
            right = 0  # a right side that looks ahead has nothing to add
        # -S and T reach beyond the first and the last key from every query.
        return cls(low=-S if left < 0 else offset - left, high=T if right < 0 else offset + right)

    def trim(self, S: int, T: int) -> tuple[slice, slice, "Band"]:
        """The queries that see a key, the keys they see, and the band between those two."""
        q_start = max(0, -self.high)
        q_stop = max(q_start, min(S, T - self.low))
        k_start = max(0, q_start + self.low)
        k_stop = max(k_start, min(T, q_stop + self.high))
        shift = q_start - k_start
        return slice(q_start, q_stop), slice(k_start, k_stop), Band(self.low + shift, self.high + shift)

    def hides_left(self, S: int) -> bool:
        return S - 1 + self.low > 0

    def hides_right(self, T: int) -> bool:
        return self.high < T - 1

    def bottom_right_window(self, S: int, T: int) -> tuple[int, int]:
        """(left, right) as flash-attn counts them, from the bottom-right diagonal; -1 where nothing is hidden.

        After trimming neither side can come out negative.
        """
        left = T - S - self.low if self.hides_left(S) else -1
        return left, self.high - (T - S) if self.hides_right(T) else -1

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """True where a query of the range [rows, 1] may not see a key of the other [columns]."""
        j = torch.arange(keys.start, keys.stop, device=device)
        i = torch.arange(queries.start, queries.stop, device=device)[:, None]
        return (j < i + self.low) | (j > i + self.high)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, of merges and of sums of gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_head_dim(*tensors: Tensor, multiple: int) -> list[Tensor]:
    """The tensors with one contiguous last dimension, zero-padded where they differ: zeros change no score.

    torch's CPU operator takes contiguity for granted: called directly, it reads wrong numbers without it.
    """
    head_dim = max([x.shape[-1] for x in tensors])
    head_dim += -head_dim % multiple
    return [
        x if x.shape[-1] == head_dim and x.stride(-1) == 1 else F.pad(x, (0, head_dim - x.shape[-1])).contiguous()
        for x in tensors
    ]
