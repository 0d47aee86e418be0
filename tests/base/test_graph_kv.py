"""Keys of blocks in one graph: values and gradients of torch.cat, in any order of use."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fapool_plugin.base.graph_kv import GraphKV

HEADS, D, E = 2, 4, 3


def blocks(lengths: list[int], dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(sum(lengths))

    def random(length: int, dim: int) -> Tensor:
        return torch.randn(2, HEADS, length, dim, generator=made).to(dtype).requires_grad_()

    return [(random(length, D), random(length, E)) for length in lengths]


def appended(parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    kv = GraphKV(sum(k.shape[2] for k, _ in parts))
    return [kv.append(k * 1, v * 1) for k, v in parts]


def joined(parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.cat([k for k, _ in parts[: i + 1]], 2), torch.cat([v for _, v in parts[: i + 1]], 2))
        for i in range(len(parts))
    ]


def loss_of(views: list[tuple[Tensor, Tensor]], used: list[tuple[bool, bool]]) -> Tensor:
    """Weighs every position of every view that is used."""
    total = torch.zeros((), dtype=torch.float64)
    for index, ((k, v), (uses_k, uses_v)) in enumerate(zip(views, used, strict=True)):
        made = torch.Generator().manual_seed(index)
        for x, uses in ((k, uses_k), (v, uses_v)):
            weights = torch.randn(x.shape, generator=made)
            if uses:
                total = total + (x.double().sin() * weights).sum()
    return total


def gradients(loss: Tensor, parts: list[tuple[Tensor, Tensor]], retain_graph: bool = False) -> list[Tensor]:
    """Of all keys and values; zeros where there are none."""
    inputs = [x for pair in parts for x in pair]
    return list(torch.autograd.grad(loss, inputs, retain_graph=retain_graph, allow_unused=True, materialize_grads=True))


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    used=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=5, max_size=5),
)
def test_values_and_gradients_are_those_of_cat(lengths: list[int], used: list[tuple[bool, bool]]) -> None:
    """Also where a loss leaves out later blocks, or values, or all."""
    parts, used = blocks(lengths), used[: len(lengths)]
    ours, theirs = appended(parts), joined(parts)
    for (k, v), (expected_k, expected_v) in zip(ours, theirs, strict=True):
        assert torch.equal(k, expected_k)
        assert torch.equal(v, expected_v)
    if not any(uses for pair in used for uses in pair):
        return
    found = gradients(loss_of(ours, used), parts)
    expected = gradients(loss_of(theirs, used), parts)
    for index, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        worst = (got - wanted).abs().max().item()
        assert worst < 1e-12, f"gradient {index} of {lengths}, {used}: largest difference {worst:.3g}"


def test_backward_twice() -> None:
    parts = blocks([3, 2, 4])
    loss = loss_of(appended(parts), [(True, True)] * 3)
    first, second = (gradients(loss, parts, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True)), "the first left something behind"


def test_parts_of_half_precision_are_summed_in_fp32() -> None:
    """Sixteen blocks add to the first one's gradient what bf16 cannot add up."""
    parts = blocks([1] * 17, torch.bfloat16)
    views = appended(parts)
    loss = torch.stack([k[:, :, :1].sum() * (256 if index == 16 else 1) for index, (k, _) in enumerate(views)]).sum()
    (grad,) = torch.autograd.grad(loss, parts[0][0])
    assert torch.equal(grad, torch.full_like(grad, 256 + 16)), f"{grad.flatten()[0]}, not 272: summed in bf16"


def test_frozen_blocks_get_no_gradient() -> None:
    parts = [(k.detach(), v) for k, v in blocks([2, 3])]
    views = appended(parts)
    loss_of(views, [(True, True)] * 2).backward()
    assert all(v.grad is not None for _, v in parts)


def test_nothing_outlives_the_graph() -> None:
    """No cycle through the graph keeps keys; the collector is off."""
    parts = blocks([3, 2])
    gc.disable()
    try:
        kv = GraphKV(5)
        views = [kv.append(k * 1, v * 1) for k, v in parts]
        gone: list[weakref.ref[Any]] = [weakref.ref(kv), *(weakref.ref(x) for pair in views for x in pair)]
        loss = loss_of(views, [(True, True)] * 2)
        del kv, views
        loss.backward()
        del loss
        assert [ref() for ref in gone] == [None] * 5
    finally:
        gc.enable()


def test_more_than_announced_is_refused() -> None:
    kv = GraphKV(3)
    with pytest.raises(ValueError, match="4 positions do not fit the 3"):
        kv.append(torch.zeros(1, 1, 4, D), torch.zeros(1, 1, 4, E))
