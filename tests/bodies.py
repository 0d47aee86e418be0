"""Requests and answers with bodies that are large for a small ring, and two ends that have agreed on one."""

from __future__ import annotations

from typing import Any

import torch

from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import TILE_FIELDS, Header, Op, Status, dtype_code, rooms

RING = 2**18
"""A body of 4 KiB or more goes into it, one of more than 128 KiB in chunks of 16."""


def agree(base: Link, pool: Link) -> None:
    base.send(Header(op=Op.HELLO), attached=base.terms.offer())
    pool.send(Header(op=Op.HELLO, status=Status.OK), attached=pool.terms.agree(pool.receive(5.0).attached))
    base.terms.agree(base.receive(5.0).attached)
    assert (base.carrier.name, pool.carrier.name) == ("shm", "shm")


def request(call: int, nbytes: int, dtype: torch.dtype = torch.float32) -> tuple[Header, list[Any]]:
    """About so many bytes, a third each of strided queries, keys in many parts, and values in one."""
    n = max(1, nbytes // 3 // dtype.itemsize // 8) * 8
    generator = torch.Generator().manual_seed(call)
    q, k, v = (torch.randn(n, generator=generator).to(dtype) for _ in range(3))
    header = Header(op=Op.ATTEND, call=call, tiles=1, q_elements=n, k_elements=n, v_elements=n, dtype=dtype_code(dtype))
    parts = k.view(2, -1, 4).transpose(0, 1)
    return header, [torch.full((1, TILE_FIELDS), call), q.view(4, -1).T, list(parts), v]


def flat(part: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in part]) if isinstance(part, list) else part.reshape(-1)


def answer(header: Header, nbytes: int) -> tuple[Header, list[torch.Tensor]]:
    n = nbytes // 4
    return header._replace(status=Status.OK, q_elements=n, lse_elements=8), [
        torch.full((n,), float(header.call)),
        torch.zeros(8),
    ]


def answer_bytes(nbytes: int) -> int:
    return rooms(Header(op=Op.ATTEND, status=Status.OK, q_elements=nbytes // 4, lse_elements=8))[1]
