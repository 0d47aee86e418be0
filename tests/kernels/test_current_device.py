"""flash-attn's functions are called with the tensors' device as the current one: a model may be on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.kernels import flash_attn
from fapool_plugin.kernels.band import Band, Given
from tests import operator_stand_ins as stand_ins
from tests.dense_attention import tensors, visible_ST
from tests.dense_gradients import SCALE, Whole


@pytest.mark.parametrize("version", [2, 3, 4])
def test_the_tensors_device_is_the_current_one(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = list[str]()

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        log.append("its device {")
        yield
        log.append("}")

    def function(module: str, name: str = "flash_attn_func") -> Callable[..., Any] | None:
        real: Any = stand_ins.PACKAGES.get((module, name))
        if real is None:
            return None

        @wraps(real)
        def called(*arguments: Any, **keys: Any) -> Any:
            log.append("called")
            return real(*arguments, **keys)

        return called

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(flash_attn, "function", function)
    q, k, v = tensors(1, 4, 6, 4, 2, 8)
    whole = Whole(q, k, v, visible_ST(4, 6))
    forward, backward = (getattr(flash_attn, f"flash_{version}{end}") for end in ("", "_backward"))
    forward(q, k, v, SCALE, Band(-4, 6), 0.0)
    backward(Given(whole.dout, q, k, v, whole.out, whole.lse), SCALE, Band(-4, 6), 0.0)
    assert log == ["its device {", "called", "}"] * 2
