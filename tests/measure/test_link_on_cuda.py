"""What a link costs a base on a GPU, on CUDA tensors without numbers: messages begin and end there, and are large."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fapool_plugin.base.lease import Expected
from fapool_plugin.devices.clock import Clock
from fapool_plugin.devices.copies import Copies
from fapool_plugin.measure import calibrate
from fapool_plugin.wire.messages import Header, Message, Payload, Status
from tests.devices.test_copies import Kept
from tests.fake_cuda import fake_cuda
from tests.recorded_streams import Ticks


class Rank:
    """Answers with zeros of the right size, in the host's memory, at once."""

    number = 0

    def __init__(self, on_device: bool) -> None:
        self.link = SimpleNamespace(carrier=SimpleNamespace(takes=lambda nbytes: on_device))
        self.on_device, self.sent = on_device, list[tuple[int, Expected]]()

    def ask(self, header: Header, tensors: Payload, expected: Expected) -> int:
        floats = cast(list[torch.Tensor], tensors[1:])
        assert {x.is_cuda for x in floats} == {self.on_device}, "not as the carrier takes them"
        self.sent.append((sum(x.numel() * x.itemsize for x in floats), expected))
        return len(self.sent)

    def answer(self, call: int) -> Message:
        q, _, _, lse = self.sent[-1][1].sizes
        return Message(Header(status=Status.OK), [torch.zeros(q), torch.zeros(lse)])


@pytest.mark.parametrize("on_device", [True, False])
def test_messages_begin_and_end_on_the_device(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, copies, ticks = Rank(on_device), Kept(), Ticks(0.001)
    monkeypatch.setattr(calibrate, "Copies", lambda: Copies(copies))
    monkeypatch.setattr(calibrate, "Clock", lambda device: Clock(device, ticks))
    with fake_cuda():
        cost = calibrate.measure_link(cast(Any, rank), quick=True, device=torch.device("cuda"))
    asked = {nbytes for nbytes, _ in rank.sent}
    answered = {expected.most_bytes for _, expected in rank.sent}
    assert max(asked) >= 2**26 - 2**10, "a block of a large model is larger"
    assert max(answered) >= 2**26 - 2**10
    assert ticks.now == ticks.launched == len(rank.sent), "what came was not waited for on the device"
    assert "cuda:0 for cuda" in copies.log, "an answer stayed on the host"
    assert min(cost.to_rank.a, cost.to_base.a) >= 0
