"""One query of each of many lanes against keys of unequal number, in one call, where they lie.

    storage    | lane 0 ........ free | lane 1 .... free | lane 2 ............ free |
    starts     ^                      ^                  ^
    lengths    |<------------>|       |<-------->|       |<---------------->|

A rectangle has as many keys in all of its rows, so a decode step of unequal rows is many, and each would be a call of
its own. To an operator for sequences of unequal lengths a lane is a sequence with one KV head: it is told where each
begins in their storage and how many keys it has, and nothing is copied. Where there is no such operator (on CPUs), or
keys lie apart, each rectangle is a call. Knows views and their storages, not who keeps them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fapool_plugin.kernels.band import MULTIPLE, OutAndLse
from fapool_plugin.kernels.forward import attend, case_of
from fapool_plugin.kernels.operators import able

_MOST_POSITIONS = 2**31
"""Starts are int32."""
Attend = Callable[..., OutAndLse]
"""As `torch_cuda.flash_lanes`."""


class Rectangle(NamedTuple):
    """Causal attention of a rectangle, as `attend` takes it."""

    q_BSHD: Tensor
    k_BTKD: Tensor
    v_BTKE: Tensor
    q_offset: int


def attend_all(
    parts: Sequence[Rectangle],
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    alone: Callable[[Rectangle], OutAndLse] | None = None,
) -> list[OutAndLse]:
    """(out, lse) of each, as `attend` gives them.

    Those of one query for each lane, which sees all its keys, are one call where an operator can and their keys lie in
    one storage, and their values in another that is laid out alike.

    Args:
        parts: all of one dtype, device and head dims.
        softmax_scale: as `attend` has it.
        softcap: likewise.
        alone: computes one of the others; None: `attend`. Raises what that raises.
    """
    found: dict[int, OutAndLse] = {}
    run = None
    if len(parts) > 1:
        first = parts[0]
        run = _operator(first.q_BSHD, first.k_BTKD.shape[3], first.v_BTKE.shape[3], softcap)
    if run is not None:
        groups: dict[object, list[int]] = {}
        for index, part in enumerate(parts):
            groups.setdefault(_storages(part), []).append(index)
        for storages, members in groups.items():
            if storages is not None and len(members) > 1:
                mine = [parts[index] for index in members]
                found.update(zip(members, _in_one_call(run, mine, softmax_scale), strict=True))

    def by_itself(part: Rectangle) -> OutAndLse:
        return attend(*part[:3], causal=True, q_offset=part.q_offset, softmax_scale=softmax_scale, softcap=softcap)

    return [found[index] if index in found else (alone or by_itself)(part) for index, part in enumerate(parts)]


def can_attend_together(q_BSHD: Tensor, head_dim: int, v_head_dim: int, softcap: float = 0.0) -> bool:
    """Whether such queries can be one call with others, if their keys lie together."""
    return _operator(q_BSHD, head_dim, v_head_dim, softcap) is not None


def _operator(q_BSHD: Tensor, head_dim: int, v_head_dim: int, softcap: float) -> Attend | None:
    # Keys are not padded, so their head dims have to fit.
    if q_BSHD.shape[1] != 1 or head_dim != v_head_dim or head_dim % MULTIPLE:
        return None
    case = case_of(q_BSHD.device, q_BSHD.dtype, head_dim)._replace(softcap=softcap > 0, decode=True)
    return next((one.attend_lanes for one in able(case) if one.attend_lanes is not None), None)


def _storages(part: Rectangle) -> object:
    """What parts have in common that can be one call; None: this one can be in none."""
    q, k, v, q_offset = part
    at, D = (k.storage_offset(), *k.stride()), k.shape[3]
    offset, row, position, head, number = at
    flat = (position, number) == (D, 1) and not any(x % D for x in (offset, row, head))
    alike = k.shape == v.shape and at == (v.storage_offset(), *v.stride())
    if not (flat and alike and k.numel() and q.shape[1] == 1 and q_offset >= k.shape[1] - 1):
        return None
    if _positions(k) >= _MOST_POSITIONS:
        return None
    return k.untyped_storage()._cdata, v.untyped_storage()._cdata, q.shape[2] // k.shape[2]


def _positions(k_BTKD: Tensor) -> int:
    """Of a storage."""
    return k_BTKD.untyped_storage().nbytes() // (k_BTKD.element_size() * k_BTKD.shape[3])


def _in_one_call(run: Attend, parts: Sequence[Rectangle], softmax_scale: float) -> list[OutAndLse]:
    k, v = parts[0].k_BTKD, parts[0].v_BTKE
    G, D = parts[0].q_BSHD.shape[2] // k.shape[2], k.shape[3]
    flat = [x.as_strided((_positions(x), 1, D), (D, D, 1), 0) for x in (k, v)]
    starts, lengths = zip(*((_starts(part.k_BTKD), part.k_BTKD.shape[1]) for part in parts), strict=True)
    # Lanes of each part, row by row.
    counts = [len(one) for one in starts]
    # One copy to the device, which the host does not wait for: where queries, then keys, begin, and how many there are.
    lanes = sum(counts)
    told = torch.from_numpy(
        np.concatenate([np.arange(lanes + 1), *starts, [0], np.repeat(lengths, counts)]).astype(np.int32)
    ).to(k.device, non_blocking=True)
    begins = told[: lanes + 1], told[lanes + 1 : 2 * lanes + 2], told[2 * lanes + 2 :]
    q_LGD = torch.cat([part.q_BSHD.reshape(-1, G, D) for part in parts])
    out_LGD, lse_GL = run(q_LGD, *flat, *begins, max(lengths), softmax_scale)
    outs, lses = out_LGD.split(counts), lse_GL.T.contiguous().split(counts)
    return [
        (out.reshape(part.q_BSHD.shape), lse.reshape(part.q_BSHD.shape[0], -1, 1))
        for part, out, lse in zip(parts, outs, lses, strict=True)
    ]


def _starts(k_BTKD: Tensor) -> np.ndarray:
    """Where each lane's first key is in its storage, in positions."""
    (B, _, K, D), (row, _, head, _) = k_BTKD.shape, k_BTKD.stride()
    return ((k_BTKD.storage_offset() + row * np.arange(B)[:, None] + head * np.arange(K)) // D).ravel()
