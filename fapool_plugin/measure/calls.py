"""Measures what a pooled attention call costs beside its kernels and bytes: Python, at both ends.

Makes real calls of one token with a leased pool rank, and takes off what the profile knows already. Knows no model.
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import NoReturn

import torch

from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.base.forward import Forward
from fapool_plugin.base.lease import PoolRank, expected
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.measure.calibrate import threads_restored
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.observe.timeline import ATTENTION, MERGE, SEND, WAIT
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.profile import CallCost, Profile, Shape, share_s
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.wire.messages import Header, Op, dtype_code, float_bits

_KEYS, _BUSY_QUERIES, _CALLS = 1024, 512, 24
_BETWEEN_BYTES = 16 * 2**20
"""Read between two calls, as a model reads the weights of a layer."""


def measure_calls(
    rank: PoolRank, profile: Profile, *, softcap: float = 0.0, device: torch.device | str = "cpu"
) -> CallCost:
    """The base with one thread and one leased rank share calls of one query each, half and half.

    Args:
        rank: leased and opened; its link must be idle.
        profile: kernels and link, measured already.
        softcap: the model's, 0 for none.
        device: where the base computes. CUDA is written and has never run.

    Raises:
        LinkLost: the rank is gone.
    """
    with threads_restored(), torch.no_grad():
        torch.set_num_threads(1)
        calls = _Calls(rank, profile, softcap, torch.device(device))
        try:
            spans = [calls.step() for _ in range(_CALLS)]
        finally:
            calls.close()
    rank.check()
    fields = (max(0.0, statistics.median(column)) for column in zip(*spans, strict=True))
    return CallCost(**dict(zip(CallCost.model_fields, fields, strict=True)))


@contextmanager
def kept_busy(rank: PoolRank, shape: Shape, seconds: float) -> Iterator[None]:
    """The rank computes attention for about so long, or longer, from the beginning of the block on."""
    dtype = getattr(torch, shape.dtype)
    q = torch.zeros(_BUSY_QUERIES * shape.heads * shape.head_dim, dtype=dtype)
    k, v = (torch.zeros(_KEYS * shape.kv_heads * dim, dtype=dtype) for dim in (shape.head_dim, shape.v_head_dim))
    tile = Tile(0, 1, 0, shape.kv_heads, _KEYS, _KEYS + _BUSY_QUERIES, 0, _KEYS)
    header = Header(
        op=Op.ATTEND,
        dtype=dtype_code(dtype),
        tiles=1,
        q_elements=q.numel(),
        k_elements=k.numel(),
        v_elements=v.numel(),
        head_dim=shape.head_dim,
        v_head_dim=shape.v_head_dim,
        group=shape.heads // shape.kv_heads,
        scale_bits=float_bits(1.0),
    )
    request = header, (torch.tensor([[*tile, 0, _KEYS, 0]]), q, k, v), expected(header, [tile])
    rank.answer(rank.ask(*request))
    one_s = rank.answer(rank.ask(*request)).header.extra / 1e9
    asked = [rank.ask(*request) for _ in range(ceil(1.5 * seconds / max(one_s, 1e-4)))]
    # Sending costs the base something too, but that is counted elsewhere.
    rank.link.drain(0)
    yield
    for call in asked:
        rank.answer(call)


class _Calls:
    """A sequence of its own, a prompt long, of which the rank holds the first part."""

    def __init__(self, rank: PoolRank, profile: Profile, softcap: float, device: torch.device) -> None:
        shape, dtype = profile.shape, getattr(torch, profile.shape.dtype)
        self.rank, self.profile, self.softcap = rank, profile, softcap
        # What measuring does is not to be found in the statistics of the model's own manager.
        self._before = rank.counters
        rank.counters = RankCounters(rank.number)
        config = FAPoolConfig(pool_ranks=1, partition="line", base_share=0.5)
        self.manager = ResourceManager(config, _no_pool)
        self.manager.compute_on(device)
        self.layer = FAPoolAttention(self.manager, 0, 1, stands_for="")
        self.sequence = SequenceState(prompt_columns=_KEYS, capacity=_KEYS + 1, id=secrets.randbits(62))
        self.q = torch.randn(1, shape.heads, _KEYS + 1, shape.head_dim, device=device).to(dtype)
        self.k = torch.randn(1, shape.kv_heads, _KEYS + 1, shape.head_dim, device=device).to(dtype)
        self.v = torch.randn(1, shape.kv_heads, _KEYS + 1, shape.v_head_dim, device=device).to(dtype)
        self._weights = torch.zeros(_BETWEEN_BYTES // 4, device=device)
        prompt = Geometry((0,), (_KEYS,), 0, _KEYS)
        forward = Forward(
            config, self.manager.counters, "prefill", True, prompt, self.sequence, (rank,), base_share=0.5
        )
        self._call(forward)
        one = Geometry((0,), (_KEYS + 1,), _KEYS, _KEYS + 1)
        self.forward = replace(forward, phase="decode", geometry=one, _plans={})

    def step(self) -> tuple[float, ...]:
        """The fields of a CallCost for one call."""
        shape, link = self.profile.shape, self.profile.link
        self._weights.sum()
        counters, rank = self.manager.counters.phase("decode"), self.rank.counters
        counters.base_s.clear()
        rank.compute_s = 0.0
        self.manager.timeline.begin(counters)
        self._call(self.forward)
        self.manager.timeline.end()
        self.manager.clock.now().wait()
        self.manager.timeline.read()
        plan = self.forward.plan(shape.kv_heads, 0, 1)
        cost, spent = self.profile.attention_for(1), counters.base_s
        own, theirs = (share_s(cost, shape.kv_heads, share) for share in (plan.base, plan.shares[0]))
        # Such messages are little more than headers: bytes add nothing.
        there_and_back = sum(spent.get(name, 0.0) for name in (SEND, ATTENTION, WAIT)) - rank.compute_s
        return (
            spent.get(SEND, 0.0) - link.send.a,
            spent.get(MERGE, 0.0),
            spent.get(ATTENTION, 0.0) - own,
            rank.compute_s - theirs,
            there_and_back - link.to_rank.a - link.to_base.a,
        )

    def close(self) -> None:
        """The rank forgets the sequence."""
        with self.manager.guard(self.rank):
            self.rank.tell(Op.FREE, self.sequence.id)
        self.rank.counters = self._before

    def _call(self, forward: Forward) -> None:
        new = slice(forward.geometry.q_column, forward.geometry.columns) if forward.geometry else slice(0)
        past = slice(0, new.stop)
        self.layer(
            self.q[:, :, new],
            self.k[:, :, past],
            self.v[:, :, past],
            decided=forward,
            resident=True,
            softmax_scale=self.profile.shape.head_dim**-0.5,
            softcap=self.softcap,
        )


def _no_pool(config: FAPoolConfig) -> NoReturn:
    """The rank is leased already."""
    raise RuntimeError(f"no pool rank of {config} is to be started while calls are measured")
