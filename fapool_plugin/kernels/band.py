"""One rectangle of the attention matrix as every kernel sees it: its mask as a band, and what is trimmed off.

Forward and backward share this, so that they agree on which query sees which key. Nothing is computed here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 8
"""Of head dims, for GPUs: 16 bytes in half precision."""


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

    def bottom_right(self, S: int, T: int) -> list["Part"]:
        """A trimmed rectangle in one part, or two, as operators for GPUs take masks: counted from the bottom-right
        diagonal, and with nothing beyond it on the right.

        Queries past the last key see all that is left of it, and are a part of their own. Else the right side of their
        window would be as wide as the keys, which flash-attn takes for no limit (`window_size_right >= seqlen_k` in
        csrc/flash_attn/flash_api.cpp, and in torch's copy of it): with more queries than keys it is one.
        """
        side = T - self.high
        if not self.hides_right(T) or side == S:
            return [Part(slice(0, S), slice(0, T), self.hides_right(T), self._left(S, T))]
        start = max(0, side + self.low)
        rest = Band(self.low + side - start, T)
        first = Part(slice(0, side), slice(0, T), True, self._left(side, T))
        return [first, Part(slice(side, S), slice(start, T), False, rest._left(S - side, T - start))]

    def _left(self, S: int, T: int) -> int:
        """Keys that a query sees left of the bottom-right diagonal; -1 where nothing is hidden there."""
        return T - S - self.low if self.hides_left(S) else -1

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """True where a query of the range [rows, 1] may not see a key of the other [columns]."""
        j = torch.arange(keys.start, keys.stop, device=device)
        i = torch.arange(queries.start, queries.stop, device=device)[:, None]
        return (j < i + self.low) | (j > i + self.high)


class Part(NamedTuple):
    """Queries and keys with a mask that counts from their bottom-right diagonal."""

    queries: slice
    keys: slice
    causal: bool
    left: int
    """Keys that a query sees left of the diagonal; -1: all."""

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) as flash-attn counts them, -1 for no limit."""
        return self.left, 0 if self.causal else -1


class Given(NamedTuple):
    """What gradients are computed from; out and lse are the finished rows'. An lse of +inf leaves its row out."""

    dout_BSHE: Tensor
    q_BSHD: Tensor
    k_BTKD: Tensor
    v_BTKE: Tensor
    out_BSHE: Tensor
    lse_BHS: Tensor

    def cut(self, queries: slice, keys: slice) -> "Given":
        dout, q, k, v, out, lse = self
        return Given(dout[:, queries], q[:, queries], k[:, keys], v[:, keys], out[:, queries], lse[:, :, queries])


OutAndLse = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]
RunPart = Callable[[Tensor, Tensor, Tensor, Part], OutAndLse]
RunGiven = Callable[[Given, Part], Gradients]


def part_by_part(run: RunPart, q: Tensor, k: Tensor, v: Tensor, band: Band) -> OutAndLse:
    """(out, lse) of a rectangle by an operator that computes bottom-right parts. No two have queries in common."""
    parts = band.bottom_right(q.shape[1], k.shape[1])
    found = [run(q[:, part.queries], k[:, part.keys], v[:, part.keys], part) for part in parts]
    if len(found) == 1:
        return found[0]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def gradients_part_by_part(run: RunGiven, given: Given, band: Band) -> Gradients:
    """(dq, dk, dv) likewise, in the operator's dtype. Where there are two parts, those of keys are summed in fp32."""
    T, parts = given.k_BTKD.shape[1], band.bottom_right(given.q_BSHD.shape[1], given.k_BTKD.shape[1])
    if len(parts) == 1:
        return run(given, parts[0])
    (dq, dk, dv), (dq_rest, *rests) = (run(given.cut(part.queries, part.keys), part) for part in parts)
    sums = [x.to(given.lse_BHS.dtype) for x in (dk, dv)]
    for total, rest in zip(sums, rests, strict=True):
        total[:, T - rest.shape[1] :] += rest
    return torch.cat([dq, dq_rest], dim=1), sums[0].to(dk.dtype), sums[1].to(dv.dtype)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, of merges and of sums of gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(run: RunPart, q: Tensor, k: Tensor, v: Tensor, band: Band, *, own_v_dim: bool = False) -> OutAndLse:
    """(out, lse) of a rectangle by an operator for GPUs that computes bottom-right parts: head dims are made multiples
    of 8, and one, unless values may have one of their own."""
    E = v.shape[3]
    q, k, v = _head_dims([q, k], [v], own_v_dim)
    out, lse = part_by_part(run, q, k, v, band)
    return out[..., :E], lse


def gradients_padded(run: RunGiven, given: Given, band: Band, *, own_v_dim: bool = False) -> Gradients:
    """(dq, dk, dv) likewise, of operators that know one dtype: q's."""
    dtype, D, E = given.q_BSHD.dtype, given.q_BSHD.shape[3], given.v_BTKE.shape[3]
    dout, out = given.dout_BSHE.to(dtype), given.out_BSHE.to(dtype)
    q, k, v, dout, out = _head_dims([given.q_BSHD, given.k_BTKD], [given.v_BTKE, dout, out], own_v_dim)
    dq, dk, dv = gradients_part_by_part(run, Given(dout, q, k, v, out, given.lse_BHS), band)
    return dq[..., :D], dk[..., :D], dv[..., :E]


def _head_dims(of_keys: list[Tensor], of_values: list[Tensor], own_v_dim: bool) -> list[Tensor]:
    if own_v_dim:
        return one_head_dim(*of_keys, multiple=MULTIPLE) + one_head_dim(*of_values, multiple=MULTIPLE)
    return one_head_dim(*of_keys, *of_values, multiple=MULTIPLE)


def one_head_dim(*tensors: Tensor, multiple: int) -> list[Tensor]:
    """The tensors with one contiguous last dimension, zero-padded where they differ: zeros change no score.

    With a `multiple` it is one, and so are strides and offsets: operators for GPUs read so many numbers at once.
    torch's CPU operator takes contiguity for granted: called directly, it reads wrong numbers without it.
    """
    head_dim = max([x.shape[-1] for x in tensors])
    head_dim += -head_dim % multiple
    return [
        x if x.shape[-1] == head_dim and _aligned(x, multiple) else F.pad(x, (0, head_dim - x.shape[-1])).contiguous()
        for x in tensors
    ]


def _aligned(x: Tensor, multiple: int) -> bool:
    *strides, last = x.stride()
    return last == 1 and (multiple == 1 or not (x.storage_offset() % multiple or any(at % multiple for at in strides)))
