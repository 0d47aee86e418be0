"""A pool rank's computation on CUDA tensors without numbers: a request goes to the device, what is computed stays there
until it is sent, and nothing on the way waits. Requests and answers themselves are in host memory, as on any link."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fapool_plugin.devices.copies import Copies, Cuda
from fapool_plugin.kernels import lanes, torch_cuda
from fapool_plugin.kernels.operators import able
from fapool_plugin.plan.line import Tile
from fapool_plugin.pool.exchange import Inbox
from fapool_plugin.pool.partial_results import PartialResults
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.messages import Header, Message, Op, Status, dtype_code, float_bits, rooms
from tests.fake_cuda import fake_cuda
from tests.recorded_streams import Ticks

ROWS, KV_HEADS, GROUP, D, E, QUERIES, KEYS = 2, 2, 3, 64, 64, 20, 50
Q, K, V = ROWS * KV_HEADS * GROUP * QUERIES, ROWS * KV_HEADS * KEYS, ROWS * KV_HEADS * KEYS
TABLE = torch.tensor([[0, ROWS, 0, KV_HEADS, KEYS - QUERIES, KEYS, 0, KEYS, 0, KEYS, KEYS]])


class NoStreams(Cuda):
    """CUDA's tensors, and streams that do nothing: there are none without a device."""

    def stream(self, device: torch.device) -> Any:
        return SimpleNamespace(wait_event=lambda event: None)

    def current(self, device: torch.device) -> Any:
        return self.stream(device)

    @contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        yield

    def event(self, stream: Any) -> Any:
        return None

    def keep(self, x: Tensor, stream: Any) -> None:
        assert x.is_cuda


def request(op: Op, dtype: torch.dtype, keep: int) -> Message:
    """As it comes over a link: all tensors in host memory. A backward with ``keep`` 2 brings dout alone."""
    header = Header(
        op=op, token=1, call=9, sequence=5, layer=0, keep=keep, extra=9 if op == Op.BACKWARD else 0, tiles=1,
        group=GROUP, head_dim=D, v_head_dim=E, dtype=dtype_code(dtype), scale_bits=float_bits(0.1),
        lse_elements=Q if op == Op.BACKWARD else 0,
    )  # fmt: skip
    if op == Op.ATTEND or keep == 0:
        header = header._replace(q_elements=Q * D, k_elements=K * D, v_elements=V * E)
    return Message(header, [TABLE, *(torch.zeros(room.shape, dtype=room.dtype) for room in rooms(header)[0][1:])])


def answered(answer: tuple[Header, list[list[Tensor]]], dtypes: list[torch.dtype]) -> None:
    """On the device, and what the answer's header announces."""
    header, parts = answer
    assert header.status == Status.OK
    for tensors, room, dtype in zip(parts, rooms(header)[0], dtypes, strict=True):
        assert all(x.is_cuda for x in tensors), "taken from the device before it is sent"
        assert {x.dtype for x in tensors} == {room.dtype} == {dtype}
        assert sum(x.numel() for x in tensors) == room.elements


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # kept calls are counted by their storages
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_a_request_is_computed_without_a_wait(dtype: torch.dtype, keep: int) -> None:
    with fake_cuda() as called:
        inbox = cast(Inbox, SimpleNamespace(steps=0, step=lambda: None))
        worker = Worker(inbox, 2**24, torch.device("cuda"))
        worker.clock._events, worker.copies = Ticks(), Copies(NoStreams())
        answered(worker.attend(request(Op.ATTEND, dtype, keep)), [dtype, torch.float32])  # type: ignore[arg-type]
        gradients = worker.backward(request(Op.BACKWARD, dtype, 2 if keep == 2 else 0))
        answered(gradients, [dtype] * 3)  # type: ignore[arg-type]
    assert ("aten._flash_attention_backward" in called) == (dtype == torch.bfloat16)
    assert gradients[0].keep == (dtype == torch.bfloat16), "rounded by the kernel, and sent so"


def test_partial_results_are_merged_where_they_are() -> None:
    with fake_cuda():
        parts = PartialResults(GROUP, E)
        for keys in ((0, 30), (30, 50)):
            tile = Tile(0, ROWS, 0, KV_HEADS, KEYS - QUERIES, KEYS, *keys)
            out = torch.zeros(ROWS, QUERIES, KV_HEADS * GROUP, E, dtype=torch.bfloat16, device="cuda")
            parts.add(tile, out, torch.zeros(ROWS, KV_HEADS * GROUP, QUERIES, device="cuda"))
        table, (outs, lses) = parts.result()
        assert len(table) == 1
        shapes = out.shape, (ROWS, KV_HEADS * GROUP, QUERIES)
        for x, shape in zip((outs[0], lses[0]), shapes, strict=True):
            assert (x.shape, x.dtype, x.is_cuda) == (shape, torch.float32, True)


def test_a_step_of_unequal_rows_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come one by one, as prompts of unequal lengths do, and are read where they then lie."""
    lengths = (50, 20, 33)
    calls = []
    flash = torch_cuda.flash_lanes

    def counted(*args: Any) -> Any:
        calls.append(args[6])
        return flash(*args)

    monkeypatch.setattr(
        lanes, "able", lambda case: [replace(one, attend_lanes=counted) for one in able(case) if one.attend_lanes]
    )
    header = Header(
        op=Op.ATTEND, token=1, call=9, sequence=5, layer=0, keep=1, group=GROUP, head_dim=D, v_head_dim=D,
        dtype=dtype_code(torch.bfloat16), scale_bits=float_bits(0.1),
    )  # fmt: skip

    def message(new: int, table: Tensor) -> Message:
        queries, keys = len(table) * KV_HEADS * GROUP, len(table) * KV_HEADS * new
        told = header._replace(tiles=len(table), q_elements=queries * D, k_elements=keys * D, v_elements=keys * D)
        return Message(told, [table, *(torch.zeros(room.shape, dtype=room.dtype) for room in rooms(told)[0][1:])])

    prompts = [torch.tensor([[row, row + 1, 0, KV_HEADS, n - 1, n, 0, n, 0, n, 64]]) for row, n in enumerate(lengths)]
    steps = [
        torch.tensor([[row, row + 1, 0, KV_HEADS, n, n + 1, 0, n + 1, n, n + 1, 64] for row, n in enumerate(at)])
        for at in (lengths, [n + 1 for n in lengths])
    ]
    with fake_cuda() as called:
        inbox = cast(Inbox, SimpleNamespace(steps=0, step=lambda: None))
        worker = Worker(inbox, 2**24, torch.device("cuda"))
        worker.clock._events, worker.copies = Ticks(), Copies(NoStreams())
        for n, prompt in zip(lengths, prompts, strict=True):
            assert worker.attend(message(n, prompt))[0].status == Status.OK
        assert not calls, "a single rectangle is a call as ever"
        for step in steps:
            reply, (outs, lses) = worker.attend(message(1, step))
            assert reply.status == Status.OK
            assert [x.shape for x in outs] == [(1, 1, KV_HEADS * GROUP, D)] * 3
            assert [x.shape for x in lses] == [(1, KV_HEADS * GROUP, 1)] * 3
    assert calls == [51, 52]
    assert "aten._flash_attention_forward" in called
