"""One call for lanes with keys of unequal number, where they lie: by a stand-in that computes in fp64 what torch's
operator for GPUs is documented to, and by torch's own shape functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fapool_plugin.base.result import Result
from fapool_plugin.kernels import lanes
from fapool_plugin.kernels.lanes import Rectangle, attend_all
from fapool_plugin.kernels.operators import OPERATORS, Operator
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.shares import Geometry
from tests import operator_stand_ins as stand_ins
from tests.dense_attention import assert_attention, reference, visible_ST
from tests.dense_gradients import SCALE
from tests.fake_cuda import fake_cuda

(FLASH,) = [operator for operator in OPERATORS if operator.attend_lanes is not None]
FP64, BF16 = torch.float64, torch.bfloat16


def by_stand_in(patch: pytest.MonkeyPatch) -> stand_ins.Calls:
    """The operator for GPUs is there on the CPU, and computes in fp64."""
    calls = stand_ins.Calls()
    flash = replace(FLASH, can=lambda case: not case.softcap)
    found: Callable[[Any], list[Operator]] = lambda case: [flash] if flash.can(case) else []  # noqa: E731
    patch.setattr(lanes, "able", found)
    patch.setattr(torch.ops, "aten", stand_ins.aten(calls))
    return calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_ins.Calls]:
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        yield by_stand_in(patch)


def stored(rows: int, heads: int, room: int, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Keys and values as a cache keeps them, [B, K, room, D], of which nothing may be read that is not given."""
    torch.manual_seed(rows)
    k, v = (torch.randn(rows, heads, room, dim, dtype=FP64) for _ in range(2))
    return k, v


def part(k: Tensor, v: Tensor, tile: Tile, group: int, query: int = 0) -> Rectangle:
    """A tile of one query, as callers cut it: views of what is stored."""
    rows, heads, keys = slice(*tile[:2]), slice(*tile[2:4]), slice(*tile[6:])
    made = torch.Generator().manual_seed(sum(tile) + query)
    sizes = tile.row_stop - tile.row_start, 1, (tile.head_stop - tile.head_start) * group, k.shape[3]
    q = torch.randn(sizes, dtype=FP64, generator=made)
    k, v = (x[rows, heads, keys].transpose(1, 2) for x in (k, v))
    return Rectangle(q, k, v, tile.q_start - tile.k_start)


