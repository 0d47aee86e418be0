"""Random rows of answers, computed here once more: so a rank that computes wrongly, by a fault or on purpose, is found.

What is compared is one query of one head, and in backward one query's and one key's gradients: little work beside the
answer, and as exact. Knows tensors and tiles; what becomes of a rank that is wrong is not known here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fapool_plugin.base.result import Result
from fapool_plugin.kernels.backward import attend_backward
from fapool_plugin.kernels.forward import attend, merge_
from fapool_plugin.observe.metrics import Counters
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.shares import Geometry, gradient_layout, layout
from fapool_plugin.wire.messages import LinkLost, Message

_ROWS = 4
"""Of an answer that is looked at."""
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 8e-3}
"""Of a row's length: kernels round differently."""


class SpotCheck:
    """Looks at a share ``probability`` of all answers."""

    def __init__(self, probability: float, counters: Counters) -> None:
        self.probability, self._counters = probability, counters
        self._random = random.Random()  # the program's own random numbers stay as they are

    def is_due(self) -> bool:
        """Whether to look at the next answer."""
        return self._random.random() < self.probability

    def attention(self, answer: Message, result: Result, asked: Sequence[Tile], reported: Sequence[Tile]) -> None:
        """Rows of an answer to ATTEND: of tiles that were asked for, in an answer laid out as those reported.

        Raises:
            LinkLost: a row is wrong.
        """
        out, lse = answer.tensors[:2]
        for _ in range(_ROWS if asked else 0):
            tile = self._random.choice(asked)
            row, lane, query = (self._random.randrange(*tile[at : at + 2]) for at in (0, 2, 4))
            head = lane * result.group + self._random.randrange(result.group)
            parts = [one for one in asked if _has(one, row, lane, query)]
            want_out, want_lse = _attention(result, parts, row, lane, head, query)
            for at, outs, lses in layout(reported, result.group, result.v.shape[3]):
                if _has(at, row, lane, query):
                    rows, heads = at.row_stop - at.row_start, (at.head_stop - at.head_start) * result.group
                    here = row - at.row_start, head - at.head_start * result.group, query - at.q_start
                    got = out[outs].view(rows, -1, heads, result.v.shape[3])[here[0], here[2], here[1]]
                    self._hold("output", got, want_out, result.q.dtype)
                    got = lse[lses].view(rows, heads, -1)[here]
                    self._hold("LSE", got.view(1), want_lse.view(1), result.q.dtype)

    def gradients(
        self, answer: Message, qkv: Sequence[Tensor], rest: Sequence[Tensor], geometry: Geometry, tiles: Sequence[Tile],
        softmax_scale: float, softcap: float,
    ) -> None:  # fmt: skip
        """One query's and one key's gradients in an answer to BACKWARD.

        Args:
            qkv: the call's, (B, H, S, D), (B, K, T, D) and (B, K, T, E).
            rest: its dout and out, (B, S, H, E), and LSE, (B, H, S).

        Raises:
            LinkLost: a gradient is wrong.
        """
        (q, k, v), (dout, out, lse) = qkv, rest
        group, index = q.shape[1] // k.shape[1], self._random.randrange(len(tiles))
        tile, *places = list(gradient_layout(tiles, group, k.shape[3], v.shape[3]))[index]
        row, lane, query, key = (self._random.randrange(*tile[at : at + 2]) for at in (0, 2, 4, 6))
        heads = slice(lane * group, (lane + 1) * group)
        queries, keys = geometry.q_slice(tile), geometry.k_slice(tile, tile.k_start, tile.k_stop)
        here = row - tile.row_start, lane - tile.head_start, query - tile.q_start, key - tile.k_start

        def computed(queries: slice, keys: slice, offset: int) -> tuple[Tensor, Tensor, Tensor]:
            rows = slice(row, row + 1)
            return attend_backward(
                dout[rows, queries, heads], q[rows, heads, queries].transpose(1, 2),
                k[rows, lane : lane + 1, keys].transpose(1, 2), v[rows, lane : lane + 1, keys].transpose(1, 2),
                out[rows, queries, heads], lse[rows, heads, queries],
                softmax_scale=softmax_scale, causal=True, q_offset=offset, softcap=softcap,
            )  # fmt: skip

        lanes = tile.row_stop - tile.row_start, tile.head_stop - tile.head_start
        parts = zip(answer.tensors, places, qkv, strict=True)
        dq, dk, dv = (part[at].view(*lanes, -1, x.shape[3]) for part, at, x in parts)
        one = slice(queries.start + here[2], queries.start + here[2] + 1)
        want, _, _ = computed(one, keys, query - tile.k_start)
        # A lane's heads lie behind each other, each with all queries.
        got = dq[here[:2]].view(group, -1, q.shape[3])[:, here[2]]
        self._hold("dq", got, want[0, 0], q.dtype, dq[here[:2]])
        one = slice(keys.start + here[3], keys.start + here[3] + 1)
        _, *wants = computed(queries, one, tile.q_start - key)
        for name, whole, wanted in zip(("dk", "dv"), (dk, dv), wants, strict=True):
            self._hold(name, whole[here[:2]][here[3]], wanted[0, 0, 0], q.dtype, whole[here[:2]])

    def _hold(self, what: str, got: Tensor, want: Tensor, dtype: torch.dtype, among: Tensor | None = None) -> None:
        """``among``: numbers whose size says how exact the small ones can be."""
        self._counters.spot_checks += 1
        got, want = got.to(want.device).double(), want.double()
        if torch.equal(got, want) or want.isnan().any() or want.isposinf().any():
            return
        tolerance = _TOLERANCES[dtype]
        scale = want.norm() if what in ("output", "dq", "dk", "dv") else torch.ones(())
        floor = 0.0 if among is None else among.double().abs().mean().item()
        difference = (got - want).norm().item()
        if not difference <= tolerance * (scale.item() + floor) + 1e-12:
            self._counters.spot_check_failures += 1
            raise LinkLost(f"answered wrongly: a random {what} is off by {difference:.2e}, {scale.item():.2e} large")


def _has(tile: Tile, row: int, lane: int, query: int) -> bool:
    return all(tile[at] <= place < tile[at + 1] for at, place in ((0, row), (2, lane), (4, query)))


def _attention(
    result: Result, tiles: Iterable[Tile], row: int, lane: int, head: int, query: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one query of one head over the keys of these tiles."""
    out = result.q.new_zeros((1, 1, 1, result.v.shape[3]), dtype=result.exact)
    lse = result.q.new_full((1, 1, 1), -torch.inf, dtype=result.exact)
    for tile in tiles:
        rows, lanes, keys = slice(row, row + 1), slice(lane, lane + 1), result.keys(tile, tile.k_start, tile.k_stop)[2]
        at = query + result.geometry.q_slice(tile).start - tile.q_start
        part = attend(
            result.q[rows, head : head + 1, at : at + 1].transpose(1, 2),
            result.k[rows, lanes, keys].transpose(1, 2),
            result.v[rows, lanes, keys].transpose(1, 2),
            softmax_scale=result.softmax_scale, causal=True, q_offset=query - tile.k_start, softcap=result.softcap,
        )  # fmt: skip
        merge_(out, lse, *part)
    return out[0, 0, 0], lse[0, 0, 0]