def expected(one: Rectangle, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    seen = visible_ST(1, one.k_BTKD.shape[1], True, one.q_offset)
    return reference(*one[:3], seen, SCALE, softcap)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    first=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_lengths_are_one_call(lengths: list[int], heads: int, group: int, first: int) -> None:
    rows, room = len(lengths), 16
    k, v = stored(rows, heads, room)
    tiles = [
        Tile(row, row + 1, 0, heads, first + length - 1, first + length, first, first + length)
        for row, length in enumerate(lengths)
    ]
    given_away = torch.ones(rows, heads, room, dtype=torch.bool)
    for tile in tiles:
        given_away[tile.row_start, :, tile.k_start : tile.k_stop] = False
    for x in (k, v):
        x[given_away] = math.nan
    parts = [part(k, v, tile, group) for tile in tiles]
    with pytest.MonkeyPatch.context() as patch:
        calls = by_stand_in(patch)
        found = attend_all(parts, softmax_scale=SCALE)
    assert calls == [("flash lanes", max(lengths))]
    for one, got in zip(parts, found, strict=True):
        assert_attention(got, expected(one), FP64, f"{lengths} {heads} {group}")


def test_cut_lanes_and_several_rows_are_in_the_same_call(calls: stand_ins.Calls) -> None:
    k, v = stored(6, 4, 20)
    tiles = [Tile(0, 1, 2, 4, 9, 10, 0, 10), Tile(1, 4, 0, 4, 16, 17, 3, 17), Tile(5, 6, 0, 1, 19, 20, 0, 20)]
    parts = [part(k, v, tile, 2) for tile in tiles]
    found = attend_all(parts, softmax_scale=SCALE)
    assert calls == [("flash lanes", 20)]
    for one, got in zip(parts, found, strict=True):
        assert_attention(got, expected(one), FP64)


def test_what_cannot_be_one_call_is_computed_by_itself(calls: stand_ins.Calls) -> None:
    """Other storages; values that lie otherwise than keys; a query that does not see all keys."""
    k, v = stored(6, 2, 10)
    other_k, other_v = stored(2, 2, 10)
    whole = [Tile(row, row + 1, 0, 2, row + 2, row + 3, 0, row + 3) for row in range(6)]
    parts = [part(k, v, tile, 2) for tile in whole[:3]]
    parts += [part(other_k, other_v, tile, 2) for tile in whole[:2]]
    parts.append(part(k, v, whole[3], 2)._replace(q_offset=2))
    parts.append(part(k, v.transpose(1, 2).contiguous().transpose(1, 2), whole[4], 2))
    shifted = part(k, v, whole[5], 2)
    parts.append(shifted._replace(v_BTKE=v[5:6, :, 1:9].transpose(1, 2)))
    alone = []

    def noted(one: Rectangle) -> tuple[Tensor, Tensor]:
        alone.append(one)
        return reference(*one[:3], visible_ST(1, one.k_BTKD.shape[1], True, one.q_offset), SCALE)

    found = attend_all(parts, softmax_scale=SCALE, alone=noted)
    assert calls == [("flash lanes", 5), ("flash lanes", 4)]
    assert alone == parts[5:]
    for one, got in zip(parts, found, strict=True):
        assert_attention(got, expected(one), FP64)


@pytest.mark.parametrize(("dim", "softcap"), [(20, 0.0), (8, 2.0)])
def test_where_no_operator_can_each_is_a_call(dim: int, softcap: float, calls: stand_ins.Calls) -> None:
    k, v = stored(2, 2, 10, dim)
    parts = [part(k, v, Tile(row, row + 1, 0, 2, 5 + row, 6 + row, 0, 6 + row), 2) for row in range(2)]
    alone = []

    def noted(one: Rectangle) -> tuple[Tensor, Tensor]:
        alone.append(one)
        return expected(one, softcap)

    attend_all(parts, softmax_scale=SCALE, softcap=softcap, alone=noted)
    assert alone == parts
    assert not calls


def test_on_the_cpu_each_is_a_call() -> None:
    k, v = stored(2, 2, 10)
    parts = [part(k, v, Tile(row, row + 1, 0, 2, 5 + row, 6 + row, 0, 6 + row), 2) for row in range(2)]
    for one, got in zip(parts, attend_all(parts, softmax_scale=SCALE), strict=True):
        assert_attention(got, expected(one), FP64)
    assert attend_all([], softmax_scale=SCALE) == []


def test_a_padded_batch_of_a_base_is_one_call(calls: stand_ins.Calls) -> None:
    """The base's share of a decode step: rows of a cache with room, padded on the left."""
    B, K, G, N, D = 4, 2, 2, 11, 8
    k, v = (x[:, :, :N] for x in stored(B, K, 16, D))
    q = torch.randn(B, K * G, 1, D, dtype=FP64)
    starts = (0, 3, 3, 7)
    result = Result(q, k, v, Geometry(starts, (N,) * B, N - 1, N), SCALE, 0.0)
    result.compute([Tile(r, r + 1, 0, K, N - 1 - at, N - at, 0, N - at) for r, at in enumerate(starts)])
    out, lse = result.final(None)
    assert calls == [("flash lanes", N)]
    for row, start in enumerate(starts):
        one, keys, values = (x[row : row + 1].transpose(1, 2) for x in (q, k[:, :, start:], v[:, :, start:]))
        want = reference(one, keys, values, visible_ST(1, N - start), SCALE)
        assert_attention((out[row : row + 1], lse[row : row + 1]), want, FP64, f"row {row}")


def test_on_a_device_nothing_waits_and_nothing_is_copied() -> None:
    sizes, group = (5, 30, 17), 4
    with fake_cuda() as called:
        k, v = (torch.empty(3, 2, 64, 128, device="cuda", dtype=BF16) for _ in range(2))
        queries = [torch.empty(1, 1, 2 * group, 128, device="cuda", dtype=BF16) for _ in sizes]
        parts = [
            Rectangle(q, k[row : row + 1, :, :n].transpose(1, 2), v[row : row + 1, :, :n].transpose(1, 2), n - 1)
            for row, (n, q) in enumerate(zip(sizes, queries, strict=True))
        ]
        for out, lse in attend_all(parts, softmax_scale=SCALE):
            assert (out.shape, out.dtype, out.is_cuda) == ((1, 1, 2 * group, 128), BF16, True)
            assert (lse.shape, lse.dtype, lse.is_cuda) == ((1, 2 * group, 1), torch.float32, True)
    assert "aten._flash_attention_forward" in called
    assert not called & {"aten.index", "aten.constant_pad_nd", "aten.bmm"}, called
